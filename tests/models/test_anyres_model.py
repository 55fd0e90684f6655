"""AnyRes: any mixture of images as each alone, tokens as transformers' own classes arrange them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from looking import seen
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from stepwell.flops.report import report
from stepwell.fuse.tiles import TileMerge
from stepwell.models.anyres import AnyResConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json
from stepwell.train.groups import parameter_groups
from stepwell.views.sheet import draw_views

CONFIG = AnyResConfig(encoder="vit_nano", size=64)
DIM = 24
SIZES = [(64, 64), (70, 200), (200, 70), (1, 300), (300, 1), (1, 1), (90, 100)]  # (height, width)


def built(config: AnyResConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    return config.build(DIM).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merge": "flat"},
        {"merge": "spatial"},
        {"grids": "(1x1),...,(4x4)", "max_tiles": 2},
        {"grids": ()},
        {"encoder": "convnext_nano", "select_layer": -1, "framing": "pad"},
    ],
)
def test_images_of_any_shape_are_seen_together_as_alone(changes, draw):
    vision = built(replace(CONFIG, **changes))
    images = [draw(width, height, seed) for seed, (height, width) in enumerate(SIZES)]
    for image, features in zip(images, seen(vision, images), strict=True):
        (alone,) = seen(vision, [image])
        assert len(features.tokens) == features.layout.num_visual
        torch.testing.assert_close(alone.tokens, features.tokens, rtol=1e-4, atol=1e-5)
        assert len(features.maps) == len(features.layout.views)
        for feature_map, view in zip(features.maps, features.layout.views, strict=True):
            assert feature_map.view == view
            assert feature_map.map.shape[1:] == view.grid
            assert feature_map.stride == 64 / view.grid[0]


def arranged(config: AnyResConfig, size: tuple[int, int]) -> tuple[Tensor, Any]:
    """Our tokens of random views, the tiles' first; and these views, the overview first, with the newline."""
    vision = built(config)
    layout = vision.geometry.layout(size)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(len(layout.views), 16, DIM, generator=generator)
    with torch.no_grad():
        tokens = vision._arranged(list(views), layout)
    return tokens, (views.roll(1, 0), vision.merge.newline)


def of_transformers(config: AnyResConfig) -> Any:
    """What their functions read of a model."""
    pinpoints = [[64 * side for side in grid] for grid in config.grids]
    vision = SimpleNamespace(image_size=64, patch_size=16)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_arranged_as_llava_next_of_transformers_arranges_them(size):
    ours, (views, newline) = arranged(CONFIG, size)
    (theirs,), _ = LlavaNextModel.pack_image_features(
        of_transformers(CONFIG), [views], [size], "default", newline
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (300, 310), (500, 120), (700, 690), (100, 900)])
def test_a_limit_to_the_tiles_is_llava_onevisions_of_transformers(size):
    config = replace(CONFIG, grids="(1x1),...,(6x6)", max_tiles=3)
    ours, (views, newline) = arranged(config, size)
    (theirs,), _ = LlavaOnevisionModel.pack_image_features(
        of_transformers(config), [views], [size], newline, "anyres_max_3"
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_rows_run_through_all_tiles_beside_one_another():
    """Two tiles of 2 x 2 beside one another, by hand; the newline is 9."""
    merge = TileMerge(1, newline=True)
    with torch.no_grad():
        merge.newline.fill_(9)
    overview, *tiles = torch.arange(12.0).view(3, 4, 1)
    shape = {"grid": (1, 2), "tile": (2, 2), "size": (2, 4), "kept": (2, 4)}
    expected = [0, 1, 2, 3, 4, 5, 8, 9, 9, 6, 7, 10, 11, 9]
    assert merge(overview, tiles, **shape).flatten().tolist() == expected
    cut = merge(overview, tiles, **shape | {"size": (2, 2), "kept": (2, 2)})
    assert cut.flatten().tolist() == [0, 1, 2, 3, 5, 8, 9, 7, 10, 9]
    assert merge.alone(overview).flatten().tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_a_map_is_brought_to_its_limit_in_single_precision_or_in_its_own(dtype, exact):
    tiles = torch.rand(2, 9, 1, dtype=dtype)
    merge = TileMerge(1, newline=False)
    shape = {"grid": (1, 2), "tile": (3, 3), "kept": (3, 6), "size": (2, 5)}
    merged = merge(tiles[0, :0], [*tiles], **shape)
    whole = torch.cat([tile.view(3, 3) for tile in tiles], 1)[None, None].to(exact)
    expected = torch.nn.functional.interpolate(whole, (2, 5), mode="bilinear")
    assert torch.equal(merged.flatten(), expected.flatten().to(dtype))


def test_a_newline_starts_as_llava_draws_it():
    newline = TileMerge(4096, newline=True).newline
    assert newline.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert TileMerge(8, newline=False).newline is None


def test_everything_learns_and_the_newline_is_a_part_of_its_own(draw):
    vision = built().train()
    layout = vision.geometry.layout((70, 200))
    vision(vision.geometry.inputs(draw(200, 70), layout), [layout])[0].square().sum().backward()
    unread = ("branches.0.blocks.3.", "branches.0.norm")  # behind the hidden state
    still = [name for name, p in vision.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith(unread) for name in still)
    groups = parameter_groups(vision, CONFIG.parts, lr=1.0, part_lrs={"vision.merge": 2.0}, weight_decay=0.1)
    assert [len(group["params"]) for group in groups if group["lr"] == 2.0] == [1]


def test_settings_survive_json_and_what_cannot_be_is_refused():
    config = replace(CONFIG, grids="(1x1),...,(6x6)", max_tiles=9)
    assert vision_settings(settings_json(config)) == config
    for changes, words in (
        ({"grids": ((0, 1),)}, r"grids\.0\.0: .*greater than 0"),
        ({"grids": "(6x6)"}, 'a range of grids reads "\\(1x1\\)'),
        ({"merge": "spacial"}, "merge"),
        ({"framing": "aspect"}, "framing"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"merge": "flat"}, "max_tiles is of merge 'spatial_unpad', and merge is 'flat'"),
        ({"select_layer": 7}, "select_layer 7 is not one of"),
    ):
        with pytest.raises(ValueError, match=words):
            vision_settings({**settings_json(config), **changes})


def test_what_no_weight_depends_on_may_change():
    changes = {"grids": "(1x1),...,(3x3)", "max_tiles": 2, "floor": "float", "framing": "crop", "sizes": [32]}
    changed = CONFIG.adjusted(changes)
    assert (changed.size, len(changed.grids), changed.max_tiles) == (32, 9, 2)
    built(changed).load_state_dict(built().state_dict())
    with pytest.raises(ValueError, match=r"vision\.merge of a 'anyres' system cannot change"):
        CONFIG.adjusted({"merge": "flat"})
    with pytest.raises(ValueError, match=r"views of this vision system have 1 side, got \[32, 64\]"):
        CONFIG.resized([32, 64])


def test_its_cost_is_that_of_its_views():
    one, five = (report(CONFIG, size=size) for size in ((64, 64), (128, 128)))
    assert (len(one.views), len(five.views)) == (3, 5)
    assert one.tokens == 16 + 4 * 5
    branches = [next(p.flops for p in each.parts if p.name == "branches.0") for each in (one, five)]
    assert branches[1] / branches[0] == pytest.approx(5 / 3, rel=1e-4)


def test_it_is_drawn_with_its_tiles_as_they_lie_in_it(draw):
    geometry = CONFIG.geometry()
    wide, tall = (draw_views([image], geometry) for image in (draw(300, 60), draw(60, 300)))
    assert wide.width > tall.width
    assert tall.height > wide.height
