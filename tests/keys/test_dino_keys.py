"""The released DINO heads have a place for every tensor, and every tensor of ours comes from one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepwell.heads.dino import DinoConfig
from stepwell.keys.dino import dino_rules
from stepwell.keys.engine import plan

LAYOUTS = Path(__file__).parent / "layouts"


@pytest.mark.parametrize("width", [1024, 3200])
def test_every_released_tensor_has_one_place_of_its_shape(width):
    """The default settings behind three maps; layouts recorded from the official configurations."""
    shapes = json.loads((LAYOUTS / f"layout_dino_heads_in{width}.json").read_text())["keys"]
    with torch.device("meta"):
        dino = DinoConfig().build([width] * 3, [8, 16, 32], num_classes=80)
    renaming = plan(shapes, dino_rules())
    assert (renaming.unknown, renaming.dropped) == ([], {})
    theirs = {name: shapes[target.sources[0]] for name, target in renaming.targets.items()}
    assert theirs == {name: list(tensor.shape) for name, tensor in dino.state_dict().items()}


def test_layers_beyond_the_settings_have_no_place():
    names = [f"bbox_head.transformer.encoder.layers.{i}.norms.0.weight" for i in range(7)]
    assert plan(names, dino_rules()).unknown == names[6:]
    assert plan(names, dino_rules(encoder_layers=7)).unknown == []
