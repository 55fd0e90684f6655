"""Recipes of tiny detectors, segmenters and classifiers on drawn shapes, and what their runs leave."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from shapes import write_coco, write_image_folder, write_label_maps

from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

BACKBONE = {
    "branches": [
        {
            "encoder": "vit_nano",
            "size": size,
            "interactions": [[0, 0], [1, 1]],
            "arguments": {"depth": 2, "dim": 32},
        }
        for size in (32, 48)
    ],
    "interaction": {"num_heads": 2},
}
RCNN = {
    "kind": "rcnn",
    "dim": 8,
    "rpn": {
        "dim": 8,
        "sampling": {"num": 16},
        "training": {"per_level": 20, "num": 20},
        "testing": {"per_level": 20, "num": 20},
    },
    "box": {"dim": 16},
    "sampling": {"num": 16},
    "mask": {"dim": 8, "num_convs": 1},
}
DINO = {
    "kind": "dino",
    "dim": 16,
    "norm_groups": 4,
    "num_queries": 12,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 16,
    "num_heads": 2,
    "self_attention_heads": 2,
    "denoising": {"num_queries": 4},
    "max_detections": 10,
}
UPERNET = {"kind": "upernet", "channels": 8, "auxiliary_channels": 8, "pool_sizes": [1, 2]}
HEADS = {"detect": RCNN, "segment": UPERNET}
IMAGES = {
    "detect": {"long_limit": 48, "short_limit": 48, "size_divisor": 16},
    "segment": {"short_side": 48, "window": 48, "stride": 32},
}


def write_data(folder: Path, task: str, images: int = 4) -> dict:
    """An entry of a recipe's data; of a classifier so many images of each class."""
    if task == "detect":
        return {
            "kind": "coco",
            "annotations": str(write_coco(folder, images=images, sizes=((32, 48), (48, 32)))),
        }
    if task == "segment":
        write_label_maps(folder, images=images, size=(48, 64))
        names = {"images": f"{folder}/images", "labels": f"{folder}/labels"}
        return {"kind": "label_maps", **names, "classes": f"{folder}/classes.json"}
    return {"kind": "image_folder", "path": str(write_image_folder(folder, images=images, size=(32, 40)))}


def recipe_of(task: str, folder: Path, data: dict, *, stages=None, model=None, head=None, **fields) -> Path:
    """A file; stages: changes to the one stage, or a list of them."""
    backbone = BACKBONE | ({"head": "merge"} if task == "classify" else {})
    if model is None:
        model = {"backbone": backbone}
        if task != "classify":
            model |= {"head": head or HEADS[task], "images": IMAGES[task]}
    stage = {
        "name": "shapes",
        "steps": 4,
        "batch": 2,
        "data": [data],
        "optimiser": {"lr": 1.0e-3},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "trainer": {"report_to": "none"},
    }
    changes = stages if isinstance(stages, list) else [stages or {}]
    whole = {
        "task": task,
        "name": "tiny",
        "output": str(folder / "runs"),
        "bf16": False,
        "workers": 0,
        "save_dtype": "float32",
        "log_steps": 1,
        "model": model,
        "stages": [{**stage, **change} for change in changes],
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def metrics_of(stage: Path) -> dict[str, list[float]]:
    """By name, in the order of the steps."""
    told: dict[str, list[float]] = {}
    with (stage / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            told.setdefault(row["metric"], []).append(float(row["value"]))
    return told


def weights_of(folder: Path):
    return load_file(folder / "model.safetensors")


def killed_after(steps: int, recipe: Path, overrides=()) -> None:
    """A run that is stopped behind so many steps."""
    step, left = StageTrainer.training_step, iter(range(steps))

    def until_killed(self, *arguments, **named):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, overrides)
