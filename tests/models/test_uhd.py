"""LLaVA-UHD's vision systems: tokens in their order, any encoder, any shape; what the paper changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from looking import seen
from PIL import Image

from stepwell.encoders.catalogue import encoder_spec
from stepwell.fuse.upsample import KernelConfig, Level, UpsamplerConfig
from stepwell.fuse.windows import WindowConfig
from stepwell.models import uhd
from stepwell.models.published.papers import PUBLISHED
from stepwell.models.published.uhd import PAPER
from stepwell.models.systems import vision_settings
from stepwell.models.uhd import V1_WINDOWS, UhdV1Config, UhdV2Config
from stepwell.models.vision import settings_json
from stepwell.ops.choose import prefer
from stepwell.train.recipe import load_recipe

NANO = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8, "position_grid": [6, 6]}
V2 = UhdV2Config(
    encoder="clip_l_14_336", arguments=NANO, size=48, max_slices=4, windows=WindowConfig(grid=(3, 3))
)
V1 = UhdV1Config(
    encoder="clip_l_14_336",
    arguments=NANO,
    size=48,
    max_slices=4,
    windows=replace(V1_WINDOWS, grid=(3, 3)),
)
SIZES = [(48, 48), (70, 200), (200, 70), (1, 300), (300, 1), (1, 1), (96, 96)]  # (height, width)
DIM = 64


def built(settings: UhdV1Config, seed: int = 0) -> Any:
    """The system, with all that starts at zero drawn, so that nothing is without effect."""
    torch.manual_seed(seed)
    vision = settings.build(DIM).eval()
    for name, parameter in vision.projector.named_parameters():
        if "level_codes" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.startswith(("qkv", "queries")):  # sharp attention, which tells keys apart
            torch.nn.init.normal_(parameter, std=0.3)
    return vision


@pytest.fixture(scope="module")
def images(draw: Any) -> list[Image.Image]:
    return [draw(width, height, seed) for seed, (height, width) in enumerate(SIZES)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-4)


@pytest.mark.parametrize("settings", [V1, V2, replace(V2, organised=False, levels=(0, 2))])
def test_images_of_any_shape_are_seen_together_as_alone(settings, images):
    vision = built(settings)
    together = seen(vision, images)
    for image, features in zip(images, together, strict=True):
        (alone,) = seen(vision, [image])
        assert len(alone.tokens) == features.layout.num_visual
        assert close(alone.tokens, features.tokens)
        with prefer("reference"):
            assert close(seen(vision, [image])[0].tokens, features.tokens)
        assert all(
            close(a.map, b.map) and a.view == b.view for a, b in zip(alone.maps, features.maps, strict=True)
        )


@pytest.mark.parametrize("organised", [True, False])
def test_tokens_stand_in_the_order_of_the_layouts_runs(organised, images):
    vision = built(replace(V2, organised=organised))
    image = images[1]
    (features,) = seen(vision, [image])
    layout = features.layout
    rows, cols = layout.tiles
    assert rows * cols > 1
    views = []
    for x in vision.geometry.inputs(image, layout):
        with torch.no_grad():
            (view,) = vision.branches[0].run(vision.branches[0].stem(x[None]), 0, 1).tokens
            map = view.t().unflatten(1, (x.shape[1] // 8, x.shape[2] // 8))[None]
            levels = [Level(map), *vision.upsampler.levels(map, x[None])]
            views.append(vision.projector([levels])[0])
    if organised:
        expected = [
            views[row * cols + col][3 * line + cell]
            for row in range(rows)
            for line in range(3)
            for col in range(cols)
            for cell in range(3)
        ]
        expected += list(views[-1])
    else:
        expected = [token for view in views for token in view]
    assert close(features.tokens, torch.stack(expected))


def test_maps_are_those_of_every_level_of_every_view(images):
    vision = built(replace(V2, levels=(0, 2)))
    (features,) = seen(vision, [images[1]])
    views = features.layout.views
    assert len(features.maps) == 2 * len(views)
    for number, feature_map in enumerate(features.maps):
        view, factor = views[number // 2], (1, 4)[number % 2]
        assert feature_map.view == view
        assert feature_map.map.shape == (32, view.grid[0] * factor, view.grid[1] * factor)
        assert feature_map.stride == 8 / factor


def test_a_few_views_at_a_time_give_what_all_give(images, monkeypatch):
    vision = built(V2)
    whole = seen(vision, images)
    monkeypatch.setattr(uhd, "MOST_CELLS", 1)
    for a, b in zip(whole, seen(vision, images), strict=True):
        assert close(a.tokens, b.tokens)


def test_without_a_gradient_no_more_maps_are_held_than_said(images, monkeypatch):
    vision = built(V2)
    batches: list[int] = []
    levels = vision.upsampler.levels

    def counted(x: torch.Tensor, image: torch.Tensor, **options: Any) -> Any:
        batches.append(len(x))
        return levels(x, image, **options)

    monkeypatch.setattr(vision.upsampler, "levels", counted)
    monkeypatch.setattr(uhd, "MOST_CELLS", 2 * 24 * 24)
    inputs = [torch.randn(3, 48, 48)] * 5
    layouts = [vision.geometry.layout((48, 48))] * 5
    with torch.no_grad():
        vision(inputs, layouts)
    assert batches == [2, 2, 1]
    batches.clear()
    vision(inputs, layouts)
    assert batches == [5]


@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [
        ("siglip_b", {"dim": 32, "depth": 2, "num_heads": 2}),
        ("dinov2_s", {"dim": 32, "depth": 2, "num_heads": 2, "patch": 14, "class_token": True}),
        ("deit_t", {"dim": 32, "depth": 2, "num_heads": 2}),
        ("convnext_nano", {"dims": [16, 32], "depths": [1, 1], "strides": [4, 2]}),
    ],
)
def test_any_encoder_stands_under_the_pyramid(encoder, arguments, images):
    settings = replace(V2, encoder=encoder, arguments=arguments, size=56, select_layer=-1)
    vision, spec = built(settings), encoder_spec(encoder, arguments)
    assert (vision.geometry.mean, vision.geometry.stride) == (spec.mean, spec.stride)
    for features in seen(vision, images[:3]):
        assert len(features.tokens) == features.layout.num_visual
        assert features.tokens.isfinite().all()


def test_a_pyramid_may_be_the_stages_of_the_encoder(images):
    arguments = {"dims": [8, 16, 32], "depths": [2, 1, 1], "strides": [4, 2, 2]}
    settings = UhdV2Config(
        encoder="convnext_nano",
        arguments=arguments,
        size=64,
        select_layer=-1,
        upsampler=None,
        windows=WindowConfig(grid=(2, 2)),
    )
    vision = built(settings)
    (features,) = seen(vision, [images[0]])
    assert [tuple(m.map.shape) for m in features.maps] == [(32, 4, 4), (16, 8, 8), (8, 16, 16)]
    assert [m.stride for m in features.maps] == [16, 8, 4]
    with pytest.raises(ValueError, match=r"strides \[4, 8, 16\] and none of 2"):
        replace(settings, levels=(0, 3))
    with pytest.raises(ValueError, match=r"strides \[8\] and none of 4"):
        replace(V2, upsampler=None)


def test_the_embedding_may_be_the_one_level_without_an_upsampler(images):
    settings = replace(V2, upsampler=None, levels=(0,), select_layer=0)
    (features,) = seen(built(settings), images[:1])
    assert [tuple(m.map.shape) for m in features.maps] == [(32, 6, 6)]
    assert features.tokens.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": (2, 0)}, "levels are told once, the coarsest first"),
        ({"levels": ()}, "levels"),
        ({"levels": (5,)}, "levels"),
        ({"max_slices": 0}, "max_slices"),
        ({"select_layer": 7}, "select_layer 7 is not one of the 4 hidden states"),
        ({"windows": {"gird": (3, 3)}}, "gird"),
        ({"windows": {"grid": (0, 3)}}, "windows: grid has a row and a column at least, got .0, 3."),
        ({"windows": {"bins": (-2, 3)}}, "windows: bins has a row and a column at least, got .-2, 3."),
        ({"newline": (-5,)}, "newline: ids of tokens are counted from 0"),
        ({"comma": (3, -1)}, "comma: ids of tokens are counted from 0"),
        ({"std": (0.5, 0.0, 0.5)}, "std: pixels are divided by std, which is above 0"),
        ({"upsampler": None, "select_layer": 0}, "and none of 4; take fewer levels"),
        ({"upsampler": {"kind": "magic"}}, "kind"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        vision_settings({**settings_json(V2), **changes})


def test_settings_survive_json():
    for settings in (V1, V2, PAPER):
        assert vision_settings(settings_json(settings)) == settings


def test_what_no_weight_depends_on_may_change():
    changed = V2.adjusted({"max_slices": 9, "long_side": 200, "organised": False, "sizes": [96]})
    assert (changed.max_slices, changed.long_side, changed.organised, changed.size) == (9, 200, False, 96)
    with pytest.raises(ValueError, match=r"vision\.levels of a 'uhd_v2' system cannot change"):
        V2.adjusted({"levels": (0,)})
    built(changed).load_state_dict(built(V2).state_dict())


# ---- the paper, row by row of its differences from the code ----------------------------------------------


def tokens_of(settings: UhdV1Config, images: list[Image.Image]) -> torch.Tensor:
    """Of one system with one set of weights, as far as settings leave them the same shape."""
    return torch.cat([features.tokens for features in seen(built(settings), images)])


@pytest.mark.parametrize(
    ("field", "compatible", "paper"),
    [
        ("distance", V2, replace(V2, upsampler=UpsamplerConfig(kernel=KernelConfig(distance="pixels")))),
        ("similarity", V2, replace(V2, upsampler=UpsamplerConfig(kernel=KernelConfig(similarity="sigma")))),
        ("normalise", V2, replace(V2, upsampler=UpsamplerConfig(kernel=KernelConfig(normalise="count")))),
        ("correction", V2, replace(V2, upsampler=UpsamplerConfig(kernel=KernelConfig(correction=False)))),
        ("corrections", V2, replace(V2, upsampler=UpsamplerConfig(corrections="none"))),
        ("window_code", V2, replace(V2, windows=replace(V2.windows, window_code=True))),
        ("query_sets", V2, replace(V2, windows=replace(V2.windows, query_sets=1))),
    ],
)
def test_the_papers_way_gives_other_tokens(field, compatible, paper, images):
    ours, theirs = built(compatible), built(paper)
    state = ours.state_dict()
    if field == "query_sets":
        state["projector.queries"] = state["projector.queries"][:1]
    theirs.load_state_dict({k: v for k, v in state.items() if k in theirs.state_dict()}, strict=False)
    if field == "similarity":  # exp(0) is 1, and so is 1 squared: the two part where they learn
        for vision in (ours, theirs):
            for stage in vision.upsampler.stages:
                torch.nn.init.constant_(stage.similarity, 0.5)
    a, b = (seen(vision, images[:1])[0].tokens for vision in (ours, theirs))
    assert (a - b).abs().max() > 1e-3


def test_the_papers_bins_differ_where_the_code_has_more_candidates():
    compatible, paper = (
        built(replace(V2, windows=replace(V2.windows, bins=bins))).projector for bins in ("code", "paper")
    )
    assert compatible.bins((6, 8), 0) == (3, 4)
    assert paper.bins((6, 8), 0) == (2, 3)


def test_the_papers_code_of_a_level_is_added_behind_the_pooling():
    """They differ where a window reaches past a map that is smaller than the grid."""
    before, behind = (
        built(replace(V2, windows=replace(V2.windows, level_code=code))) for code in ("before", "behind")
    )
    behind.load_state_dict(before.state_dict())
    image = torch.randn(3, 8, 8)
    layout = before.geometry.layout((1, 1))
    layout = replace(layout, inputs=((8, 8),))
    with torch.no_grad():
        a, b = (vision([image], [layout])[0] for vision in (before, behind))
    assert (a - b).abs().max() > 1e-4


def test_the_paper_cuts_into_six_and_the_code_into_seven():
    assert PAPER.max_slices == 6
    assert UhdV2Config().max_slices == 7
    assert (
        PAPER.geometry().layout((336, 336 * 7)).tiles != UhdV2Config().geometry().layout((336, 336 * 7)).tiles
    )


def test_the_paper_puts_a_comma_before_the_overview_of_one_column():
    compatible, paper = (
        replace(V2, before_overview=way).geometry().layout((200, 50)).runs[-2].text
        for way in ("first", PAPER.before_overview)
    )
    assert (compatible, paper) == ("\n", ",")


def test_the_papers_preset_is_all_of_it():
    kernel = PAPER.upsampler.kernel if PAPER.upsampler else None
    assert kernel == KernelConfig(distance="pixels", similarity="sigma", normalise="count", correction=False)
    assert PAPER.upsampler is not None
    assert PAPER.upsampler.corrections == "none"
    assert PAPER.windows == WindowConfig(query_sets=1, bins="paper", level_code="behind", window_code=True)
    assert PAPER.organised
    assert (PAPER.newline, PAPER.comma) == ("\n", ",")
    recipe = load_recipe("uhd_v2_paper")
    assert recipe.model.vision == PAPER
    assert recipe.stages[1].train == ("vision.branches", "projector", "language")
    assert "vision.upsampler.corrections" in load_recipe("uhd_v2").stages[1].train


def test_releases_have_llamas_ids_and_their_own_levels_and_order():
    for name, levels, organised in (
        ("uhd_v2_vicuna_7b", (0, 1, 2), True),
        ("uhd_v2_vicuna_13b", (0, 2), False),
        ("uhd_v2_qwen2_7b", (0, 2), False),
    ):
        settings = PUBLISHED[name].settings
        assert isinstance(settings, UhdV2Config)
        assert (settings.levels, settings.organised) == (levels, organised)
        assert (settings.newline, settings.comma) == ((13,), (29892,))
        runs = settings.geometry().layout((672, 1008)).runs
        assert {run.ids for run in runs if not run.count} == {(13,), (29892,)}


def test_the_papers_training_of_the_upsampler_differs_where_the_paper_does():
    code, paper = (load_recipe(name) for name in ("uhd_v2_upsampler", "uhd_v2_upsampler_paper"))
    assert paper.model.upsampler == PAPER.upsampler
    assert code.model.upsampler == UhdV2Config().upsampler
    (ours,), (theirs,) = code.stages, paper.stages
    assert (ours.optimiser.name, theirs.optimiser.name) == ("nadam", "adam")
    assert (ours.optimiser.clip_steps, theirs.optimiser.max_grad_norm) == (10, 0)
    assert (ours.losses, theirs.losses) == ({"reconstruction": 1, "crf": 0.001}, {"reconstruction": 1})
    assert (ours.random_projection, theirs.random_projection) == (30, None)
    assert (ours.uncertainty, theirs.uncertainty) == ("code", "paper")


def test_new_models_have_the_tokenizers_own_separators():
    runs = V2.geometry().layout((96, 96)).runs
    assert {run.text for run in runs if not run.count} == {"\n", ","}
