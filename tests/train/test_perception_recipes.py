"""Every recipe of a detector, segmenter or classifier, with tiny networks on drawn shapes: two steps and a score.
The tiny sibling keeps what the recipe says of rates, schedules, losses and augmentation.
"""

from __future__ import annotations

import csv
import json
import math

import pytest
import yaml
from shapes import write_coco, write_image_folder, write_label_maps

import stepwell
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.shipped import recipe_names
from stepwell.train.tasks import find_task

TASKS = ("detect", "segment", "classify")
RECIPES = [name for name in recipe_names() if load_recipe(name).task in TASKS]
BRANCH = {"encoder": "vit_nano", "interactions": [[0, 1], [2, 3]]}
SMALL_HEADS = {
    "rcnn": {
        "dim": 16,
        "rpn": {"dim": 16, "sampling": {"num": 16}, "training": {"per_level": 20, "num": 20}},
        "box": {"dim": 16},
        "sampling": {"num": 16},
        "mask": {"dim": 16},
    },
    "cascade": {"dim": 16},
    "dino": {
        "dim": 16,
        "norm_groups": 4,
        "num_queries": 20,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "ffn_dim": 16,
        "num_heads": 2,
        "self_attention_heads": 2,
        "denoising": {"num_queries": 4},
        "max_detections": 10,
    },
    "upernet": {"channels": 16, "auxiliary_channels": 16},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    coco = write_coco(folder / "coco", images=4)
    maps = write_label_maps(folder / "maps", images=4)
    classes = write_image_folder(folder / "classes", images=2)
    label_maps = {"images": f"{maps}/images", "labels": f"{maps}/labels", "classes": f"{maps}/classes.json"}
    return {
        "detect": {"kind": "coco", "annotations": str(coco)},
        "segment": {"kind": "label_maps", **label_maps},
        "classify": {"kind": "image_folder", "path": str(classes)},
    }
