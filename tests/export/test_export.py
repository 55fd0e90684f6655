"""Graphs give what PyTorch gives, whatever the model; one that does not is not kept."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stepwell
from stepwell.cli import main
from stepwell.export import write
from stepwell.export.folder import GRAPHS, graph_files, weights_digest
from stepwell.export.formats import open_graph
from stepwell.export.graphs import exported
from stepwell.export.int8 import Int8Linear, store_in_int8
from stepwell.export.runtime import load_on
from stepwell.export.write import export, pictures
from stepwell.folders import SHIPPED_DETECTOR, ModelError, locked
from stepwell.fuse.interaction import InteractionConfig
from stepwell.heads.box_head import BoxHeadConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.heads.upernet import UperNetConfig
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.detector import StepwellForObjectDetection
from stepwell.models.perception import PyramidClassifierConfig, PyramidForImageClassification
from stepwell.models.pyramid import BranchConfig
from stepwell.models.segmenter import StepwellForSemanticSegmentation

NARROW = {"dim": 32, "depth": 2, "num_heads": 2}
BRANCHES = (
    BranchConfig(encoder="vit_nano", size=32, interactions=((0, 1),), arguments=NARROW),
    BranchConfig(encoder="vit_nano", size=64, interactions=((0, 1),), arguments=NARROW),
)
PYRAMID = stepwell.DenseSettings(branches=BRANCHES, interaction=InteractionConfig(num_heads=2))
IMAGES = {"long_limit": 96, "short_limit": 64, "size_divisor": 32}
RPN = RpnConfig(dim=16, testing=ProposalConfig(per_level=50, num=30))
SMALL_DINO = DinoConfig(
    dim=16,
    norm_groups=4,
    num_queries=12,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=16,
    num_heads=2,
    num_points=2,
    self_attention_heads=2,
)


def detector(head):
    config = StepwellDetectorConfig(backbone_config=PYRAMID, head=head, images=IMAGES, num_labels=3)
    return StepwellForObjectDetection(config)


def segmenter():
    head = UperNetConfig(channels=8, auxiliary_channels=4, pool_sizes=(1, 2))
    images = {"short_side": 64, "window": 64, "stride": 32}
    return StepwellForSemanticSegmentation(
        StepwellSegmenterConfig(backbone_config=PYRAMID, head=head, images=images, num_labels=4)
    )


def classifier(dim=32):
    branches = [replace(branch, arguments={**NARROW, "dim": dim}) for branch in BRANCHES]
    settings = {"branches": tuple(branches), "interaction": PYRAMID.interaction}
    pyramid = importlib.import_module("stepwell.models.dense").ClassifierSettings(**settings)
    return PyramidForImageClassification(PyramidClassifierConfig(pyramid=pyramid, num_labels=5))


MODELS = {
    "rcnn": lambda: detector(RcnnConfig(dim=16, rpn=RPN, box=BoxHeadConfig(dim=16))),
    "dino": lambda: detector(SMALL_DINO),
    "segmenter": segmenter,
    "classifier": classifier,
}


@pytest.fixture
def folder(tmp_path, request):
    """Of a model whose gates are open, so that interactions are in the graph."""
    torch.manual_seed(0)
    model = {**MODELS, "wide": lambda: classifier(96)}[getattr(request, "param", "classifier")]().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def told(model, picture):
    options = {} if isinstance(model, StepwellForSemanticSegmentation) else {"threshold": 0.0}
    return model.predict(picture, **options)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_a_model_on_its_graphs_predicts_what_it_predicts_in_pytorch(folder, runtime):
    pytest.importorskip("onnxruntime" if runtime == "onnx" else runtime)
    (graph,) = export(folder, form=runtime, sizes=[(60, 90)])
    assert graph.largest_difference < 1e-4
    plain, on_graphs = stepwell.load(folder, device="cpu"), load_on(folder, runtime)
    on_graphs.score = None  # whatever is said comes from the graph
    together = [told(on_graphs, picture) for picture in pictures((60, 90))]
    assert len({repr(found.to_dict()) for found in together}) > 1
    for picture, found in zip(pictures((60, 90)), together, strict=True):
        wanted = told(plain, picture)
        if hasattr(wanted, "boxes"):
            torch.testing.assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-3)
        if hasattr(wanted, "scores"):
            torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.labels, wanted.labels)


@pytest.mark.slow
def test_any_number_of_pictures_go_through_a_graph_together(folder):
    pytest.importorskip("onnxruntime")
    export(folder)
    plain, on_graphs = stepwell.load(folder, device="cpu"), load_on(folder, "onnx")
    for count in (1, 3):
        given = pictures((64, 64))[:count]
        pixels = plain.image_processor()(given, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(
            on_graphs(pixels).logits, plain(pixels).logits.detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_the_vision_system_of_an_assistant_on_its_graph_gives_its_tokens_and_maps(tmp_path):
    pytest.importorskip("onnxruntime")
    export("reader_tiny", tmp_path / "out", sizes=[(320, 160)])
    plain, on_graphs = stepwell.load("reader_tiny", device="cpu"), load_on(tmp_path / "out", "onnx")
    picture = pictures((320, 160))[0]
    wanted, found = plain.encode(picture), on_graphs.encode(picture)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-3, atol=1e-3)
    assert [(each.view, each.stride) for each in found.maps] == [
        (each.view, each.stride) for each in wanted.maps
    ]
    assert [each.map.shape for each in found.maps] == [each.map.shape for each in wanted.maps]
    question = "What is the total amount?"
    assert on_graphs.ask(picture, question) == plain.ask(picture, question)
    with pytest.raises(ValueError, match=r"sees at 100x100; there are those for pictures of 160x320"):
        on_graphs.ask(pictures((100, 100))[0], question)
    with pytest.raises(ValueError, match="graphs look at whole images"):
        on_graphs.ask(picture, question, region=(0, 0, 80, 80))


@pytest.mark.slow
def test_a_program_of_torch_is_opened_again_and_gives_the_same(folder):
    (graph,) = export(folder, form="torch")
    run = open_graph(folder / GRAPHS / graph.file, "torch")
    model = stepwell.load(folder, device="cpu")
    pixels = torch.randn(3, 3, *graph.sizes[0])
    torch.testing.assert_close(run([pixels])[0], model(pixels).logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["wide"], indirect=True)
def test_eight_bits_make_a_smaller_graph_that_is_chosen_by_name(folder):
    """Of layers of some 9000 weights and more: torch's exporter brings smaller ones back itself."""
    pytest.importorskip("onnxruntime")
    (whole,), (rounded,) = export(folder), export(folder, int8=True)
    assert [graph.file for graph in graph_files(folder)] == [whole.file, rounded.file]
    files = [folder / GRAPHS / graph.file for graph in (whole, rounded)]
    whole_size, rounded_size = (file.stat().st_size for file in files)
    assert rounded.rounding_difference > 100 * rounded.largest_difference
    assert whole.rounding_difference is None
    in_blocks = 2 * 2 * (4 + 8) * 96**2  # branches, blocks, and in each attention and MLP
    assert whole_size - rounded_size > 3 * 0.9 * in_blocks
    assert not any(str(Path(stepwell.__file__).parent).encode() in file.read_bytes() for file in files)
    (pixels,) = (torch.randn(1, 3, *whole.sizes[0]),)
    of_whole, of_rounded = (load_on(folder, "onnx", int8=int8)(pixels).logits for int8 in (False, True))
    assert 0 < (of_whole - of_rounded).abs().max() < 0.1 * of_whole.abs().max()


def test_rounded_weights_are_half_a_step_away_at_most():
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 20)
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[4] *= 1000
    network = torch.nn.Sequential(layer, torch.nn.Conv2d(3, 3, 1))
    assert store_in_int8(network) == 1
    (rounded, _) = network
    assert isinstance(rounded, Int8Linear)
    assert rounded.weight.dtype == torch.int8
    step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    error = (rounded.weight * rounded.scale - layer.weight.detach()).abs()
    assert (error <= step / 2 * 1.001 + 1e-12).all()
    x = torch.randn(5, 30)
    wanted = x @ (rounded.weight * rounded.scale).T + layer.bias
    torch.testing.assert_close(rounded(x), wanted.detach())


def test_a_graph_that_differs_from_pytorch_is_not_kept(folder, monkeypatch):
    def wrong(path, form):
        return lambda inputs: [torch.full((1, 5), 0.01) + stepwell.load(folder)(*inputs).logits.detach()]

    monkeypatch.setattr(write, "open_graph", wrong)
    with pytest.raises(ValueError, match=r"torch graph for 64x64 differs from PyTorch by .* it is not kept"):
        export(folder, form="torch")
    assert not [path for path in (folder / GRAPHS).rglob("*") if path.is_file()]
    assert graph_files(folder) == []


def test_where_a_graph_is_not_kept_there_is_no_new_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "open_graph", lambda path, form: lambda inputs: [torch.zeros(1, 5)])
    for _ in range(2):
        with pytest.raises(ValueError, match="it is not kept"):
            export(folder, tmp_path / "out", form="torch")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_export_at_a_time_works_on_a_folder(folder):
    pytest.importorskip("fcntl")
    with locked(folder), pytest.raises(ValueError, match=r"another process works on .*model"):
        export(folder, form="torch")
    killed = folder / GRAPHS / "torch" / ".64x64-abc"
    killed.mkdir(parents=True)
    (killed / "64x64.pt2").touch()
    export(folder, form="torch")
    assert [path.name for path in killed.parent.iterdir()] == ["64x64.pt2"]


def test_graphs_go_into_a_folder_of_ones_own_alone():
    with pytest.raises(ValueError, match="boards_tiny is no folder of yours: name a new one"):
        export(SHIPPED_DETECTOR)
    with pytest.raises(ModelError, match="stepwell export boards_tiny OUT --format onnx"):
        load_on("boards_tiny", "onnx")
    with pytest.raises(ValueError, match="reader_tiny is no folder of yours: name a new one"):
        export("reader_tiny", form="torch")


def test_graphs_of_weights_that_have_changed_anywhere_are_refused(tmp_path):
    """In the midst of a file of several MB."""
    shutil.copytree(SHIPPED_DETECTOR, tmp_path / "model")
    keep_a_list(tmp_path / "model")
    assert len(graph_files(tmp_path / "model")) == 1
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="graphs of other weights than lie there now"):
        export(tmp_path / "model", form="torch")


@pytest.mark.parametrize("form", ["onnx", "openvino", "torch"])
def test_a_damaged_graph_is_one_line(form, tmp_path):
    if form != "torch":
        pytest.importorskip("onnxruntime" if form == "onnx" else form)
    (tmp_path / "64x64.onnx").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=rf"64x64\.onnx is no graph that {form} opens: ") as caught:
        open_graph(tmp_path / "64x64.onnx", form)
    assert "\n" not in str(caught.value)


SIGNALLED = """
import faulthandler, gc, os, signal, sys
import torch
from pathlib import Path
from stepwell.export.formats import open_graph

faulthandler.enable()  # which gives handlers a stack of their own, as Python's always ask for
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
graphs = [open_graph(Path(sys.argv[1]), "openvino") for _ in range(2)]
inputs = [torch.zeros(1, 3, 64, 64)]
wanted = graphs[0](inputs)[0]
while graphs:
    graphs.pop(0)
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
assert torch.equal(open_graph(Path(sys.argv[1]), "openvino")(inputs)[0], wanted)
"""


@pytest.mark.slow
def test_signals_are_handled_after_graphs_of_openvino_are_gone(folder):
    pytest.importorskip("openvino")
    (graph,) = export(folder, form="openvino")
    command = [sys.executable, "-c", SIGNALLED, str(folder / GRAPHS / graph.file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (result.stdout, result.returncode) == ("handled\nhandled\n", 0), result.stderr[-2000:]


def keep_a_list(folder, **changes):
    graph = {
        "format": "onnx",
        "file": "onnx/64x64.onnx",
        "kind": "classifier",
        "picture": [64, 64],
        "inputs": ["pixels"],
        "sizes": [[64, 64]],
        "image": None,
        "outputs": ["logits"],
        "any_batch": True,
        "largest_difference": 0.0,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    content = {"stepwell_graphs": 1, "weights": weights_digest(folder), "graphs": [graph]}
    graph |= {name: value for name, value in changes.items() if name in graph}
    content |= {name: value for name, value in changes.items() if name in content}
    (folder / GRAPHS).mkdir()
    (folder / GRAPHS / "graphs.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "of others"}, "graphs of other weights than lie there now"),
        ({"stepwell_graphs": 2}, "is of version 2, this stepwell reads 1: upgrade it"),
        ({"file": "../../elsewhere.onnx"}, "names a file outside of its folder"),
        ({"sizes": []}, "sizes: "),
        ({"graphs": "none"}, "graphs.json: "),
    ],
)
def test_a_list_of_graphs_that_cannot_be_trusted_is_refused(folder, changes, message):
    keep_a_list(folder, **changes)
    with pytest.raises(ValueError, match=message):
        graph_files(folder)


def test_a_list_that_names_a_missing_file_says_so(folder):
    pytest.importorskip("onnxruntime")
    keep_a_list(folder)
    with pytest.raises(ValueError, match=r"no such file: .*64x64\.onnx"):
        load_on(folder, "onnx")(torch.zeros(1, 3, 64, 64))


def test_a_folder_in_use_and_a_model_without_a_graph_are_refused(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is there already; to add graphs .*: stepwell export"):
        export(folder, tmp_path / "full", form="torch")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="a Linear has no graph to export"):
        exported(torch.nn.Linear(1, 1), (64, 64))
    with pytest.raises(ValueError, match=r"has no onnx graphs: stepwell export .* --format onnx"):
        load_on(folder, "onnx")


def test_without_its_library_a_format_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ImportError, match=r"writing onnx graphs needs onnxruntime: pip install 'stepwell\[export\]'"
    ):
        export(folder)
    with pytest.raises(ImportError, match="running onnx graphs needs onnxruntime"):
        load_on(folder, "onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--int8"], "--int8 chooses among graphs: name a --runtime too"),
        (["predict", "--runtime", "onnx", "--device", "cuda"], "graphs run on the CPU in float32"),
        (["predict", "--runtime", "onnx", "--dtype", "bfloat16"], "graphs run on the CPU in float32"),
        (["extract", "--what", "predict", "--int8"], "--int8 chooses among graphs: name a --runtime too"),
        (["extract", "--what", "predict", "--runtime", "onnx", "--device", "cuda"], "graphs run on the CPU"),
        (["export", "--size", "64"], "a size reads WIDTHxHEIGHT"),
    ],
)
def test_commands_refuse_in_a_line(folder, arguments, message, capsys):
    command, *options = arguments
    named = {"export": [str(folder)], "extract": ["a.png", "out"]}.get(command, ["a.png"])
    named += [] if command == "export" else ["--model", str(folder)]
    assert main([command, *named, *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_commands_export_and_predict_on_a_graph(folder, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pictures((64, 64))[0].save(tmp_path / "a.png")
    assert main(["export", str(folder), str(tmp_path / "out"), "--size", "64x64"]) == 0
    assert "onnx/64x64.onnx: classifier, takes 64x64 (any number at a time)" in capsys.readouterr().out
    said = []
    for options in ([], ["--runtime", "onnx"]):
        out = str(tmp_path / "out")
        assert main(["predict", str(tmp_path / "a.png"), "--model", out, "--json", *options]) == 0
        said.append(json.loads(capsys.readouterr().out)[0])
    assert [each["class_id"] for each in said[0]["classes"]] == [
        each["class_id"] for each in said[1]["classes"]
    ]


@pytest.mark.slow
def test_the_score_of_a_graph_is_kept_apart_from_that_of_pytorch(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    for i, picture in enumerate(pictures((64, 64))):
        place = tmp_path / "data" / f"LABEL_{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    export(folder)
    command = ["evaluate", str(folder), str(tmp_path / "data"), "--output", str(tmp_path / "scores")]
    assert main([*command, "--device", "cpu"]) == 0
    assert main([*command, "--runtime", "onnx"]) == 2
    assert "runtime was null and is" in capsys.readouterr().err
    command[-1] = str(tmp_path / "others")
    monkeypatch.setattr(PyramidForImageClassification, "score", None)  # whatever is said comes from the graph
    assert main([*command, "--runtime", "onnx"]) == 0
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("scores", "others")]
    assert scores[1]["settings"]["runtime"] == "onnx"
    assert scores[0]["scores"] == scores[1]["scores"]
    assert main(["evaluate", "reader_tiny", "a.jsonl", "--metric", "reading", "--runtime", "onnx"]) == 2
