"""Two processes that train a detector, a segmenter and a classifier together do what one does; so do batches
that are accumulated."""

from __future__ import annotations

import json

import pytest
import torch
from shapes import write_coco
from tiny import DINO, RCNN, UPERNET, metrics_of, recipe_of, weights_of, write_data
from two_processes import run_in_two

from stepwell.train import perception, results
from stepwell.train.run import train

FIRST = {"choice": "first"}
RPN = {
    **RCNN["rpn"],
    "sampling": {"num": 16, **FIRST},
    "training": {"per_level": 200, "num": 200},
}
HEADS = {
    "rcnn": {**RCNN, "masks": False, "rpn": RPN, "sampling": {"num": 8, **FIRST}},
    "dino": {**DINO, "denoising": {"num_queries": 4, "label_noise": 0.0, "box_noise": 0.0}},
    "upernet": {**UPERNET, "dropout": 0.0},
    None: None,
}
KINDS = {"rcnn": "detect", "dino": "detect", "upernet": "segment", None: "classify"}
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}

SCRIPT = """
import json
import sys
from stepwell.train import perception, results
from stepwell.train.run import train

perception.PICTURES = 0
results.can_draw = lambda: False
for recipe in json.loads(sys.argv[1]):
    train(recipe)
"""


def recipes(folder, data, **stage):
    """A recipe of each kind without chances but the order of its samples, which all of these share."""
    for head, task in KINDS.items():
        augment = {
            "detect": {"kind": "fixed", "flip": 0},
            "segment": {"crop": 48, "scale": [1, 1], "flip": 0, "colour": False},
            "classify": {"kind": "deit", "area": [1, 1], "ratio": [1, 1], "flip": 0, "changes": 0},
        }[task]
        changes = {
            "steps": 2,
            "augment": augment,
            "validation": [data[task]],
            "optimiser": {"name": "sgd", "lr": 0.02, "max_grad_norm": 0.0},
            **({"alike": False} if task == "detect" else {}),
            **stage,
        }
        yield recipe_of(task, folder / str(head), data[task], head=HEADS[head], stages=changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    squares = write_coco(folder / "detect", images=4, sizes=((48, 48),))  # padded to one size in any batch
    return {
        "detect": {"kind": "coco", "annotations": str(squares)},
        "segment": write_data(folder / "segment", "segment"),
        "classify": write_data(folder / "classify", "classify"),
    }


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Stage folders of one process with batches of 4."""
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch)
        paths = recipes(tmp_path_factory.mktemp("alone"), data, batch=4)
        return [train(path).parent / "1_shapes" for path in paths]


def quiet(patch):
    patch.setattr(results, "can_draw", lambda: False)
    patch.setattr(perception, "PICTURES", 0)


def same_training(one, other):
    ours, theirs = weights_of(one / "last"), weights_of(other / "last")
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, **TOLERANCE, msg=f"{other} {name}")


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(alone, data, tmp_path):
    """Batch norms are those of both."""
    paths = [str(path) for path in recipes(tmp_path, data, batch=2)]
    run_in_two(SCRIPT, tmp_path, json.dumps(paths))
    for head, one in zip(KINDS, alone, strict=True):
        two = tmp_path / str(head) / "runs/tiny/1_shapes"
        same_training(two, one)
        ours, theirs = metrics_of(two), metrics_of(one)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        for name, values in theirs.items():
            if name.startswith("eval_"):
                assert ours[name] == pytest.approx(values, abs=0.02), name


@pytest.mark.slow
def test_accumulated_batches_train_the_model_of_one(alone, data, tmp_path, monkeypatch):
    """Of detectors; the batch norms of the others see less at a time."""
    quiet(monkeypatch)
    paths = list(recipes(tmp_path, data, batch=2, accumulate=2))
    for path, one in list(zip(paths, alone, strict=True))[:2]:
        same_training(train(path).parent / "1_shapes", one)
