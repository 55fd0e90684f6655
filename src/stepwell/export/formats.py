"""The formats that graphs are written in: ONNX, OpenVINO's, and torch.export's.

Graphs are traced on the reference path of every op, which is made of what ONNX has (deformable attention as
GridSample). Each has inputs and outputs of known sizes; the first dimension of all may be any number of
images.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepwell.folders import ModelError, one_line
from stepwell.ops.choose import prefer

__all__ = ["FORMATS", "Format", "Run", "Runtime", "check_format", "open_graph", "write_graph"]

Runtime = Literal["onnx", "openvino"]
Format = Literal["onnx", "openvino", "torch"]
FORMATS: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""And the ending of their files; weights may lie beside, in files whose names begin alike."""

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Inputs -> outputs, on the CPU."""

_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_MOST_TOGETHER = 1024
_BESIDE = 1 << 30  # bytes of weights from which on an ONNX file, of 2 GiB at most, has them beside itself


def check_format(form: Format | Runtime, *, to_write: bool) -> None:
    """Raises ImportError, one line, for a format whose libraries are not here."""
    for name in _NEEDED.get(form, ())[slice(None) if to_write else slice(2, None)]:
        try:
            __import__(name)
        except ImportError:
            what = "writing" if to_write else "running"
            raise ImportError(f"{what} {form} graphs needs {name}: pip install 'stepwell[export]'") from None


def write_graph(
    module: nn.Module,
    example: Sequence[Tensor],
    form: Format,
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    any_batch: bool,
) -> None:
    """A module that takes tensors like `example` and gives a tuple of tensors. any_batch: the first dimension
    of all inputs and outputs is free; it must be at least 2 in the example.
    """
    batch = torch.export.Dim("batch", min=1, max=_MOST_TOGETHER)
    shapes = tuple({0: batch} for _ in example) if any_batch else None
    with prefer("reference"), torch.no_grad(), _quiet():
        program = torch.export.export(module, tuple(example), dynamic_shapes=shapes)
        if form == "torch":
            torch.export.save(program, path)
            return
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=list(inputs), output_names=list(outputs), verbose=False
        )
        assert onnx is not None
        for node in onnx.model.graph.all_nodes():
            node.metadata_props.clear()  # lines of our code, with the paths of this machine
        if form == "onnx":
            size = sum(weight.nbytes for weight in module.state_dict().values())
            onnx.save(path, external_data=size > _BESIDE)
            return
        import openvino

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            onnx.save(Path(folder) / "graph.onnx", external_data=True)
            converted = openvino.convert_model(Path(folder) / "graph.onnx")
            openvino.save_model(converted, path, compress_to_fp16=False)


def open_graph(path: Path, form: Format) -> Run:
    """A graph of `write_graph`, on as many threads as torch has. Raises ModelError for a damaged file."""
    try:
        return _opened(path, form)
    except Exception as error:  # each has errors of its own
        raise ModelError(f"{path} is no graph that {form} opens: {one_line(error)}") from None


def _opened(path: Path, form: Format) -> Run:
    if form == "onnx":
        return _onnx_runtime(path)
    if form == "openvino":
        return _openvino(path)
    module = torch.export.load(path).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*inputs))

    return run


def _onnx_runtime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return run


@functools.cache
def _openvino_core() -> Any:
    """One for all graphs: its plugin gives the thread a stack for signals of its own. Of two cores that are
    freed in the order of their making, the second would give back the stack of the first, which is gone, and
    the next signal with a handler, such as Ctrl-C, would kill the process.
    """
    import openvino

    return openvino.Core()


def _openvino(path: Path) -> Run:
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = _openvino_core().compile_model(path, "CPU", settings)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        found: Any = compiled([x.cpu().numpy() for x in inputs])
        return [torch.from_numpy(x.copy()) for x in found.to_tuple()]  # theirs until the next call

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of their steps on every stream that there is."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
