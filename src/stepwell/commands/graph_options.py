"""The options of commands that may run a model's graphs in place of PyTorch, and how these open it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

__all__ = ["Int8", "OnRuntime", "Runtime", "check_runtime", "load_on_runtime"]

Runtime = Literal["onnx", "openvino"]
OnRuntime = Annotated[
    Runtime | None,
    typer.Option("--runtime", help="Run the graphs that `stepwell export` has put into the model's folder."),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Of these the ones exported with --int8.")]


def check_runtime(runtime: Runtime | None, device: str | None, dtype: str | None, *, int8: bool) -> None:
    """Raises ValueError for options that do not go together."""
    if int8 and runtime is None:
        raise ValueError("--int8 chooses among graphs: name a --runtime too")
    if runtime is not None and (device not in (None, "cpu") or dtype not in (None, "float32")):
        raise ValueError("graphs run on the CPU in float32: leave --device and --dtype out")


def load_on_runtime(model: str, runtime: Runtime, revision: str | None, *, int8: bool) -> Any:
    """As `stepwell.export.runtime.load_on`."""
    from stepwell.export.runtime import load_on

    return load_on(model, runtime, int8=int8, revision=revision)
