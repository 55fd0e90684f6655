"""Rates and weight decay of layers, by the names that parameters of real pyramids have."""

from __future__ import annotations

import re

import pytest
import torch
from pydantic import ValidationError

from stepwell.models.dense import DenseSettings
from stepwell.models.dense_config import StepwellDetectorConfig
from stepwell.models.detector import StepwellForObjectDetection
from stepwell.models.vision import validated
from stepwell.train.groups import parameter_groups, part_of
from stepwell.train.layer_decay import LayerDecay
from stepwell.train.recipe import load_recipe

LR, DECAY, RATE = 1e-4, 0.05, 0.85
LAYERS = [[0, 1], [2, 3]]
TABLE = {"position": "table", "position_grid": [4, 4], "class_token": True, "registers": 2}


def branch(size, encoder="vit_nano", interactions=LAYERS, **arguments):
    return {"encoder": encoder, "size": size, "interactions": interactions, "arguments": arguments}


@pytest.fixture(scope="module")
def model():
    """Three branches: a table of positions, one of relative positions, and half as many layers as four."""
    branches = [
        branch(48, **TABLE),
        branch(64, position="relative", position_grid=[4, 4]),
        branch(80, depth=2, interactions=[[0, 0], [1, 1]]),
    ]
    pyramid = validated(DenseSettings, {"branches": branches}, "pyramid")
    head = {"kind": "rcnn", "dim": 8}
    images = {"long_limit": 64, "short_limit": 64, "size_divisor": 16}
    with torch.device("meta"):
        return StepwellForObjectDetection(StepwellDetectorConfig(pyramid, head=head, images=images))


def settings_of(model, **arguments):
    """Rate and weight decay of every parameter, by the name that recipes give it."""
    groups = parameter_groups(
        model, model.parts, lr=LR, weight_decay=DECAY, **{"part_lrs": {}, "decayed": "tables", **arguments}
    )
    names = {id(p): part_of(name, model.parts) for name, p in model.named_parameters()}
    told = {
        names[id(p)]: (group["lr"], group["weight_decay"], p.ndim)
        for group in groups
        for p in group["params"]
    }
    assert len(told) == sum(len(group["params"]) for group in groups) == len(names)
    return told


def decay(*strides, rate=RATE, layers=4):
    return LayerDecay(rate=rate, layers=layers, strides=strides)


def test_blocks_and_embeddings_learn_by_their_depth(model):
    told = settings_of(model, layer_decay=decay(1, 2))
    seen = set()
    for name, (rate, *_) in told.items():
        found = re.match(r"vision\.branches\.(\d)\.(blocks\.(\d)\.)?(.*)", name)
        if found is None:
            expected = LR  # interactions, merges, neck and head
        else:
            stride = (1, 1, 2)[int(found[1])]
            layer = (int(found[3]) + 1) * stride if found[2] else 0
            expected = LR * RATE ** (4 + 1 - layer)
        assert rate == pytest.approx(expected, rel=1e-9), name
        seen.add(".".join(name.split(".")[:2]))
    assert seen >= {"vision.branches", "vision.interactions", "vision.merges", "head.rpn"}


def test_the_first_layers_of_a_shorter_branch_lie_further_back(model):
    told = settings_of(model, layer_decay=decay(1, 2))
    assert told["vision.branches.2.blocks.0.mlp.fc1.weight"][0] == pytest.approx(LR * RATE**3)
    assert told["vision.branches.2.blocks.1.mlp.fc1.weight"][0] == pytest.approx(LR * RATE)
    assert told["vision.branches.0.blocks.3.mlp.fc1.weight"][0] == pytest.approx(LR * RATE)


def test_embeddings_are_layer_zero(model):
    embeddings = {
        name.split(".", 3)[3]
        for name, (rate, *_) in settings_of(model, layer_decay=decay(1, 2)).items()
        if rate == pytest.approx(LR * RATE**5)
    }
    assert {name.split(".")[0] for name in embeddings} == {
        "patch_embed",
        "position",
        "class_token",
        "registers",
    }


@pytest.mark.parametrize(
    ("stride", "layer", "id"), [(1.5, 0, 1.5), (1.5, 31, 48), (2, 23, 48), (3, 3, 12), (1, 11, 12)]
)
def test_ids_of_published_pyramids(stride, layer, id):
    layers = decay(stride, layers=48)
    assert layers.factor(f"vision.branches.1.blocks.{layer}.attn.qkv.weight") == pytest.approx(
        RATE ** (49 - id)
    )
    assert layers.factor("vision.branches.0.blocks.47.norm1.bias") == pytest.approx(RATE)


def test_parts_keep_the_ratio_of_their_own_rates(model):
    told = settings_of(model, layer_decay=decay(1, 2), part_lrs={"vision.branches.0": 1e-2})
    assert told["vision.branches.0.blocks.0.mlp.fc1.weight"][0] == pytest.approx(1e-2 * RATE**4)
    assert told["vision.branches.1.blocks.0.mlp.fc1.weight"][0] == pytest.approx(LR * RATE**4)


def test_convnext_learns_at_the_full_rate():
    pyramid = {
        "branches": [
            branch(64, encoder="convnext_nano"),
            branch(48),
        ],
        "interaction": {"num_heads": 2},
    }
    config = StepwellDetectorConfig(
        validated(DenseSettings, pyramid, "pyramid"),
        head={"kind": "rcnn", "dim": 8},
        images={"long_limit": 64, "short_limit": 64, "size_divisor": 16},
    )
    with torch.device("meta"):
        model = StepwellForObjectDetection(config)
    told = settings_of(model, layer_decay=decay(1))
    assert {rate for name, (rate, *_) in told.items() if name.startswith("vision.branches.0.")} == {LR}
    assert min(rate for rate, *_ in told.values()) == pytest.approx(LR * RATE**5)


def test_a_branch_without_a_stride_is_refused(model):
    with pytest.raises(ValueError, match=r"strides has 1, and there is a branch 3: give one"):
        settings_of(model, layer_decay=decay(1))


def test_a_decay_that_slows_nothing_is_refused():
    with pytest.raises(ValueError, match="slows nothing: the model has no branch"):
        parameter_groups(torch.nn.Linear(2, 2), {}, lr=LR, part_lrs={}, weight_decay=0, layer_decay=decay())


@pytest.mark.parametrize(
    "fields", [{"rate": 1.1}, {"rate": 0}, {"layers": 0}, {"strides": [0]}, {"depth": 3}, {"rate": None}]
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        LayerDecay(**{"rate": 0.9, "layers": 12, **fields})


# What the weight decay is of


def decayed(model, kind):
    return {name for name, (_, decay, _) in settings_of(model, decayed=kind).items() if decay}


def test_tables_and_single_numbers_are_decayed_but_no_vectors_and_biases(model):
    names = decayed(model, "tables")
    assert {
        "vision.branches.0.position.table",
        "vision.branches.0.class_token",
        "vision.branches.0.blocks.0.attn.qkv.weight",
        "vision.branches.1.blocks.0.attn.relative_table",
        "vision.merges.0.weights",  # a number for each branch, which are parameters of no dimension in PIIP
    } <= names
    assert not any(name.endswith((".bias", "norm1.weight", "gate")) for name in names)
    for name, (_, decay, ndim) in settings_of(model).items():
        assert decay in (0, DECAY)
        if not name.endswith(".weights"):
            assert (decay > 0) == (ndim > 1), name


def test_a_bias_of_two_dimensions_is_a_bias():
    module = torch.nn.Module()
    module.bias_table, module.scale = (torch.nn.Parameter(torch.zeros(x)) for x in ((2, 2), ()))
    module.inner = torch.nn.Module()
    module.inner.bias = torch.nn.Parameter(torch.zeros(2, 2))
    told = {
        kind: [
            {id(p) for p in group["params"]}
            for group in parameter_groups(module, {}, lr=1, part_lrs={}, weight_decay=DECAY, decayed=kind)
            if group["weight_decay"]
        ]
        for kind in ("matrices", "tables", "all")
    }
    table, scale, bias = id(module.bias_table), id(module.scale), id(module.inner.bias)
    assert told == {"matrices": [{table, bias}], "tables": [{table, scale}], "all": [{table, scale, bias}]}


def test_all_is_everything(model):
    assert decayed(model, "all") == set(settings_of(model))
    assert "vision.merges.0.weights" not in decayed(model, "matrices")


@pytest.mark.parametrize(
    ("name", "layers", "strides"),
    [
        ("piip_det_tsb_1568_1120_672", 12, (1, 1)),
        ("piip_det_sbl_1568_1120_672", 24, (2, 2)),
        ("piip_det_tsbl_1568_1120_672_448", 24, (2, 2, 2)),
        ("piip_det_dino_lh6b_1536_1024_512", 48, (1.5, 2)),
        ("piip_seg_h6b_512_192", 48, (1.5,)),
    ],
)
def test_decays_of_published_recipes(name, layers, strides):
    optimiser = load_recipe(name).stages[0].optimiser
    assert (optimiser.layer_decay.layers, optimiser.layer_decay.strides) == (layers, strides)
    assert (optimiser.decayed, optimiser.weight_decay) == ("tables", 0.05)
