"""Every recipe of a detector, segmenter or classifier, with tiny networks on drawn shapes: two steps, scores.
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
from stepwell.evaluate import perception_report
from stepwell.train import perception, results
from stepwell.train.recipe import load_recipe
from stepwell.train.run import train
from stepwell.train.shipped import recipe_names
from stepwell.train.tasks import find_task

TASKS = ("detect", "segment", "classify")
KINDS = (  # one of each; the others are slow
    "piip_det_tsb_1120_896_448",
    "piip_det_h6b_1024_512",
    "piip_det_cascade_tsb_3x",
    "piip_det_dino_sbl_1792_1120_672",
    "piip_det_convnext_tsb_1024_672_448",
    "piip_seg_tsb_896_448_336",
    "piip_cls_tsb_368_192_128",
    "piip_cls_b_512_256_128",
)
RECIPES = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in recipe_names()
    if load_recipe(name).task in TASKS
]
BRANCH = {"encoder": "vit_nano", "interactions": [[0, 1], [2, 3]]}
SMALL_HEADS = {
    "rcnn": {
        "dim": 16,
        "rpn": {"dim": 16, "sampling": {"num": 16}, "training": {"per_level": 20, "num": 20}},
        "box": {"dim": 16},
        "sampling": {"num": 16},
        "mask": {"dim": 16},
    },
    "cascade": {
        "dim": 16,
        "rpn": {"dim": 16, "sampling": {"num": 16}, "training": {"per_level": 20, "num": 20}},
        "stages": [
            {
                "box": {"num_convs": 1, "conv_dim": 8, "norm": "batch", "num_linears": 1, "dim": 16},
                "sampling": {"num": 16},
                "weight": weight,
            }
            for weight in (1.0, 0.5)
        ],
        "mask": {"dim": 16},
    },
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


def tiny(name: str, data, folder) -> str:
    """The recipe with small networks, two steps, and drawn data; as a file whose base it is."""
    recipe = load_recipe(name)
    task, stage = recipe.task, recipe.stages[0]
    config = find_task(task).configuration(recipe)
    settings = config.settings if task == "classify" else config.backbone_config.settings
    sizes = [48 + 16 * i for i in range(len(settings.branches))]
    backbone = {"branches": [{**BRANCH, "size": size} for size in sizes], "mean": [0.5] * 3, "std": [0.5] * 3}
    changes = {
        "published": None,
        "backbone": backbone,
        "parts": {f"vision.branches.{i}": None for i in range(4)},
    }
    if len(sizes) == 1 and task != "classify":
        backbone["merge"] = "none"
    if task != "classify":
        head = {"kind": config.head_settings.kind, **SMALL_HEADS[config.head_settings.kind]}
        changes |= {"head": head, "images": IMAGES[task]}
    if task == "classify":
        backbone["head"] = settings.head
        backbone["branches"] = [
            {**branch, "arguments": {"class_token": True}} for branch in backbone["branches"]
        ]
    optimiser = {}
    if stage.optimiser.layer_decay is not None:
        optimiser = {"layer_decay": {"layers": 4}}
    augment = {"factor": 0.1, "crop": 96} if stage.augment.kind == "multi_scale" else {}
    fields = {
        "base": name,
        "output": str(folder),
        "bf16": False,
        "workers": 0,
        "model": changes,
        "stages": {
            stage.name: {
                "steps": 2,
                "epochs": None,
                "batch": 2,
                "validate_steps": 2,
                "data": [data[task]],
                "validation": [data[task]],
                "optimiser": optimiser,
                "augment": augment,
                "trainer": {"report_to": "none"},
            }
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


IMAGES = {
    "detect": {"long_limit": 64, "short_limit": 64, "size_divisor": 32},
    "segment": {"short_side": 48, "window": 64, "stride": 43},
}


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_every_recipe(name, data, tmp_path, monkeypatch):
    for module in (results, perception_report):  # test_perception_training.py draws them
        monkeypatch.setattr(module, "can_draw", lambda: False)
    monkeypatch.setattr(perception, "PICTURES", 0)
    folder = train(tiny(name, data, tmp_path))
    (stage,) = folder.parent.glob("1_*")
    rows = list(csv.DictReader((stage / "metrics.csv").open()))
    metrics = {row["metric"]: float(row["value"]) for row in rows}
    assert any(name.startswith("eval_") for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    model = stepwell.load(folder)
    assert json.loads((folder / "config.json").read_text())["id2label"]
    assert len(model.class_names) >= 2
