"""INF-LLaVA's vision system: fewer passes for the same tokens, any shape, and what the paper changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from looking import seen
from PIL import Image

from stepwell.fuse.dual import PAPER_ENHANCEMENT, EnhancementConfig
from stepwell.models import inf
from stepwell.models.inf import InfConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.published.inf import PAPER
from stepwell.models.published.papers import PUBLISHED
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json
from stepwell.ops.choose import prefer
from stepwell.train.recipe import load_recipe

NANO = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8, "position_grid": [6, 6]}
CODE = InfConfig(
    encoder="clip_l_14_336",
    arguments=NANO,
    size=48,
    resolutions=(48, 144),
    enhancement=EnhancementConfig(num_heads=2),
)
FREE = replace(CODE, resolutions=(48,), max_crops=6, low_view="resized")
OF_PAPER = replace(CODE, enhancement=PAPER_ENHANCEMENT, low_view="resized", combine="add")
SIZES = [(48, 48), (70, 200), (200, 70), (1, 300), (300, 1), (1, 1), (144, 144)]  # (height, width)
DIM = 64


def built(settings: InfConfig) -> Any:
    torch.manual_seed(0)
    return settings.build(DIM).eval()


@pytest.fixture(scope="module")
def images(draw: Any) -> list[Image.Image]:
    return [draw(width, height, seed) for seed, (height, width) in enumerate(SIZES)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)


@pytest.mark.parametrize("settings", [CODE, FREE, OF_PAPER, replace(FREE, resolutions=(), max_crops=4)])
def test_images_of_any_shape_are_seen_together_as_alone(settings, images):
    vision = built(settings)
    for image, features in zip(images, seen(vision, images), strict=True):
        (alone,) = seen(vision, [image])
        assert len(alone.tokens) == features.layout.num_visual == 36
        assert close(alone.tokens, features.tokens)
        with prefer("reference"):
            assert close(seen(vision, [image])[0].tokens, features.tokens)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_crops_that_cannot_reach_a_token_are_not_encoded(count, images):
    settings = replace(CODE, resolutions=(48, 48 * count))
    vision = built(settings)
    every = built(replace(settings, every_crop=True))
    (few,), (all_of_them,) = seen(vision, images[1:2]), seen(every, images[1:2])
    assert close(few.tokens, all_of_them.tokens)
    passes = {2: 4 + 4 + 1, 3: 9 + 1, 4: 16 + 4 + 1, 5: 25 + 1}[count]
    assert len(few.layout.views) == passes
    local = EnhancementConfig(perspectives="local", enhance="none")
    of_one_kind = replace(settings, every_crop=True, enhancement=local).geometry()
    assert len(of_one_kind.layout((48, 48)).views) == count**2 + 1
    has_low_view = count % 2 == 0
    assert len(all_of_them.layout.views) == 2 * count**2 + has_low_view


def test_tokens_are_projections_of_the_mean_of_enhanced_and_small(images):
    vision = built(replace(CODE, every_crop=True))
    (features,) = seen(vision, images[1:2])
    (image,) = vision.geometry.inputs(images[1], features.layout)
    fine = F.interpolate(image[None], 144, mode="bicubic", align_corners=False)
    encoder = vision.branches[0]

    def cells(view: torch.Tensor) -> torch.Tensor:
        return encoder.run(encoder.stem(view), 0, 1).tokens.unflatten(1, (6, 6))

    with torch.no_grad():
        local = [cells(fine[:, :, i : i + 48, j : j + 48]) for i in (0, 48, 96) for j in (0, 48, 96)]
        strided = [cells(fine[:, :, i::3, j::3]) for i in range(3) for j in range(3)]
        small = cells(F.interpolate(fine, 48, mode="bicubic", align_corners=False))
        enhanced = vision.enhancement(torch.stack(local, 1), torch.stack(strided, 1), (3, 3))
        expected = vision.projector(((small + enhanced) / 2).flatten(1, 2))[0]
    assert close(features.tokens, expected)
    added = built(replace(CODE, combine="add"))
    with torch.no_grad():
        assert close(
            seen(added, images[1:2])[0].tokens, vision.projector((small + enhanced).flatten(1, 2))[0]
        )


def test_one_resolution_leaves_the_other_out(images):
    high = built(replace(CODE, resolutions=(144,)))
    with torch.no_grad():
        (features,) = seen(high, images[1:2])
        maps = torch.stack([shown.map for shown in features.maps]).movedim(1, -1)[None]
        enhanced = high.enhancement(maps[:, :9], maps[:, 9:], (3, 3))
        assert close(features.tokens, high.projector(enhanced.flatten(1, 2))[0])
    low = built(replace(CODE, resolutions=(48,), enhancement=None))
    plain = PlainConfig(encoder="clip_l_14_336", arguments=NANO, size=48).build(DIM).eval()
    state = low.state_dict()
    plain.load_state_dict(state)
    assert close(seen(low, images[1:2])[0].tokens, seen(plain, images[1:2])[0].tokens)


def test_the_same_weights_see_other_resolutions(images):
    settings = CODE.adjusted({"sizes": [48, 96]})
    assert settings.resolutions == (48, 96)
    small = settings.adjusted({"resolutions": (48,)})
    free = small.adjusted({"max_crops": 4})
    vision = built(CODE)
    for changed in (settings, small, free):
        built(changed).load_state_dict(vision.state_dict())
    assert (CODE.largest, small.largest, free.largest) == (144, 48, 4 * 48)
    assert CODE.sizes_for(240) == [48, 240]
    assert CODE.sizes_for(48) == [48]
    assert replace(CODE, resolutions=(144,)).sizes_for(240) == [240]
    with pytest.raises(ValueError, match="weights depend on it"):
        CODE.adjusted({"enhancement": None})


def test_the_small_input_of_the_official_loader_loses_detail(images):
    sharp, blurred = built(CODE), built(replace(CODE, small_input=True))
    (a,), (b,) = seen(sharp, images[1:2]), seen(blurred, images[1:2])
    assert b.layout.inputs == ((48, 48),)
    assert not close(a.tokens, b.tokens)
    assert len(b.layout.views) == 10
    assert close(
        b.tokens, seen(built(replace(CODE, small_input=True, every_crop=True)), images[1:2])[0].tokens
    )


def test_passes_are_bounded(images, monkeypatch):
    vision = built(CODE)
    sizes: list[int] = []
    stem = vision.branches[0].stem
    monkeypatch.setattr(vision.branches[0], "stem", lambda views: sizes.append(len(views)) or stem(views))
    together = seen(vision, images)
    assert max(sizes) == inf.MOST_VIEWS_ON_CPU
    assert sum(sizes) == sum(len(features.layout.views) for features in together)


def test_maps_are_those_of_the_views(images):
    (features,) = seen(built(FREE), images[1:2])
    assert [shown.view for shown in features.maps] == list(features.layout.views)
    assert {tuple(shown.map.shape) for shown in features.maps} == {(32, 6, 6)}
    assert {shown.stride for shown in features.maps} == {8}


def test_a_geometry_is_that_of_the_settings():
    colours = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    geometry = replace(CODE, **colours).geometry()
    assert {"mean": geometry.mean, "std": geometry.std} == colours
    assert (CODE.geometry().framing, FREE.geometry().framing) == ("pad", "squeeze")
    staged = InfConfig(encoder="convnext_t", size=64, resolutions=(64, 128), select_layer=2)
    assert staged.geometry().stride == 4  # of the hidden state, not of the last layer


def test_an_image_of_one_crop_gives_the_enhancement_a_gradient_of_zeros(images):
    """Else processes that train together would wait for it."""
    vision = replace(FREE, max_crops=1).build(DIM)
    layout = vision.geometry.layout((1, 1))
    tokens = vision(vision.geometry.inputs(images[5], layout), [layout])[0]
    tokens.sum().backward()
    gradients = [parameter.grad for parameter in vision.enhancement.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_everything_learns(images):
    for settings in (CODE, OF_PAPER, FREE):
        vision = built(settings)
        layout = vision.geometry.layout((70, 200))
        tokens = vision(vision.geometry.inputs(images[1], layout), [layout])[0]
        tokens.pow(2).sum().backward()
        for name, parameter in (*vision.enhancement.named_parameters(), *vision.projector.named_parameters()):
            assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": (48, 100)}, "resolution 100 is no multiple of the view's side 48"),
        ({"resolutions": (96, 144)}, "are 48, a multiple of it, or both"),
        ({"resolutions": (48, 48)}, "are 48, a multiple of it, or both"),
        ({"resolutions": ()}, "give a resolution, or max_crops"),
        ({"max_crops": 4}, "max_crops stands in place of resolution 144"),
        ({"resolutions": (48,), "max_crops": 4, "framing": "pad"}, "max_crops follows the aspect"),
        ({"enhancement": None}, r"without enhancement there is the small view alone: resolutions \[48\]"),
        ({"enhancement": EnhancementConfig(reduce="none")}, "reduce 'none' keeps every cell"),
        ({"small_input": True, "low_view": "resized"}, "low_view 'sampled'"),
        ({"select_layer": 7}, "select_layer 7 is not one of the 4 hidden states"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CODE, **changes)


def test_every_cell_may_be_a_token(images):
    settings = replace(CODE, resolutions=(144,), enhancement=EnhancementConfig(num_heads=2, reduce="none"))
    (features,) = seen(built(settings), images[1:2])
    assert len(features.tokens) == features.layout.num_visual == 9 * 36


ABLATIONS = {
    "local crops only (Table 6)": (
        {"perspectives": "local", "enhance": "none", "reduce": "average"},
        {"local", "whole"},
    ),
    "global crops only (Table 6)": (
        {"perspectives": "global", "enhance": "none", "reduce": "average"},
        {"global"},
    ),
    "crops summed (Table 6)": (
        {"enhance": "none", "fusion": "addition", "reduce": "average"},
        {"local", "global"},
    ),
    "global enhancement (Table 4)": ({"enhance": "global"}, {"local", "global"}),
    "local enhancement (Table 4)": ({"enhance": "local"}, {"local", "global"}),
}
"""Settings, and the kinds of views that are encoded for them."""


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_encode_what_they_need_and_are_not_the_whole(name, images):
    changes, kinds = ABLATIONS[name]
    vision = built(replace(CODE, enhancement=EnhancementConfig(num_heads=2, **changes)))
    (features,) = seen(vision, images[1:2])
    assert {view.name.split()[0] for view in features.layout.views} == kinds
    assert len(features.tokens) == 36
    whole = built(CODE)
    whole.branches.load_state_dict(vision.branches.state_dict())
    whole.projector.load_state_dict(vision.projector.state_dict())
    assert not close(features.tokens, seen(whole, images[1:2])[0].tokens)


def test_the_papers_settings_are_its_rows():
    assert PAPER.enhancement == PAPER_ENHANCEMENT
    assert (PAPER.combine, PAPER.low_view) == ("add", "resized")
    official = PUBLISHED["inf_llava"].settings
    assert official == InfConfig()
    assert official.resolutions == (336, 1008)
    layout = official.geometry().layout((700, 900))
    assert (len(layout.views), layout.num_visual) == (10, 576)
    assert len(PAPER.geometry().layout((700, 900)).views) == 19


def test_recipes_build_the_published_model():
    for recipe, name in (("inf_llava", "inf_llava"), ("inf_paper", "inf_paper")):
        loaded = load_recipe(recipe)
        assert loaded.model.vision == PUBLISHED[name].settings
    assert vision_settings(settings_json(FREE)) == FREE
