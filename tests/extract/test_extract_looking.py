"""What is kept of each picture is what the model gives for it alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from extracting import BRANCH, classifier, picture

import stepwell
from stepwell.export.runtime import load_on
from stepwell.export.write import export
from stepwell.extract.columns import as_stored
from stepwell.extract.looking import Looker
from stepwell.extract.maps import maps_of
from stepwell.extract.rows import Opened
from stepwell.extract.run import Source, extract
from stepwell.extract.wanted import Wanted
from stepwell.folders import ModelError
from stepwell.images.limits import NO_LIMITS, ImageLimits
from stepwell.models.ask import Assistant
from stepwell.models.backbones import feature_maps
from stepwell.models.dense import DenseSettings
from stepwell.models.perception import PyramidBackbone, PyramidBackboneConfig
from stepwell.views.tiling import Tiles

SIZES = [(24, 20), (40, 30), (24, 20), (64, 24), (40, 30)]


@pytest.fixture(scope="module")
def reader() -> Assistant:
    assistant: Assistant = stepwell.load("reader_tiny", device="cpu", vision={"sizes": [64, 256]})
    return assistant


@pytest.fixture(scope="module")
def backbone() -> PyramidBackbone:
    return backbone_of()


def backbone_of() -> PyramidBackbone:
    torch.manual_seed(0)
    return PyramidBackbone(
        PyramidBackboneConfig(pyramid=DenseSettings(branches=(BRANCH,), merge="none"))
    ).eval()


def looked_at(model: Any, wanted: Wanted) -> list[dict[str, Any]]:
    """At pictures of SIZES, with one in their midst that could not be opened."""
    opened = [Opened(str(i), picture(i, size)) for i, size in enumerate(SIZES)]
    opened.insert(2, Opened("bad", None, "no such file"))
    batches = [*Looker(model, wanted).batches(iter(opened))]
    assert sum(bad for _, bad in batches) == 1
    rows: list[dict[str, Any]] = pa.Table.from_batches([batch for batch, _ in batches]).to_pylist()
    assert [row["id"] for row in rows] == ["0", "1", "bad", "2", "3", "4"]
    bad = rows.pop(2)
    assert {bad[name] for name in bad.keys() - {"id", "error"}} == {None}
    assert bad["error"] == "no such file"
    assert [(row["width"], row["height"], row["error"]) for row in rows] == [(*size, None) for size in SIZES]
    return rows


def array(kept: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(kept["data"], kept["dtype"]).reshape(kept["shape"])


@pytest.mark.parametrize("batch", [1, 2])
def test_predictions_are_those_of_predict(batch: int) -> None:
    model = classifier()
    rows = looked_at(model, Wanted(what="predict", batch=batch, max_detections=2))
    for i, row in enumerate(rows):
        alone = model.predict(picture(i, SIZES[i]), max_detections=2).to_dict()
        found = json.loads(row["prediction"])
        assert found["image_size"] == [SIZES[i][1], SIZES[i][0]]
        assert [one["class_id"] for one in found["classes"]] == [one["class_id"] for one in alone["classes"]]
        assert [one["score"] for one in found["classes"]] == pytest.approx(
            [one["score"] for one in alone["classes"]], abs=1e-5
        )


def test_visual_tokens_are_those_of_features(reader: Assistant) -> None:
    for i, row in enumerate(looked_at(reader, Wanted(what="tokens", batch=2))):
        alone = reader.features(picture(i, SIZES[i])).tokens
        torch.testing.assert_close(torch.tensor(array(row["tokens"])), alone, rtol=1e-4, atol=1e-4)


def test_feature_maps_are_those_of_features_view_by_view(reader: Assistant) -> None:
    for i, row in enumerate(looked_at(reader, Wanted(what="features", batch=2, store="float16"))):
        alone = reader.features(picture(i, SIZES[i])).maps
        assert len(row["maps"]) == len(alone) > 0
        for kept, one in zip(row["maps"], alone, strict=True):
            assert kept["dtype"] == "float16"
            assert (kept["name"], kept["stride"], tuple(kept["box"])) == (
                one.view.name,
                one.stride,
                one.view.box,
            )
            found = torch.tensor(array(kept)).float()
            torch.testing.assert_close(found, one.map, rtol=2e-3, atol=2e-3)


def test_answers_are_those_of_ask(reader: Assistant) -> None:
    question = "What does it say?"
    rows = looked_at(reader, Wanted(what="ask", question=question, max_new_tokens=5, batch=2))
    answers = [reader.ask(picture(i, size), question, max_new_tokens=5) for i, size in enumerate(SIZES)]
    assert [row["answer"] for row in rows] == answers


def test_maps_of_a_backbone_are_its_own_of_the_padded_picture(backbone: PyramidBackbone) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in backbone.config.settings.statistics)
    for i, row in enumerate(looked_at(backbone, Wanted(what="features", batch=3))):
        width, height = SIZES[i]
        pixels = torch.tensor(np.array(picture(i, SIZES[i]))).permute(2, 0, 1) / 255
        padded = torch.zeros(3, -(-height // 32) * 32, -(-width // 32) * 32)
        padded[:, :height, :width] = (pixels - mean) / std
        with torch.no_grad():
            maps = backbone(padded[None]).feature_maps
        assert [kept["name"] for kept in row["maps"]] == backbone.out_features
        assert [kept["stride"] for kept in row["maps"]] == [4, 8, 16, 32]
        for kept, one in zip(row["maps"], maps, strict=True):
            assert kept["box"] == [0, 0, padded.shape[2], padded.shape[1]]
            torch.testing.assert_close(torch.tensor(array(kept)), one[0], rtol=1e-4, atol=1e-4)


def test_maps_of_a_detector_are_those_that_its_head_is_given() -> None:
    detector = stepwell.load("boards_tiny", device="cpu")
    given: list[Any] = []
    head = detector.head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    image = picture(0, (30, 20))
    with torch.no_grad():
        detector.predict(image)
    head.remove()
    (maps,) = maps_of(detector, [image], batch=1)
    assert len(maps) == len(given[0])
    for one, of_head in zip(maps, given[0], strict=True):
        torch.testing.assert_close(one.map, of_head[0], rtol=1e-4, atol=1e-4)
    processor = detector.image_processor()
    whole = processor(image, return_tensors="pt")
    with torch.no_grad():
        plain = feature_maps(detector.backbone, whole["pixel_values"])
    assert [one.map.shape for one in maps] == [one.shape[1:] for one in plain]
    height, width = whole["pixel_mask"][0].any(1).sum(), whole["pixel_mask"][0].any(0).sum()
    right, bottom = maps[0].view.box[2:]
    assert right == pytest.approx(30 * whole["pixel_values"].shape[3] / int(width))
    assert bottom == pytest.approx(20 * whole["pixel_values"].shape[2] / int(height))


def test_numbers_that_do_not_fit_are_an_error_of_their_row() -> None:
    kept = as_stored(torch.arange(6.0).reshape(2, 3).T, "float16")
    assert kept["shape"] == [3, 2]
    assert array(kept).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert as_stored(torch.ones(2, dtype=torch.bfloat16), "float32")["data"] == np.ones(2, "<f4").tobytes()
    with pytest.raises(ValueError, match="up to 70000 do not fit float16; store float32"):
        as_stored(torch.tensor([1.0, -70000.0]), "float16")
    with pytest.raises(ValueError, match="no numbers"):
        as_stored(torch.tensor([1.0, torch.nan]), "float32")


def test_what_is_wrong_with_one_picture_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = classifier(), []
    predict = type(model)._predict_batch

    def fragile(self: Any, images: Any, choice: Any) -> Any:
        sizes.append(len(images))
        if any(image.width == 64 for image in images):
            raise ValueError("too wide")
        if len(images) > 3:
            raise torch.OutOfMemoryError("too many")
        return predict(self, images, choice)

    monkeypatch.setattr(type(model), "_predict_batch", fragile)
    opened = [Opened(str(i), picture(i, size)) for i, size in enumerate(SIZES)]
    ((batch, bad),) = Looker(model, Wanted(what="predict", batch=8)).batches(iter(opened))
    assert bad == 1
    assert batch.column("error").to_pylist() == [None, None, None, "too wide", None]
    assert [text is None for text in batch.column("prediction").to_pylist()] == [False] * 3 + [True, False]


def test_a_fault_of_ours_is_no_bad_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier()
    monkeypatch.setattr(type(model), "_predict_batch", lambda *_: {}["gone"])
    with pytest.raises(KeyError):
        [*Looker(model, Wanted(what="predict")).batches(iter([Opened("a", picture())]))]


def test_no_more_pictures_wait_than_a_window_or_so_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless() -> Iterator[Opened]:
        nonlocal taken
        while True:
            taken += 1
            yield Opened(str(taken), picture(0, (24, 20)))

    looker = Looker(classifier(), Wanted(what="predict", batch=2))
    batch, _ = next(looker.batches(endless()))
    assert batch.num_rows == taken == 16
    monkeypatch.setattr("stepwell.extract.looking._MOST_PIXELS", 24 * 20 * 5)
    batch, _ = next(looker.batches(endless()))
    assert batch.num_rows == 5


def test_models_that_do_not_give_it_are_refused(reader: Assistant, backbone: PyramidBackbone) -> None:
    question = {"question": "What?"}
    for model, what, words in (
        (classifier(), "ask", "gives no answers: it is a PyramidForImageClassification; take an assistant"),
        (classifier(), "tokens", "gives no visual tokens"),
        (classifier(), "features", "gives no feature maps"),
        (backbone, "predict", "gives no predictions"),
        (reader, "predict", "gives no predictions"),
    ):
        with pytest.raises(ValueError, match=f"my_model {words}"):
            Looker(model, Wanted(what=what, **(question if what == "ask" else {})), name="my_model")  # type: ignore[arg-type]


def test_settings_hang_on_what_is_wanted() -> None:
    model = classifier()
    first = Looker(model, Wanted(what="predict")).settings()
    assert Looker(model, Wanted(what="predict", batch=3)).settings() == first
    others: list[dict[str, Any]] = [
        {"threshold": 0.5},
        {"max_detections": 5},
        {"limits": ImageLimits(max_side=99)},
    ]
    assert all(Looker(model, Wanted(what="predict", **one)).settings() != first for one in others)
    first = Looker(backbone_of(), Wanted(what="features")).settings()
    assert Looker(backbone_of(), Wanted(what="features", store="float16")).settings() != first
    assert Looker(backbone_of().bfloat16(), Wanted(what="features")).settings() != first


def test_settings_are_json_also_without_limits() -> None:
    settings = Wanted(what="predict", limits=NO_LIMITS, tiles=Tiles(scale=2.0)).settings()
    assert json.loads(json.dumps(settings, allow_nan=False))["limits"]["max_seconds"] == "inf"
    assert settings["tiles"]["scale"] == 2.0
    assert Wanted(what="predict", limits=NO_LIMITS).settings()["tiles"] is None


def test_predictions_of_tiles_are_those_of_the_model() -> None:
    detector = stepwell.load("boards_tiny", device="cpu")
    board = Path(__file__).parents[2] / "examples/board_1.jpg"
    tiles = Tiles(scale=1.5)
    looker = Looker(detector, Wanted(what="predict", tiles=tiles))
    ((batch, bad),) = looker.batches(iter([Opened("board", stepwell.open_image(board))]))
    assert bad == 0
    found = json.loads(batch.to_pylist()[0]["prediction"])
    assert found == json.loads(json.dumps(detector.predict(board, tiles=tiles).to_dict()))
    assert found != json.loads(json.dumps(detector.predict(board).to_dict()))
    with pytest.raises(ValueError, match="tiles"):
        Looker(classifier(), Wanted(what="predict", tiles=tiles))


def test_settings_of_answers_hang_on_the_question(reader: Assistant) -> None:
    first = Looker(reader, Wanted(what="ask", question="What?")).settings()
    for one in ({"question": "Who?"}, {"question": "What?", "max_new_tokens": 5}):
        assert Looker(reader, Wanted(what="ask", **one)).settings() != first  # type: ignore[arg-type]
    smaller = stepwell.load("reader_tiny", device="cpu", vision={"sizes": [64, 128]})
    assert Looker(smaller, Wanted(what="ask", question="What?")).settings() != first


def test_what_is_no_fault_of_a_picture_ends_the_run() -> None:
    model = classifier()

    def gone(*_: Any) -> Any:
        raise ModelError("no such file: a graph")

    model.graph = gone
    with pytest.raises(ModelError):
        looked_at(model, Wanted(what="predict"))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_backbone_on_its_graphs_gives_the_maps_of_pytorch(
    backbone: PyramidBackbone, runtime: Any, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime" if runtime == "onnx" else runtime)
    backbone.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", form=runtime, sizes=[(20, 24), (30, 40), (24, 64)])
    on_graphs = load_on(tmp_path / "model", runtime)
    wanted = looked_at(backbone, Wanted(what="features", batch=2))
    with torch.no_grad():
        for parameter in on_graphs.parameters():
            parameter.fill_(torch.nan)  # whatever is said comes from the graph
    found = looked_at(on_graphs, Wanted(what="features", batch=2))
    for row, of_graph in zip(wanted, found, strict=True):
        for one, other in zip(row["maps"], of_graph["maps"], strict=True):
            assert [one[name] for name in ("name", "stride", "box")] == [
                other[name] for name in ("name", "stride", "box")
            ]
            np.testing.assert_allclose(array(other), array(one), rtol=1e-3, atol=1e-4)
    opened = [Opened(str(i), picture(i, size)) for i, size in enumerate([(24, 20), (90, 20)])]
    ((batch, bad),) = Looker(on_graphs, Wanted(what="features")).batches(iter(opened))
    assert bad == 1
    assert batch.to_pylist()[1]["error"].startswith("no graph was exported for a picture that the network")
    assert "runtime" not in Looker(backbone, Wanted(what="features")).settings()
    assert Looker(on_graphs, Wanted(what="features")).settings()["runtime"] == runtime


@pytest.mark.slow
def test_a_classifier_on_its_graph_predicts_and_gives_no_maps(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    classifier().save_pretrained(tmp_path / "model")
    export(tmp_path / "model")
    on_graphs = load_on(tmp_path / "model", "onnx")
    found, wanted = (
        [json.loads(row["prediction"])["classes"] for row in looked_at(model, Wanted(what="predict"))]
        for model in (on_graphs, classifier())
    )
    for one, other in zip(found, wanted, strict=True):
        assert [of_class["class_id"] for of_class in one] == [of_class["class_id"] for of_class in other]
    detector = stepwell.load("boards_tiny", device="cpu")
    detector.runtime = "onnx"
    with pytest.raises(ValueError, match="my_model gives no feature maps on onnx: its graphs end in pred"):
        Looker(detector, Wanted(what="features"), name="my_model")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"what": "ask"}, "'ask' needs a question"),
        ({"what": "ask", "question": " "}, "'ask' needs a question"),
        ({"what": "tokens", "question": "What?"}, "others take none; got 'tokens' with 'What[?]'"),
        ({"what": "tokens", "threshold": 0.5}, "threshold is for 'predict', not for 'tokens'"),
        ({"what": "features", "max_detections": 5}, "max_detections is for 'predict', not for 'features'"),
        ({"what": "predict", "store": "float16"}, "store is for 'features' and 'tokens', not for 'predict'"),
        ({"what": "tokens", "max_new_tokens": 9}, "max_new_tokens is for 'ask', not for 'tokens'"),
        ({"what": "features", "tiles": Tiles()}, "tiles is for 'predict', not for 'features'"),
        ({"what": "predict", "batch": 0}, "a batch is of 1 picture or more, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Wanted(**fields)


def test_settings_tell_other_weights_and_not_the_batch(tmp_path: Path) -> None:
    for place in ("here", "moved"):
        classifier().save_pretrained(tmp_path / place)
    model, moved = (stepwell.load(tmp_path / place, device="cpu") for place in ("here", "moved"))
    first = Looker(model, Wanted(what="predict", batch=3)).settings()
    assert Looker(moved, Wanted(what="predict")).settings() == first
    assert Looker(model, Wanted(what="predict", threshold=0.5)).settings() != first
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert Looker(model, Wanted(what="predict")).settings()["weights"] != first["weights"]


def test_two_lines_read_it_back(tmp_path: Path, reader: Assistant) -> None:
    picture(3).save(tmp_path / "a.png")
    extract(reader, Source([tmp_path / "a.png"]), tmp_path / "out", Wanted(what="tokens"), processes=0)
    alone = reader.features(picture(3)).tokens.numpy()
    frame = pandas.read_parquet(tmp_path / "out")
    kept = frame.tokens[0]
    assert np.allclose(np.frombuffer(kept["data"], kept["dtype"]).reshape(kept["shape"]), alone, atol=1e-4)
    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "out" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows[0]["tokens"]["data"] == kept["data"]
