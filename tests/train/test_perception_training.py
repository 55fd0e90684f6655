"""Tiny detectors, segmenters and classifiers, trained on drawn shapes from a recipe to a scored model."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shapes import write_coco
from tiny import BACKBONE, DINO, IMAGES, RCNN, killed_after, metrics_of, recipe_of, weights_of, write_data
from torchvision.transforms import v2
from transformers import set_seed

import stepwell
from stepwell.evaluate import perception_report
from stepwell.train import perception, results
from stepwell.train.detect import _kind, alike_order
from stepwell.train.groups import part_of
from stepwell.train.mask_planes import unpack_masks
from stepwell.train.perception import normalised, places_of
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture, train
from stepwell.train.stage_trainer import StageTrainer
from stepwell.train.tasks import find_task

pytestmark = pytest.mark.slow
TASKS = ("classify", "segment", "detect")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An entry of data by task."""
    folder = tmp_path_factory.mktemp("shapes")
    return {task: write_data(folder / task, task) for task in TASKS}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch, request):
    """Figures take longer than what they are of."""
    if "finished" in request.fixturenames:
        return
    for module in (results, perception_report):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    monkeypatch.setattr(perception, "PICTURES", 0)


def task_of(path, stage=0):
    recipe = load_recipe(path)
    return find_task(recipe.task)(recipe, recipe.stages[stage])


def trained(path, *overrides):
    """The folder of the stage."""
    return train(path, overrides).parent / "1_shapes"


# What a run leaves


@pytest.fixture(scope="module", params=TASKS)
def finished(request, data, tmp_path_factory):
    """A run with figures: task, recipe, the run's folder."""
    task, folder = request.param, tmp_path_factory.mktemp("finished")
    stage = {"validation": [data[task]], "validate_steps": 2}
    path = recipe_of(task, folder, data[task], stages=stage)
    return task, path, train(path).parent


FIGURE = {"detect": "pr_curve.png", "segment": "confusion.png", "classify": "confusion.png"}
SCORES = {
    "detect": [f"{kind}_{name}" for kind in ("boxes", "masks") for name in ("ap", "ap50", "ap75")],
    "segment": ["mean_iou", "pixel_accuracy"],
    "classify": ["top1", "top2"],
}
LOSSES = {
    "detect": ["rpn_objectness", "rpn_boxes", "classes", "boxes", "masks"],
    "segment": ["segmentation", "auxiliary"],
    "classify": ["classes"],
}


def test_a_run_leaves_its_recipe(finished):
    _, path, folder = finished
    assert load_recipe(folder / "recipe.yaml") == load_recipe(path)


def test_a_run_leaves_its_losses_and_scores(finished):
    task, _, folder = finished
    told = metrics_of(folder / "1_shapes")
    assert {name for name in told if name.startswith("eval_")} == {f"eval_{name}" for name in SCORES[task]}
    assert {name for name in told if name.startswith("loss_")} == {f"loss_{name}" for name in LOSSES[task]}
    assert len(told["loss"]) == 4
    assert all(len(told[f"eval_{name}"]) == 2 for name in SCORES[task])
    for step in range(4):
        parts = sum(told[f"loss_{name}"][step] for name in LOSSES[task])
        assert told["loss"][step] == pytest.approx(parts, abs=1e-3)


def test_a_run_leaves_figures(finished):
    task, _, folder = finished
    figures = [
        "1_shapes/results.png",
        *(f"scores/{name}" for name in (FIGURE[task], "best.png", "worst.png")),
    ]
    for name in figures:
        with Image.open(folder / name) as image:
            assert min(image.size) > 60, name


def test_a_run_leaves_scores(finished):
    task, _, folder = finished
    scores = json.loads((folder / "scores/scores.json").read_text())
    assert scores["images"] == {"classify": 8}.get(task, 4)
    told = metrics_of(folder / "1_shapes")
    first = SCORES[task][0]
    kept = scores["scores"]["boxes"]["ap"] if task == "detect" else scores["scores"][first]
    assert kept == pytest.approx(max(told[f"eval_{first}"]), abs=1e-4)
    assert str(folder / "model") in (folder / "scores/report.md").read_text()


def test_a_run_leaves_a_model(finished):
    _, _, folder = finished
    model = stepwell.load(folder / "model")
    assert model.class_names[-2:] == ("square", "disc") or model.class_names == ("disc", "square")
    ours, stage = dict(model.named_parameters()), weights_of(folder / "1_shapes/finished")
    assert {f"model.{name}" for name in ours} <= stage.keys()
    assert all(torch.equal(stage[f"model.{name}"], parameter) for name, parameter in ours.items())


def test_a_finished_model_is_scored_on_a_gpu_where_there_is_one(finished, tmp_path, monkeypatch):
    _, path, folder = finished
    task, moved = task_of(path), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(task.model_class, "to", lambda model, device: moved.append(device) or model)
    monkeypatch.setattr(perception, "score_task", lambda *_, **__: None)
    task.report(folder / "model", tmp_path)
    assert moved == ["cuda"]


def test_a_run_does_not_go_on_with_other_classes(data, tmp_path):
    folder = Path(shutil.copytree(data["classify"]["path"], tmp_path / "photos"))
    path = recipe_of("classify", tmp_path, {"kind": "image_folder", "path": str(folder)}, save_steps=2)
    killed_after(3, path)
    (folder / "disc").rename(folder / "zdisc")
    with pytest.raises(
        ValueError, match=r"1_shapes was trained with classes\.0 'disc', which is 'square' now"
    ):
        train(path)
    (folder / "zdisc").rename(folder / "disc")
    picture = next((folder / "disc").iterdir())
    picture.rename(tmp_path / picture.name)
    with pytest.raises(ValueError, match=r"1_shapes was trained with samples\.0 8, which is 7 now"):
        train(path)
    (tmp_path / picture.name).rename(picture)
    train(path)


def test_images_may_be_as_large_as_the_recipe_lets_in(tmp_path):
    """In data, in what is told of them, in scores while it learns and in those at the end."""
    for name in ("disc", "square"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (900, 4)).save(tmp_path / "photos" / name / "long.png")
    photos = {"kind": "image_folder", "path": str(tmp_path / "photos")}
    path = recipe_of("classify", tmp_path, photos, stages={"steps": 1, "validation": [photos]})
    with pytest.raises(ValueError, match=r"too large; .*image_limits in a recipe"):
        train(path, ["name=small"])
    folder = train(path, ["image_limits.max_aspect=225"])
    assert not (folder.parent / "1_shapes/bad_samples.csv").exists()
    assert json.loads((folder.parent / "scores/scores.json").read_text())["bad_images"] == []


def test_a_finished_run_is_taken_up_as_it_is(finished, monkeypatch):
    _, path, folder = finished
    before = weights_of(folder / "model")
    monkeypatch.setattr(StageTrainer, "training_step", None)  # nobody takes a step
    monkeypatch.setattr(perception, "PICTURES", 0)
    after = weights_of(train(path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_where_tensorboard_is_it_is_told(data, tmp_path, monkeypatch):
    """Trainer writes its events; a stand-in takes them here."""
    told = []

    class Writer:
        def __init__(self, log_dir=None, **_):
            told.append(str(log_dir))

        def __getattr__(self, name):
            return lambda *args, **kwargs: told.append(args[0] if args else name)

    path = recipe_of("classify", tmp_path, data["classify"], stages={"steps": 1, "trainer": {}})
    from stepwell.train import arguments

    find = arguments.find_spec
    monkeypatch.setattr(arguments, "find_spec", lambda name: name == "tensorboard" or find(name))
    from transformers import integrations

    monkeypatch.setattr(integrations.integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    trained(path)
    assert "train/loss_classes" in told
    assert any(str(tmp_path) in each for each in told)


def test_a_model_trained_anew_has_scores_of_its_own(data, tmp_path):
    """In the folder of the one before it."""
    stage = {"steps": 1, "validation": [data["classify"]]}
    path = recipe_of("classify", tmp_path, data["classify"], stages=stage)
    scores = train(path).parent / "scores"
    before = json.loads((scores / "settings.json").read_text())
    train(path, ["resume=false", "seed=7"])
    after = json.loads((scores / "settings.json").read_text())
    assert before["weights"] != after["weights"]


def test_without_validation_there_are_no_scores(data, tmp_path):
    folder = train(recipe_of("classify", tmp_path, data["classify"], stages={"steps": 1})).parent
    assert not (folder / "scores").exists()
    assert not any(name.startswith("eval") for name in metrics_of(folder / "1_shapes"))


# Stopped and resumed

CHANCES = {
    "detect": {"augment": {"kind": "jitter"}},
    "segment": {"augment": {"crop": 32}},
    "classify": {"mixup": 0.8, "cutmix": 1.0, "repeats": 2, "average": {"decay": 0.5, "use": False}},
}


@pytest.mark.parametrize(
    ("task", "workers"), [("classify", 0), ("classify", 1), ("segment", 1), ("detect", 0)]
)
def test_a_run_that_was_stopped_is_the_run_that_was_not(data, tmp_path, task, workers):
    """To the last bit, with all that happens by chance."""
    stage = {"steps": 3, **CHANCES[task]}
    paths = [
        recipe_of(task, tmp_path / name, data[task], stages=stage, save_steps=1, workers=workers)
        for name in ("whole", "killed")
    ]
    whole = trained(paths[0])
    killed_after(2, paths[1])
    assert (paths[1].parent / "runs/tiny/1_shapes/checkpoint-1/whole").is_file()
    again = trained(paths[1])
    ours, theirs = weights_of(again / "finished"), weights_of(whole / "finished")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics_of(again)["loss"] == metrics_of(whole)["loss"]


def test_samples_change_otherwise_each_time(data, tmp_path):
    """By their place in the run alone."""
    source = [mixture(task_of(recipe_of("classify", tmp_path, data["classify"])), seed=0) for _ in range(2)]
    torch.manual_seed(1)
    first = [source[0][i].sample["images"][0] for i in range(8)]
    torch.manual_seed(2)
    again = [source[1][i].sample["images"][0] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    longer = task_of(recipe_of("classify", tmp_path, data["classify"], stages={"steps": 40}))
    places = mixture(longer, seed=0).places()
    twice = [i for i, place in enumerate(places) if place == places[0]]
    samples = [mixture(longer, seed=0)[i].sample["images"][0] for i in twice[:2]]
    assert not torch.equal(*samples)


# Best, last, patience


def scored(monkeypatch, values):
    """The validations of a stage have these scores."""
    left = iter(values)
    monkeypatch.setattr(
        "stepwell.train.examination.Examination.scores", lambda self, found: {self.best: next(left)}
    )


def snapshots(monkeypatch):
    """The weights at every validation."""
    seen, scores = [], StageTrainer._scores

    def looking(self, examination):
        seen.append({name: p.detach().clone() for name, p in self.model.state_dict().items()})
        return scores(self, examination)

    monkeypatch.setattr(StageTrainer, "_scores", looking)
    return seen


@pytest.mark.parametrize(("keep", "kept"), [(None, 1), ("best", 1), ("last", 3)])
def test_the_best_weights_are_kept_or_the_last(data, tmp_path, monkeypatch, keep, kept):
    scored(monkeypatch, [0.2, 0.9, 0.9, 0.4])
    seen = snapshots(monkeypatch)
    stage = {"validation": [data["classify"]], "validate_steps": 1, "keep": keep}
    monkeypatch.setattr(perception.PerceptionTask, "report", lambda *_: None)
    folder = trained(recipe_of("classify", tmp_path, data["classify"], stages=stage))
    weights = weights_of(folder / "finished")
    assert all(torch.equal(weights[name], seen[kept][name]) for name in weights)
    if keep != "last":
        last = weights_of(folder / "last")
        assert all(torch.equal(last[name], seen[3][name]) for name in last)


@pytest.mark.parametrize(
    ("patience", "values", "validations"),
    [
        (2, [0.5, 0.4, 0.5, 0.6], 3),
        (2, [0.1, 0.0, 0.2, 0.1, 0.2], 5),
        (None, [0.5, 0.4, 0.3, 0.2, 0.1, 0], 6),
    ],
)
def test_a_stage_ends_when_its_patience_does(data, tmp_path, monkeypatch, patience, values, validations):
    scored(monkeypatch, values)
    monkeypatch.setattr(perception.PerceptionTask, "report", lambda *_: None)
    stage = {"steps": 6, "validation": [data["classify"]], "validate_steps": 1, "patience": patience}
    folder = trained(recipe_of("classify", tmp_path, data["classify"], stages=stage))
    assert len(metrics_of(folder)["eval_top1"]) == validations
    assert len(metrics_of(folder)["loss"]) == validations


@pytest.mark.parametrize(
    ("values", "rates"), [([0.5, 0.4, 0.6, 0.6], [1, 1, 0.1, 0.1]), ([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1])]
)
def test_the_rate_falls_where_the_score_rises_no_more(data, tmp_path, monkeypatch, values, rates):
    scored(monkeypatch, values)
    monkeypatch.setattr(perception.PerceptionTask, "report", lambda *_: None)
    schedule = {"name": "reduce_lr_on_plateau", "warmup_steps": 0, "arguments": {"patience": 0}}
    stage = {"validation": [data["classify"]], "validate_steps": 1, "schedule": schedule}
    folder = trained(recipe_of("classify", tmp_path, data["classify"], stages=stage))
    assert metrics_of(folder)["learning_rate"] == pytest.approx([1e-3 * rate for rate in rates])


def test_trainer_finds_the_score_by_which_it_loads_the_best(data, tmp_path, monkeypatch):
    scored(monkeypatch, [0.2, 0.9, 0.3, 0.4])
    seen = snapshots(monkeypatch)
    monkeypatch.setattr(perception.PerceptionTask, "report", lambda *_: None)
    trainer = {"report_to": "none", "load_best_model_at_end": True}
    stage = {"validation": [data["classify"]], "validate_steps": 1, "trainer": trainer}
    path = recipe_of("classify", tmp_path, data["classify"], stages=stage, save_steps=1)
    last = weights_of(trained(path) / "last")
    assert all(torch.equal(last[name], seen[1][name]) for name in last)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        ({"name": "warmup_stable_decay"}, "of warmup_stable_decay: .*num_decay_steps"),
        ({"name": "polynomial", "arguments": {"powr": 2}}, "of polynomial: .*powr"),
    ],
)
def test_arguments_that_a_schedule_has_not_are_told_in_a_line(data, tmp_path, schedule, complaint):
    path = recipe_of("classify", tmp_path, data["classify"], stages={"schedule": schedule})
    with pytest.raises(ValueError, match=rf"^stages\.shapes\.schedule\.arguments, {complaint}") as told:
        train(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("has_head", "has_data"), [(False, True), (True, False)])
def test_masks_that_nothing_scores_are_refused_before_a_step(data, tmp_path, has_head, has_data):
    validation = data["detect"] if has_data else spoilt(tmp_path, unmasked=(2,))
    stage = {"validation": [validation], "best_by": "masks_ap"}
    path = recipe_of("detect", tmp_path, data["detect"], stages=stage, head=RCNN | {"masks": has_head})
    with pytest.raises(ValueError, match=r"^stages\.shapes\.best_by: masks_ap needs a head with masks, and"):
        task_of(path)


@pytest.mark.parametrize(("count", "enough"), [(4, False), (5, True)])
def test_the_best_five_ask_for_five_classes(data, tmp_path, count, enough):
    for number in range(count):
        folder = tmp_path / "photos" / f"class_{number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    photos = {"kind": "image_folder", "path": str(tmp_path / "photos")}
    stage = {"validation": [photos], "best_by": "top5"}
    path = recipe_of("classify", tmp_path, photos, stages=stage)
    with (
        nullcontext()
        if enough
        else pytest.raises(ValueError, match=rf"^stages\.shapes\.best_by: top5 .*more, here are {count}$")
    ):
        task_of(path)


def test_a_binary_loss_smooths_no_labels_and_says_so(data, tmp_path):
    stage = {"loss": "binary", "label_smoothing": 0.1}
    path = recipe_of("classify", tmp_path, data["classify"], stages=stage)
    with pytest.raises(ValueError, match="label_smoothing is of the loss cross_entropy; with loss: binary"):
        task_of(path)


# What learns, and where it starts


def changed_parts(path):
    """Parts whose weights one step changes."""
    task, settings = task_of(path), load_recipe(path)
    trainer = StageTrainer(task.build(), task, settings, mixture(task, seed=0), path.parent / "out", seed=0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    parts = task.parts(trainer.model)
    moved = {
        part_of(name, parts)
        for name, p in trainer.model.named_parameters()
        if not torch.equal(before[name], p)
    }
    places = ("vision.branches.0", "vision.branches.1", "vision.interactions", "vision.merges", "head")
    return {place for place in places if any(name.startswith(f"{place}.") for name in moved)}


def test_parts_may_be_frozen(data, tmp_path):
    stage = {"steps": 1, "optimiser": {"name": "sgd", "lr": 0.5}}

    def moved(name, **changes):
        return changed_parts(recipe_of("segment", tmp_path / name, data["segment"], stages=stage | changes))

    everything = moved("all")
    assert everything >= {"vision.branches.0", "vision.branches.1", "vision.merges", "head"}
    frozen = ["vision.branches.0", "vision.merges"]
    assert moved("some", freeze=frozen) == everything - {*frozen}
    assert moved("only", train=["head", "vision.branches"], freeze=["vision.branches.1"]) == {
        "head",
        "vision.branches.0",
    }


def test_norms_of_frozen_parts_keep_their_statistics(data, tmp_path):
    finished = {}
    for name, freeze in (("all", []), ("some", ["head"])):
        stage = {"steps": 2, "freeze": freeze}
        folder = trained(recipe_of("segment", tmp_path / name, data["segment"], stages=stage))
        finished[name] = weights_of(folder / "finished")
    means = [key for key in finished["all"] if key.endswith("running_mean")]
    assert means
    for key in means:
        assert not finished["some"][key].any(), key
        assert finished["all"][key].any(), key


def test_another_backbone_than_a_pyramid_is_a_part(data, tmp_path):
    backbone = {
        "model_type": "resnet",
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "embedding_size": 8,
    }
    backbone |= {"layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    model = {"backbone": backbone, "head": RCNN, "images": IMAGES["detect"]}
    stage = {"steps": 1, "freeze": ["backbone"], "optimiser": {"lr": 1.0e-2}}
    path = recipe_of("detect", tmp_path, data["detect"], model=model, stages=stage)
    folder = trained(path)
    task = task_of(path)
    assert task.learning == ["backbone", "head"]
    kept = weights_of(folder / "finished")
    set_seed(load_recipe(path).seed)
    fresh = task.build().state_dict()
    moved = {name.split(".")[1] for name in kept if not torch.equal(kept[name], fresh[name])}
    assert moved == {"head"}


def test_a_part_that_is_nowhere_cannot_be_frozen(data, tmp_path):
    with pytest.raises(ValueError, match="no part of the model is called 'neck'"):
        train(recipe_of("classify", tmp_path, data["classify"], stages={"freeze": ["neck"]}))


@pytest.fixture(scope="module")
def detector(data, tmp_path_factory):
    """A trained detector of squares and discs."""
    folder = tmp_path_factory.mktemp("detector")
    return train(recipe_of("detect", folder, data["detect"], stages={"steps": 1}))


def coco_of(folder, classes, images=2):
    """Shapes whose classes are called so."""
    path = write_coco(folder, images=images, sizes=((32, 48),))
    file = json.loads(path.read_text())
    file["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    path.write_text(json.dumps(file))
    return {"kind": "coco", "annotations": str(path)}


def same(tensor, other):
    return tensor.shape == other.shape and torch.equal(tensor, other)


OF_CLASSES = [
    (layer, kind) for layer in ("box.classes", "box.deltas", "mask.logits") for kind in ("weight", "bias")
]


@pytest.mark.parametrize("classes", [("cube", "ball", "cone"), ("cube", "ball")])
def test_a_start_with_other_classes(detector, tmp_path, capsys, classes):
    """Whether or not there are as many of them."""
    path = recipe_of("detect", tmp_path, coco_of(tmp_path, classes), model={"start": str(detector)})
    torch.manual_seed(0)
    model = task_of(path).build().model
    told = (
        f"knows 2 classes, which are not the {len(classes)} of the data: the layers that tell classes start "
    )
    assert f"{told}anew" in capsys.readouterr().out
    assert model.class_names == classes
    before, after = weights_of(detector), model.state_dict()
    other = {name for name in after if not same(before[name], after[name])}
    assert other == {f"head.{layer}.{kind}" for layer, kind in OF_CLASSES}
    for name in other:
        if name.endswith("weight"):
            start = {"classes": 0.01, "deltas": 0.001, "logits": (2 / len(classes)) ** 0.5}[
                name.split(".")[-2]
            ]
            assert float(after[name].std()) == pytest.approx(start, rel=0.3), name
        else:
            assert not after[name].any()


def test_a_start_with_its_own_classes_is_taken_over_whole(detector, data, tmp_path, capsys):
    path = recipe_of("detect", tmp_path, data["detect"], model={"start": str(detector)})
    model = task_of(path).build().model
    assert "start anew" not in capsys.readouterr().out
    before = weights_of(detector)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_start_with_its_own_classes_in_another_order_is_taken_over_whole(detector, tmp_path, capsys):
    entry = coco_of(tmp_path, ("disc", "square"))
    task = task_of(recipe_of("detect", tmp_path, entry, model={"start": str(detector)}))
    model = task.build().model
    assert "start anew" not in capsys.readouterr().out
    assert model.class_names == ("square", "disc")
    assert task.source(task.stage.data[0])[0][1] == [1, 0]
    before = weights_of(detector)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_start_may_see_larger_images(detector, data, tmp_path):
    model = {"start": str(detector), "images": {"long_limit": 80}}
    task = task_of(recipe_of("detect", tmp_path, data["detect"], model=model))
    assert task.config.image_settings.long_limit == 80
    assert task.config.image_settings.short_limit == IMAGES["detect"]["short_limit"]
    size = task.augment(task.sample(task.source(task.stage.data[0])[0][0], [0, 1]))["image"].shape
    assert tuple(size) != (3, 48, 48)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (
            {"start": "{detector}", "head": {"dim": 8}},
            "start is a whole model; head beside it would be ignored",
        ),
        ({"start": "{detector}", "revision": "main"}, "model.revision is of a name on the hub"),
        ({"revision": "main", "backbone": {}}, "revision is of a start on the hub"),
        ({}, "give start, published or backbone"),
        ({"published": "nothing"}, "model.published: nothing is not published; `stepwell list`"),
        ({"published": "piip_seg_h6b_512_512"}, "is of segmentation, not of detection"),
        ({"backbone": {"branchs": []}}, "model.backbone: branchs"),
    ],
)
def test_models_that_make_no_sense(detector, data, tmp_path, model, complaint):
    model = {k: v.format(detector=detector) if isinstance(v, str) else v for k, v in model.items()}
    with pytest.raises(ValueError, match=complaint) as told:
        train(recipe_of("detect", tmp_path, data["detect"], model=model))
    assert "\n" not in str(told.value)


def test_a_start_of_another_kind_is_refused(detector, data, tmp_path):
    path = recipe_of("segment", tmp_path, data["segment"], model={"start": str(detector)})
    with pytest.raises(
        ValueError, match="holds a 'stepwell_detector' model, and this task trains 'stepwell_seg"
    ):
        train(path)


def test_parts_start_from_weights(detector, data, tmp_path, capsys):
    model = {
        "backbone": BACKBONE,
        "head": RCNN,
        "images": IMAGES["detect"],
        "parts": {"vision.branches.0": str(detector), "vision.branches.1": None},
    }
    model = task_of(recipe_of("detect", tmp_path, data["detect"], model=model)).build().model
    assert "vision.branches.0 from" in capsys.readouterr().out
    before, after = weights_of(detector), model.state_dict()
    names = [name for name in before if ".blocks.0.mlp.fc1.weight" in name]
    assert [torch.equal(before[name], after[name]) for name in sorted(names)] == [True, False]


STILL = {"name": "sgd", "lr": 1e-30}


def test_a_second_stage_goes_on_with_the_weights_of_the_first(data, tmp_path):
    stages = [{"name": "shapes", "steps": 1}, {"name": "more", "steps": 1, "optimiser": STILL}]
    folder = train(recipe_of("classify", tmp_path, data["classify"], stages=stages)).parent
    first, second = (weights_of(folder / name / "finished") for name in ("1_shapes", "2_more"))
    for name, weights in first.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(second[name], weights, rtol=0, atol=1e-20, msg=name)


# Data


def test_a_class_that_the_model_lacks_is_named(data, tmp_path):
    model = {"backbone": BACKBONE | {"head": "merge"}, "classes": ["square", "cone"]}
    with pytest.raises(
        ValueError, match=r"^the data have a class 'disc', which is none of the model's: square, cone$"
    ):
        train(recipe_of("classify", tmp_path, data["classify"], model=model))


def test_classes_of_one_name_are_refused(tmp_path):
    """One would be learned as the other."""
    with pytest.raises(ValueError, match=r"^two classes are called 'thing', and classes are told by their"):
        train(recipe_of("detect", tmp_path, coco_of(tmp_path, ("thing", "thing"))))
    with pytest.raises(ValueError, match="two classes are called 'a'"):
        places_of(("a",), ("a", "b", "a"))


def test_data_without_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the data name no classes"):
        train(recipe_of("detect", tmp_path, coco_of(tmp_path, ())))


def test_one_class_is_nothing_to_tell_apart_but_by_a_detector(data, tmp_path):
    """Their loss would be 0 from the first step on."""
    model = {"backbone": BACKBONE | {"head": "merge"}, "classes": ["square"]}
    with pytest.raises(ValueError, match=r"^a model of the one class 'square' would have nothing to tell it"):
        task_of(recipe_of("classify", tmp_path / "a", data["classify"], model=model))
    with pytest.raises(ValueError, match=r"^a model of the one class 'ground'"):
        task_of(recipe_of("segment", tmp_path / "b", data["segment"] | {"classes": ["ground"]}))
    assert task_of(recipe_of("detect", tmp_path / "c", coco_of(tmp_path, ("shape",)))).classes == ("shape",)


def test_data_are_read_anew_by_another_training(tmp_path):
    names = []
    for classes in (("a", "b"), ("c", "d")):
        names.append(task_of(recipe_of("detect", tmp_path, coco_of(tmp_path, classes))).classes)
    assert names == [("a", "b"), ("c", "d")]


def test_classes_keep_the_order_of_the_model(data, tmp_path):
    model = {"backbone": BACKBONE | {"head": "merge"}, "classes": ["square", "cone", "disc"]}
    task = task_of(recipe_of("classify", tmp_path, data["classify"], model=model))
    source = task.source(task.stage.data[0])
    labels = {
        source.source[i].image.parent.name: task.prepare(source[i])["label"] for i in range(len(source))
    }
    assert labels == {"disc": 2, "square": 0}
    assert places_of(("b", "a"), ("a", "b")) == [1, 0]


def spoilt(folder, *, missing=(), unmasked=()):
    """A COCO file of four images, of which some are not there, and some have objects without masks."""
    path = write_coco(folder, images=4, sizes=((32, 48), (48, 32)))
    file = json.loads(path.read_text())
    for each in file["annotations"]:
        if each["image_id"] in unmasked:
            del each["segmentation"]
    path.write_text(json.dumps(file))
    for i in missing:
        (folder / "images" / f"0_{i}.png").unlink()
    return {"kind": "coco", "annotations": str(path)}


def test_bad_samples_are_skipped_and_told(tmp_path, caplog):
    data = spoilt(tmp_path, missing=(1,), unmasked=(2,))
    with caplog.at_level(logging.WARNING):
        folder = trained(recipe_of("detect", tmp_path, data, stages={"steps": 3}))
    text = (folder / "bad_samples.csv").read_text()
    assert "0_1.png" in text
    assert "an object of it has no mask; a head that learns none has model.head.masks: false" in text
    assert "2 bad samples were left out" in caplog.text
    assert all(np.isfinite(metrics_of(folder)["loss"]))


def test_a_head_without_masks_asks_for_none(tmp_path):
    data = spoilt(tmp_path, unmasked=(0, 1, 2, 3))
    head = {**RCNN, "masks": False}
    folder = trained(recipe_of("detect", tmp_path, data, head=head, stages={"steps": 1}))
    assert not (folder / "bad_samples.csv").exists()
    assert "loss_masks" not in metrics_of(folder)


@pytest.mark.parametrize("spoil", [{"missing": (1,)}, {"unmasked": (1,)}], ids=["missing", "unmasked"])
def test_bad_samples_may_be_refused(tmp_path, spoil):
    path = recipe_of("detect", tmp_path, spoilt(tmp_path, **spoil), bad_samples="refuse")
    with pytest.raises(ValueError, match="mend it, take it out, or say bad_samples: skip"):
        train(path)


def test_bad_images_of_the_validation_data_are_told_and_not_scored(data, tmp_path):
    bad = spoilt(tmp_path, missing=(1,))
    stage = {"steps": 1, "validation": [bad]}
    folder = trained(recipe_of("detect", tmp_path, data["detect"], stages=stage))
    assert (folder / "bad_samples.csv").read_text().count("0_1.png") >= 1
    assert len(metrics_of(folder)["eval_boxes_ap"]) == 1
    (row,) = json.loads((folder.parent / "scores/scores.json").read_text())["bad_images"]
    assert "0_1.png" in row["reason"]


@pytest.mark.parametrize("empty_images", [True, False])
def test_data_without_an_object_are_refused_with_the_reason(tmp_path, empty_images):
    path = write_coco(tmp_path, images=2)
    file = json.loads(path.read_text())
    for each in file["annotations"]:
        each["image_id"] = str(each["image_id"])
    path.write_text(json.dumps(file))
    data = {"kind": "coco", "annotations": str(path)}
    refusal = rf"{path.name} has nothing to be learnt from; left out are .* the first is .*'0' is of no image"
    with pytest.raises(ValueError, match=refusal):
        train(recipe_of("detect", tmp_path, data, stages={"empty_images": empty_images}))
    path.write_text(json.dumps({**file, "annotations": []}))
    with pytest.raises(ValueError, match="nothing to be learnt from: no image has an object"):
        train(recipe_of("detect", tmp_path, data, stages={"empty_images": empty_images}))


def test_images_without_objects_may_be_left_out(tmp_path):
    path = write_coco(tmp_path, images=4)
    file = json.loads(path.read_text())
    file["annotations"] = [each for each in file["annotations"] if each["image_id"] in (0, 3)]
    file["annotations"][-1]["iscrowd"] = file["annotations"][-2]["iscrowd"] = 1  # those of image 3
    path.write_text(json.dumps(file))
    data = {"kind": "coco", "annotations": str(path)}
    for empty, count in ((True, 4), (False, 1)):
        task = task_of(recipe_of("detect", tmp_path, data, stages={"empty_images": empty}))
        source = task.source(task.stage.data[0])
        assert len(source) == count
    assert source[0][0].path.name == "0_0.png"
    assert source.where(0) == task.stage.data[0].open().where(0)
    crowds = task.sample(task.stage.data[0].open()[3], [0, 1])
    assert len(crowds["boxes"]) == len(crowds["masks"]) == len(crowds["labels"]) == 0


def test_a_selection_of_images_names_each(tmp_path):
    path = write_coco(tmp_path, images=3)
    file = json.loads(path.read_text())
    file["annotations"] = [each for each in file["annotations"] if each["image_id"] != 0]
    path.write_text(json.dumps(file))
    data = {"kind": "coco", "annotations": str(path)}
    task = task_of(recipe_of("detect", tmp_path, data, stages={"empty_images": False}))
    source, whole = task.source(task.stage.data[0]), task.stage.data[0].open()
    assert [source.where(i) for i in range(2)] == [whole.where(1), whole.where(2)]
    assert source[1][0].path == whole[2].path


# Detectors


def test_batches_are_of_wide_or_of_high_images():
    wide = [True, False, True, True, False, True, False, True]
    assert alike_order(wide, 2) == [0, 2, 1, 4, 3, 5, 7, 6]
    assert sorted(alike_order(wide, 3)) == list(range(8))
    assert alike_order(wide, 3)[:6] == [0, 2, 3, 1, 4, 6]


@pytest.mark.parametrize(("alike", "batch"), [(True, 2), (False, 2), (True, 1)])
def test_a_stage_groups_images_by_how_they_lie(data, tmp_path, alike, batch):
    stage = {"steps": 8, "alike": alike, "batch": batch, "augment": {"kind": "fixed"}}
    task = task_of(recipe_of("detect", tmp_path, data["detect"], stages=stage))
    samples = mixture(task, seed=0)
    order = task.order(samples, batches=1, seed=0)
    if not alike or batch == 1:
        assert order is None
        return
    assert sorted(order) == list(range(16))
    for start in range(0, 14, 2):
        shapes = [samples[i].sample["image"].shape for i in order[start : start + 2]]
        assert shapes[0] == shapes[1]
    assert order != list(range(16))


def test_even_batches_are_not_made_anew(data, tmp_path):
    weighed = {**data["detect"], "weight": 1}
    stage = {"steps": 8, "even": True, "batch": 2}
    with pytest.raises(ValueError, match="even batches would be made anew by alike: add alike: false"):
        task_of(recipe_of("detect", tmp_path, weighed, stages=stage))
    task_of(recipe_of("detect", tmp_path, weighed, stages=stage | {"alike": False}))


def test_a_batch_of_a_detector(data, tmp_path):
    stage = {"augment": {"kind": "fixed", "flip": 0}}
    task = task_of(recipe_of("detect", tmp_path, data["detect"], stages=stage))
    source = task.source(task.stage.data[0])
    samples = [task.prepare(source[i]) for i in (0, 1)]
    batch = task.collate(samples)
    assert batch["pixel_values"].shape == (2, 3, 48, 48)  # 32 x 48 and 48 x 32
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [32 * 48, 48 * 32]
    assert batch["pixel_mask"][0, :32].all()
    assert not batch["pixel_mask"][0, 32:].any()
    assert not batch["pixel_values"][0, :, 32:].any()
    for i, labels in enumerate(batch["labels"]):
        things, (height, width) = source.source[i].annotations, source.source[i].size
        boxes = torch.tensor([thing.box for thing in things], dtype=torch.float32)
        expected = torch.stack(
            [
                (boxes[:, 0] + boxes[:, 2]) / 2 / width,
                (boxes[:, 1] + boxes[:, 3]) / 2 / height,
                (boxes[:, 2] - boxes[:, 0]) / width,
                (boxes[:, 3] - boxes[:, 1]) / height,
            ],
            1,
        )
        torch.testing.assert_close(labels["boxes"], expected)
        assert labels["class_labels"].tolist() == [thing.label for thing in things]
        masks = unpack_masks(labels["masks"], len(things))
        assert torch.equal(masks, torch.stack([torch.from_numpy(thing.mask.pixels()) for thing in things]))
    assert task.counts(batch) == dict.fromkeys(LOSSES["detect"], 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rpn_boxes", "rpn_boxes"),
        ("rpn_objectness", "rpn_objectness"),
        ("classes", "classes"),
        ("classes_2", "classes"),
        ("masks_0", "masks"),
        ("denoising0_box", "box"),
        ("proposals_giou", "giou"),
        ("layer3_class", "class"),
    ],
)
def test_losses_are_told_by_what_they_are_of(name, kind):
    assert _kind(name) == kind


def test_losses_of_all_layers_of_dino_are_added_up(data, tmp_path):
    task = task_of(recipe_of("detect", tmp_path, data["detect"], head=DINO))
    assert list(task.losses) == ["class", "box", "giou"]
    module = task.build()
    samples = mixture(task, seed=0)
    batch = task.collate([samples[i].sample for i in range(2)])
    torch.manual_seed(0)
    losses = module(**batch)
    torch.manual_seed(0)
    whole = module.model(**batch)
    assert set(losses) == {"class", "box", "giou"}
    torch.testing.assert_close(sum(losses.values()), whole.loss)
    assert len(whole.losses) > 6


def test_losses_have_weights(data, tmp_path):
    logged = {}
    for name, losses in (("plain", {}), ("weighed", {"auxiliary": 0.25, "segmentation": 2.0})):
        path = recipe_of("segment", tmp_path / name, data["segment"], stages={"steps": 1, "losses": losses})
        logged[name] = metrics_of(trained(path))
    plain, weighed = logged["plain"], logged["weighed"]
    assert weighed["loss_auxiliary"] == plain["loss_auxiliary"]
    assert plain["loss"][0] == pytest.approx(
        plain["loss_auxiliary"][0] + plain["loss_segmentation"][0], abs=1e-3
    )
    expected = 0.25 * plain["loss_auxiliary"][0] + 2 * plain["loss_segmentation"][0]
    assert weighed["loss"][0] == pytest.approx(expected, abs=1e-3)


def test_an_unknown_loss_is_refused(data, tmp_path):
    path = recipe_of("segment", tmp_path, data["segment"], stages={"losses": {"masks": 1.0}})
    with pytest.raises(
        ValueError, match=r"stages\.shapes\.losses: there is no 'masks'; there are segmentation, aux"
    ):
        train(path)


def test_geometry_of_assistants_is_refused(data, tmp_path):
    path = recipe_of("segment", tmp_path, data["segment"], stages={"vision": {"sizes": [32, 64]}})
    with pytest.raises(ValueError, match=r"sizes of images are model\.images and augment"):
        train(path)


# Segmenters


def test_a_batch_of_a_segmenter_is_padded_to_the_crop(data, tmp_path):
    stage = {"augment": {"crop": 64, "scale": [0.5, 0.5], "flip": 0, "colour": False}}
    task = task_of(recipe_of("segment", tmp_path, data["segment"], stages=stage))
    source = task.source(task.stage.data[0])
    batch = task.collate([task.prepare(source[0])])
    assert batch["pixel_values"].shape == (1, 3, 64, 64)
    assert batch["labels"].shape == (1, 64, 64)
    assert not batch["pixel_values"][0, :, 24:].any()
    assert not batch["pixel_values"][0, :, :, 32:].any()
    assert (batch["labels"][0, 24:] == 255).all()
    assert (batch["labels"][0, :, 32:] == 255).all()
    assert (batch["labels"][0, :24, :32] < 3).all()
    of_all = task.config.head_settings.loss_mean == "all_pixels"
    assert {int(n) for n in task.counts(batch).values()} == {64 * 64 if of_all else 24 * 32}


@pytest.mark.parametrize(("mean", "count"), [("all_pixels", 48 * 64), ("kept_pixels", 40 * 64)])
def test_losses_of_a_segmenter_are_means_over_what_its_head_says(data, tmp_path, mean, count):
    head = {"kind": "upernet", "channels": 8, "auxiliary_channels": 8, "pool_sizes": [1], "loss_mean": mean}
    task = task_of(recipe_of("segment", tmp_path, data["segment"], head=head))
    labels = torch.zeros(1, 48, 64, dtype=torch.int64)
    labels[:, :8] = 255
    assert {int(n) for n in task.counts({"labels": labels}).values()} == {count}


def test_labels_of_other_orders_are_those_of_the_model(data, tmp_path):
    model = {
        "backbone": BACKBONE,
        "head": {"kind": "upernet", "channels": 8, "auxiliary_map": None, "pool_sizes": [1]},
        "images": IMAGES["segment"],
        "classes": ["disc", "square", "ground"],
    }
    task = task_of(recipe_of("segment", tmp_path, data["segment"], model=model))
    assert list(task.losses) == ["segmentation"]
    source = task.source(task.stage.data[0])
    pixels, classes = source[0]
    pixels.labels[:4] = 255
    labels = task.sample(pixels, classes)["labels"]
    for old, new in ((0, 2), (1, 1), (2, 0), (255, 255)):
        assert torch.equal(torch.from_numpy(pixels.labels == old), labels == new)


@pytest.mark.parametrize(("window", "augment", "side"), [(48, {}, 48), (0, {}, 56), (48, {"crop": 40}, 40)])
def test_crops_are_as_large_as_the_window(data, tmp_path, window, augment, side):
    model = {
        "backbone": BACKBONE,
        "head": {"kind": "upernet", "channels": 8, "auxiliary_channels": 8, "pool_sizes": [1]},
        "images": {"short_side": 56, "window": window, "stride": 32},
    }
    stage = {"augment": augment}
    assert task_of(recipe_of("segment", tmp_path, data["segment"], model=model, stages=stage)).crop == side


# Classifiers


def samples_of(task, count, seed=0):
    source = task.source(task.stage.data[0])
    torch.manual_seed(seed)
    return [task.prepare(source[i]) for i in range(count)]


def classifier(data, tmp_path, **stage):
    return task_of(recipe_of("classify", tmp_path, data["classify"], stages=stage))


def test_a_batch_without_mixing(data, tmp_path):
    task = classifier(data, tmp_path, repeats=3)
    samples = samples_of(task, 2)
    batch = task.collate(samples)
    assert batch["pixel_values"].shape == (6, 3, 48, 48)
    for k in range(3):
        for i in range(2):
            assert torch.equal(batch["pixel_values"][2 * k + i], samples[i]["images"][k])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert batch["shares"].tolist() == [F.one_hot(torch.tensor(s["label"]), 2).tolist() for s in samples] * 3
    assert task.counts(batch) == {"classes": 6}


def test_mixup_by_hand(data, tmp_path):
    """One share in all of a batch, each image with the one before it."""
    task = classifier(data, tmp_path, mixup=0.8)
    samples = samples_of(task, 8)
    batch = task.collate(samples)
    images, labels = (
        torch.stack([s["images"][0] for s in samples]),
        torch.tensor([s["label"] for s in samples]),
    )
    targets = F.one_hot(labels, 2).float()
    before = images.roll(1, 0), targets.roll(1, 0)
    i = next(i for i in range(8) if not torch.equal(targets[i], before[1][i]))  # of two classes
    share = float(batch["shares"][i, int(labels[i])])
    assert 0 < share < 1
    torch.testing.assert_close(batch["shares"], share * targets + (1 - share) * before[1])
    torch.testing.assert_close(batch["pixel_values"], share * images + (1 - share) * before[0])


def test_cutmix_by_hand(data, tmp_path):
    """A box of the one before lies in each; classes have the share of their pixels."""
    task = classifier(data, tmp_path, cutmix=1.0)
    samples = samples_of(task, 8, seed=3)
    batch = task.collate(samples)
    images = torch.stack([s["images"][0] for s in samples])
    labels = torch.tensor([s["label"] for s in samples])
    targets = F.one_hot(labels, 2).float()
    ours = (batch["pixel_values"] == images).all(1)
    theirs = (batch["pixel_values"] == images.roll(1, 0)).all(1)
    assert (ours | theirs).all()
    other = (~ours).any(0)
    share = 1 - float(other.float().mean())
    assert 0 < share < 1
    torch.testing.assert_close(batch["shares"], share * targets + (1 - share) * targets.roll(1, 0))


def test_one_of_both_by_even_chance(data, tmp_path):
    task = classifier(data, tmp_path, mixup=0.8, cutmix=1.0)
    assert [type(kind) for kind in task.mix.transforms] == [v2.MixUp, v2.CutMix]
    assert [kind.alpha for kind in task.mix.transforms] == [0.8, 1.0]
    assert task.mix.p == [0.5, 0.5]
    assert classifier(data, tmp_path, mixup=0.0, cutmix=0.0).mix is None


def test_what_a_batch_does_hangs_on_its_first_sample_alone(data, tmp_path):
    task = classifier(data, tmp_path, mixup=0.8, cutmix=1.0)
    samples = samples_of(task, 4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = task.collate(samples)
    assert torch.equal(torch.rand(3), expected)  # and changes no other chances
    torch.manual_seed(6)
    assert torch.equal(task.collate(samples)["pixel_values"], first["pixel_values"])
    other = task.collate([{**samples[0], "seed": samples[0]["seed"] + 1}, *samples[1:]])
    assert not torch.equal(other["pixel_values"], first["pixel_values"])


class _Logits(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits)


LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SHARES = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_shares(data, tmp_path, smoothing):
    module = classifier(data, tmp_path, label_smoothing=smoothing).build()
    module.model = _Logits(LOGITS)
    targets = SHARES * (1 - smoothing) + smoothing / 3
    expected = -(targets * LOGITS.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(module(pixel_values=None, shares=SHARES)["classes"], expected)


def test_the_binary_loss_asks_for_each_class_whether_any_is_there(data, tmp_path):
    module = classifier(data, tmp_path, loss="binary").build()
    module.model = _Logits(LOGITS)
    there = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    p = LOGITS.sigmoid()
    expected = -(there * p.log() + (1 - there) * (1 - p).log()).mean()
    torch.testing.assert_close(module(pixel_values=None, shares=SHARES)["classes"], expected)


@pytest.mark.parametrize("field", ["head", "images"])
def test_what_a_classifier_has_not_is_refused(data, tmp_path, field):
    model = {"backbone": BACKBONE | {"head": "merge"}, field: {"dim": 8}}
    with pytest.raises(ValueError, match=f"model.{field}: a classifier's is said in model.backbone"):
        train(recipe_of("classify", tmp_path, data["classify"], model=model))


def test_images_are_upright_and_normalised(tmp_path):
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    task = task_of(recipe_of("classify", tmp_path, write_data(tmp_path / "shapes", "classify")))
    pixels = task.opened(tmp_path / "turned.png")
    assert pixels.shape == (3, 4, 2)
    processor = SimpleNamespace(image_mean=[0.5, 0.2, 0.1], image_std=[0.5, 0.1, 0.2])
    values = normalised(pixels, processor)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([1.0, -2.0, 0.5]))
