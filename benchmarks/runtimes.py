"""Our models against their own graphs in ONNX Runtime and OpenVINO: what a user with a processor and no GPU
would run. PIIP-TSB 1120/896/448 as a backbone; and as `stepwell export` writes them, the shipped models, a
segmenter on the backbone of the shipped detector, and vision systems of benchmarks/reading/systems, these and
the segmenter with random weights.

The reference path is exported, whose every operation ONNX has (deformable attention as GridSample).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import yaml
from measure import CLOSE, Row, Worker, compare, has_bf16
from piip_backbone import NAMES, build, image, inference
from torch import Tensor

import stepwell
from stepwell.export.folder import GRAPHS, graph_files
from stepwell.export.formats import Runtime, open_graph
from stepwell.export.graphs import Exported, exported
from stepwell.export.write import export, pictures
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.dense_config import StepwellSegmenterConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.models.systems import vision_settings
from stepwell.ops.choose import prefer
from stepwell.weights.load import model_folder

NAME = NAMES["detection"]
LEAST = {"float32": 1 / 1.35, "bfloat16": 1 / 1.1}  # at most 1.35 and 1.1 times OpenVINO's time
SYSTEMS = ("plain", "anyres", "pyramid_shared", "uhd_v1", "uhd_v2", "inf", "llava_hr")
SIZES = {"boards_tiny": (640, 640), "reader_tiny": (1280, 640), "segmenter": (512, 512)}
SIZES |= dict.fromkeys(SYSTEMS, (832, 640))  # height and width of the pictures
RUNTIMES: tuple[Runtime, ...] = ("onnx", "openvino")


def rows() -> list[Row]:
    return [
        (f"{NAME}, fp32, other: ONNX Runtime", partial(_row, "onnx_runtime", "float32")),
        (f"{NAME}, fp32, other: OpenVINO", partial(_row, "openvino", "float32")),
        (f"{NAME}, bf16, other: OpenVINO", partial(_row, "openvino", "bfloat16")),
        *(
            (_title(model, runtime), partial(_exported_model, model, runtime))
            for model in SIZES
            for runtime in RUNTIMES
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
    height, width = SIZES[model]
    return f"{model}, graph for {width}x{height}, fp32, other: {runtime}"


def _exported_model(model: str, runtime: str) -> Iterator[str]:
    folder = str(Path(_folder().name) / model)
    with Worker(("runtimes", "build_export_of", model, folder, runtime)) as worker:
        worker.ready(), worker.go()
    yield str(
        compare(
            _title(model, runtime),
            ("runtimes", "build_network", model, folder),
            ("runtimes", "build_graph", model, folder, runtime),
            close=CLOSE["float32"],
            rounds=5,
            seconds=15,
        )
    )


def build_export_of(model: str, folder: str, runtime: Runtime) -> Callable[[], object]:
    if not Path(folder).exists():
        torch.manual_seed(0)
        if model in SYSTEMS:
            _save_assistant(model, folder)
        elif model == "segmenter":
            _segmenter().save_pretrained(folder)
        else:
            shutil.copytree(model_folder(model, None), folder)
    return lambda: export(folder, form=runtime, sizes=[SIZES[model]])


def build_network(model: str, folder: str) -> Callable[[], list[Tensor]]:
    graph, inputs = _graph(model, folder)

    def once() -> list[Tensor]:
        with torch.no_grad():
            return list(graph.module(*inputs))

    return once


def build_graph(model: str, folder: str, runtime: Runtime) -> Callable[[], list[Tensor]]:
    (file,) = (file for file in graph_files(Path(folder)) if file.format == runtime)
    run = open_graph(Path(folder) / GRAPHS / file.file, runtime)
    _, inputs = _graph(model, folder)
    return lambda: run(inputs)


def _graph(model: str, folder: str) -> tuple[Exported, list[Tensor]]:
    """What is exported, and its inputs for a picture."""
    graph = exported(stepwell.load(folder, device="cpu", dtype="float32"), SIZES[model])
    return graph, graph.prepare(pictures(SIZES[model])[0])


def _segmenter() -> StepwellForSemanticSegmentation:
    backbone = stepwell.load("boards_tiny", device="cpu").config.backbone_config
    images = {"short_side": 512, "window": 512, "stride": 341}
    head = UperNetConfig(channels=128, auxiliary_channels=64)
    return StepwellForSemanticSegmentation(
        StepwellSegmenterConfig(backbone_config=backbone, head=head, images=images, num_labels=6)
    ).eval()


def _save_assistant(system: str, folder: str) -> None:
    """The shipped reader with another vision system, not trained."""
    recipe = yaml.safe_load((Path(__file__).parent / "reading/systems" / f"{system}.yaml").read_text("utf-8"))
    vision = vision_settings(recipe["model"]["vision"])
    reader = stepwell.load("reader_tiny", device="cpu")
    config = reader.model.config
    tokenizer, template = reader.processor.tokenizer, reader.processor.template
    changed = StepwellConfig(
        vision, config.text_config, image_token_id=config.image_token_id, template=template
    )
    StepwellForConditionalGeneration(changed).save_pretrained(folder)
    StepwellProcessor(StepwellImageProcessor(vision), tokenizer, template=template).save_pretrained(folder)


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
