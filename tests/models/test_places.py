"""Where visual tokens look: every system's layout tells it, and its tokens keep to it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from visions import VISIONS

from stepwell.layers.position import fraction_embedding
from stepwell.models.fewer_tokens import FewerTokensConfig
from stepwell.models.placed import PlacedConfig, place_codes
from stepwell.models.vision import settings_json
from stepwell.structures import TokenGrid
from stepwell.views.places import finest_views, tokens_at

SIZES = [(90, 60), (64, 64), (50, 190), (301, 40)]
REGION = (10, 12, 40, 30)


def layouts_of(config):
    geometry = config.geometry()
    layouts = [geometry.layout(size) for size in SIZES]
    try:
        layouts.append(geometry.close_up((90, 60), REGION))
    except ValueError:
        assert config.kind in ("plain", "inf")  # one view, or a part that is one crop
    return layouts


def places_of(layout):
    return [token for _, rows in layout.grids for row in rows for token in row]


@pytest.mark.parametrize("kind", VISIONS)
def test_every_visual_token_but_newlines_has_one_place(kind):
    for layout in layouts_of(VISIONS[kind]):
        places = places_of(layout)
        if kind == "averaged":
            places = sorted(set(places))
        if kind == "dropped":
            places = [place for place in places if place >= 0]
        assert len(set(places)) == len(places)
        rest = set(range(layout.num_visual)) - set(places)
        assert set(places) <= set(range(layout.num_visual))
        assert not rest or kind in ("anyres", "placed")
        assert len(rest) <= max(len(rows) for _, rows in layout.grids)


def without_mixing(vision):
    """Attention that adds nothing leaves to each token what stands at its place."""
    with torch.no_grad():
        for name, parameter in vision.named_parameters():
            if "attn" in name and parameter.ndim == 2:
                parameter.zero_()
    return vision.eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["plain", "piip", "anyres", "inf", "pyramid_shared", "averaged", "dropped"])
def test_a_token_is_the_one_that_changes_with_the_pixels_at_its_place(kind, size):
    torch.manual_seed(0)
    vision = without_mixing(VISIONS[kind].build(48))
    layout = vision.geometry.layout(size)
    height, width = size
    points = [(0.3 * width, 0.2 * height), (0.8 * width, 0.7 * height)]
    blank = Image.new("RGB", (width, height), "white")
    before = tokens_of(vision, blank, layout)
    for point, token in zip(points, tokens_at(layout.grids, torch.tensor(points)).tolist(), strict=True):
        if token < 0:
            assert kind == "dropped"
            continue
        painted = blank.copy()
        painted.paste("black", cell_around(layout.grids, point))
        change = (tokens_of(vision, painted, layout) - before).norm(dim=1)
        assert change[token] > 0.5 * change.max()


def cell_around(grids, point):
    """The smallest cell that holds a point, in whole pixels."""
    boxes = []
    for (left, top, right, bottom), rows in grids:
        width, height = (right - left) / len(rows[0]), (bottom - top) / len(rows)
        x, y = left + (point[0] - left) // width * width, top + (point[1] - top) // height * height
        if left <= point[0] <= right and top <= point[1] <= bottom:
            boxes.append((width * height, tuple(round(at) for at in (x, y, x + width, y + height))))
    return min(boxes)[1]


@torch.no_grad()
def tokens_of(vision, image, layout):
    return vision(vision.geometry.inputs(image, layout), [layout])[0]


@pytest.mark.parametrize("organised", [True, False])
def test_tokens_of_slices_lie_where_their_slice_lies(organised):
    config = VISIONS["uhd_v2"].adjusted({"organised": organised})
    layout = config.geometry().layout((60, 120))
    assert layout.tiles == (1, 2)
    inside = torch.tensor([(15.0, 45.0), (100.0, 10.0)])  # left, below; right, above
    assert tokens_at(layout.grids, inside).tolist() == ([4, 3] if organised else [2, 5])
    (overview,) = [grid for grid in layout.grids if grid.box == (0, 0, 120, 60)]
    assert [list(row) for row in overview.rows] == [[8, 9], [10, 11]]


def test_cells_without_padding_lie_on_the_image():
    geometry = VISIONS["anyres"].geometry()
    layout = geometry.layout((60, 190))
    box, rows = layout.grids[-1]
    assert box[0] == pytest.approx(0, abs=1e-6)
    assert box[2] == pytest.approx(190, abs=1e-6)
    cell = (box[3] - box[1]) / len(rows)
    assert -cell < box[1] <= cell
    assert 60 - cell <= box[3] < 60 + cell


def test_the_smallest_cells_that_hold_a_point_tell_its_token():
    coarse = TokenGrid.over((0, 0, 100, 100), (2, 2))
    fine = TokenGrid.over((0, 0, 50, 100), (4, 1), first=4)
    points = torch.tensor(
        [(10.0, 60.0), (80.0, 60.0), (50.0, 100.0), (100.0, 0.0), (101.0, 5.0), (5.0, -1.0)]
    )
    for grids in ([coarse, fine], [fine, coarse]):
        assert tokens_at(grids, points).tolist() == [6, 3, 7, 1, -1, -1]
    assert tokens_at([], points).tolist() == [-1] * 6


def test_a_grid_counts_from_row_to_row():
    grid = TokenGrid.over((0, 0, 1, 1), (2, 3), first=5, step=10)
    assert [list(row) for row in grid.rows] == [[5, 6, 7], [15, 16, 17]]


@pytest.mark.parametrize("kind", VISIONS)
def test_the_finest_views_are_the_tiles_or_the_last(kind):
    for layout in layouts_of(VISIONS[kind]):
        views = [layout.views[i] for i in finest_views(layout)]
        names = {view.name.partition(" ")[0] for view in views}
        if layout.tiles == (0, 0):
            assert views == [layout.views[-1]]
        else:
            assert len(views) == layout.tiles[0] * layout.tiles[1]
            assert names <= {"slice", "tile", "local"}


@pytest.mark.parametrize("kind", ["piip", "uhd_v1", "anyres"])
def test_averaged_tokens_are_means_of_neighbours_in_a_row(kind):
    torch.manual_seed(0)
    config = FewerTokensConfig(system=settings_json(VISIONS[kind]), factor=3)
    vision = config.build(48).eval()
    for size in SIZES:
        whole, layout = vision.system.geometry.layout(size), vision.geometry.layout(size)
        image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
        all_tokens = tokens_of(vision.system, image, whole)
        few = tokens_of(vision, image, layout)
        assert len(few) == layout.num_visual < len(all_tokens) / 1.4
        for (box, rows), (same, fewer) in zip(whole.grids, layout.grids, strict=True):
            assert box == same
            for row, left in zip(rows, fewer, strict=True):
                for start in range(0, len(row), 3):
                    part = [*row][start : start + 3]
                    assert left[start : start + 3] == (left[start],) * len(part)
                    torch.testing.assert_close(few[left[start]], all_tokens[part].mean(0))


@pytest.mark.parametrize("kind", ["piip", "uhd_v2", "anyres"])
def test_dropped_tokens_leave_the_others_as_they_were(kind):
    torch.manual_seed(0)
    system = settings_json(VISIONS[kind])
    configs = [FewerTokensConfig(system=system, reduction="drop", seed=seed) for seed in (0, 1)]
    vision, other = configs[0].build(48).eval(), configs[1].geometry()
    for size in SIZES:
        whole, layout = vision.system.geometry.layout(size), vision.geometry.layout(size)
        image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
        places = layout.places
        kept = [token for token, place in enumerate(places) if place >= 0]
        assert [places[token] for token in kept] == [*range(layout.num_visual)]
        pairs = zip(whole.runs, layout.runs, strict=True)
        assert all(2 * few.count - run.count in (0, 1) for run, few in pairs)
        torch.testing.assert_close(
            tokens_of(vision, image, layout), tokens_of(vision.system, image, whole)[kept]
        )
        assert places != other.layout(size).places


def test_separators_stay_where_they_were():
    whole = VISIONS["uhd_v2"].geometry().layout((120, 240))
    layout = FewerTokensConfig(system=settings_json(VISIONS["uhd_v2"])).geometry().layout((120, 240))
    kinds = [(run.text, run.ids) for run in whole.runs]
    assert any(text for text, _ in kinds)
    assert [(run.text, run.ids) for run in layout.runs] == kinds


def test_fields_of_the_system_may_change_too():
    config = FewerTokensConfig(system=settings_json(VISIONS["piip"]))
    changed = config.adjusted({"factor": 3, "sizes": [64, 256], "framing": "pad"})
    assert (changed.factor, changed.largest, changed.inner.framing) == (3, 256, "pad")
    with pytest.raises(ValueError, match=r"vision\.branches of a 'piip' system cannot change"):
        config.adjusted({"branches": []})
    with pytest.raises(ValueError, match="factor"):
        config.adjusted({"factor": 1})


def test_settings_of_the_system_that_are_wrong_are_named():
    with pytest.raises(ValueError, match="kind 'nothing' is none of"):
        FewerTokensConfig(system={"kind": "nothing"})


@pytest.mark.parametrize("kind", ["piip", "uhd_v2", "anyres", "inf"])
def test_tokens_carry_the_code_of_their_place(kind):
    torch.manual_seed(0)
    settings = {"system": settings_json(VISIONS[kind]), "place": 0.5, "place_shortest": 0.05}
    vision = PlacedConfig(**settings).build(48).eval()
    for size in SIZES:
        layout = vision.geometry.layout(size)
        image = Image.effect_noise((size[1], size[0]), 90).convert("RGB")
        codes = (tokens_of(vision, image, layout) - tokens_of(vision.system, image, layout)) / 0.5
        places = set(places_of(layout))
        for token in set(range(layout.num_visual)) - places:
            assert codes[token].abs().max() < 1e-5
        for (left, top, right, bottom), rows in layout.grids:
            middle = (top + (bottom - top) * 0.5 / len(rows)) / size[0]
            last = (right - (right - left) * 0.5 / len(rows[0])) / size[1]
            expected = [fraction_embedding(torch.tensor([at]), 24, shortest=0.05)[0] for at in (last, middle)]
            torch.testing.assert_close(codes[rows[0][-1]], torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_places_are_those_of_a_pyramids_own_merge():
    plain = settings_json(VISIONS["pyramid_shared"])
    own = VISIONS["pyramid_shared"].__class__(
        **{**plain, "projector": {**plain["projector"], "place": 0.3, "place_shortest": 0.02}}
    )
    torch.manual_seed(0)
    merged = own.build(48).eval()
    placed = PlacedConfig(system=plain, place=0.3, place_shortest=0.02).build(48).eval()
    placed.system.load_state_dict(merged.state_dict())
    image = Image.effect_noise((60, 90), 90).convert("RGB")
    layout = merged.geometry.layout((90, 60))
    torch.testing.assert_close(tokens_of(placed, image, layout), tokens_of(merged, image, layout))


def test_codes_need_a_width_of_two_even_halves():
    with pytest.raises(ValueError, match="a width of 50 does not divide by 4"):
        PlacedConfig(system=settings_json(VISIONS["plain"])).build(50)


@pytest.mark.parametrize("kind", VISIONS)
def test_codes_of_places_need_no_values(kind: str) -> None:
    """On the meta device, where training looks which parameters an image reaches."""
    for layout in layouts_of(VISIONS[kind]):
        with torch.device("meta"):
            codes = place_codes(layout, 32)
        assert codes.is_meta
        assert codes.shape == (layout.num_visual, 32)
