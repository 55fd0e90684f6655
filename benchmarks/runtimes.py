"""Our models against their own graphs in ONNX Runtime and OpenVINO: what a user with a processor and no GPU
would run. PIIP-TSB 1120/896/448 as a backbone, and the shipped models, as `stepwell export` writes them.

The reference path is exported, whose every operation ONNX has (deformable attention as GridSample).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from measure import CLOSE, Row, Worker, compare, has_bf16
from piip_backbone import NAMES, build, image, inference
from torch import Tensor

import stepwell
from stepwell.export.graphs import Exported, exported
from stepwell.export.write import pictures
from stepwell.ops.choose import prefer

NAME = NAMES["detection"]
LEAST = {"float32": 1 / 1.35, "bfloat16": 1 / 1.1}  # at most 1.35 and 1.1 times OpenVINO's time
SHIPPED = {"boards_tiny": (640, 640), "reader_tiny": (1280, 640)}  # height and width of the pictures


def rows() -> list[Row]:
    return [
        (f"{NAME}, fp32, other: ONNX Runtime", partial(_row, "onnx_runtime", "float32")),
        (f"{NAME}, fp32, other: OpenVINO", partial(_row, "openvino", "float32")),
        (f"{NAME}, bf16, other: OpenVINO", partial(_row, "openvino", "bfloat16")),
        *(
            (
                f"{model}, graph of {size[1]}x{size[0]}, fp32, other: {runtime}",
                partial(_shipped, model, runtime),
            )
            for model, size in SHIPPED.items()
            for runtime in ("onnx", "openvino")
        ),
    ]


def _row(runtime: str, dtype: str) -> Iterator[str]:
    title = f"{NAME}, {'fp32' if dtype == 'float32' else 'bf16'}, other: " + (
        "OpenVINO" if runtime == "openvino" else "ONNX Runtime"
    )
    if dtype == "bfloat16" and not has_bf16():
        yield f"| {title} | not timed: this processor has no bf16 instructions | | | | | | |"
        return
    yield str(
        compare(
            title,
            inference("detection", "ours", dtype),
            ("runtimes", f"build_{runtime}", _exported(), dtype),
            target=LEAST[dtype] if runtime == "openvino" else None,
            close=CLOSE[dtype],
            rounds=5,
        )
    )


def _title(model: str, runtime: str) -> str:
    height, width = SHIPPED[model]
    return f"{model}, graph of {width}x{height}, fp32, other: {runtime}"


def _shipped(model: str, runtime: str) -> Iterator[str]:
    folder = str(Path(_folder().name) / f"{model}-{runtime}")
    with Worker(("runtimes", "build_shipped", model, folder, runtime)) as worker:
        worker.ready(), worker.go()
    yield str(
        compare(
            _title(model, runtime),
            ("runtimes", "build_scored", model),
            ("runtimes", "build_graph", model, folder, runtime),
            close=CLOSE["float32"],
            rounds=5,
        )
    )


def build_shipped(model: str, folder: str, runtime: str) -> Callable[[], object]:
    from stepwell.export.write import export

    return lambda: export(model, folder, form=runtime, sizes=[SHIPPED[model]])  # type: ignore[arg-type]


def build_scored(model: str) -> Callable[[], list[Tensor]]:
    graph, inputs = _graph(model)

    def once() -> list[Tensor]:
        with torch.no_grad():
            return list(graph.module(*inputs))

    return once


def build_graph(model: str, folder: str, runtime: str) -> Callable[[], list[Tensor]]:
    from stepwell.export.folder import GRAPHS, graph_files
    from stepwell.export.formats import open_graph

    (file,) = graph_files(Path(folder))
    run = open_graph(Path(folder) / GRAPHS / file.file, runtime)  # type: ignore[arg-type]
    _, inputs = _graph(model)
    return lambda: run(inputs)


def _graph(model: str) -> tuple[Exported, list[Tensor]]:
    """What is exported, and its inputs for a picture."""
    graph = exported(stepwell.load(model, device="cpu", dtype="float32"), SHIPPED[model])
    return graph, graph.prepare(pictures(SHIPPED[model])[0])


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="stepwell-bench-")  # goes when the bench ends


@cache
def _exported() -> str:
    """The graph's file, written once, by a process of its own."""
    path = str(Path(_folder().name) / "piip_tsb.onnx")
    with Worker(("runtimes", "build_export", path)) as worker:
        worker.ready(), worker.go()
    return path


def build_export(path: str) -> Callable[[], None]:
    network, _ = build("detection", "ours")

    def once() -> None:
        with prefer("reference"), torch.no_grad():
            program = torch.onnx.export(network, (image("detection"),), dynamo=True, verbose=False)
        program.save(path, external_data=True)

    return once


def build_onnx_runtime(path: str, dtype: str) -> Callable[[], list[Tensor]]:
    import onnxruntime

    assert dtype == "float32"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    x = image("detection").numpy()
    return lambda: [torch.from_numpy(out) for out in session.run(None, {pixels.name: x})]


def build_openvino(path: str, dtype: str) -> Callable[[], list[Tensor]]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    x = image("detection").numpy()
    return lambda: [torch.from_numpy(out) for out in compiled([x]).to_tuple()]
