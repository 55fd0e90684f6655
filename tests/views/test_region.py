"""Close-ups: what is cut out around a region, and what every kind of system makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepwell.models.anyres import AnyResConfig
from stepwell.models.inf import InfConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.models.uhd import UhdV1Config, UhdV2Config
from stepwell.views.region import (
    RegionConfig,
    cut_around,
    region_in_pixels,
    region_in_words,
    region_of_fractions,
    regions_beside,
    size_of,
    whole_cells,
)

VIT = {"dim": 32, "depth": 2, "num_heads": 2, "position_grid": [4, 4]}


def branches(*sizes):
    return tuple(
        BranchConfig(encoder="deit_t", size=size, arguments=VIT, interactions=((0, 0), (1, 1)))
        for size in sizes
    )


INTERACTION = {"num_heads": 4, "drop_path": 0.0}
MERGE = {"num_groups": 4, "place": 0.5}
SYSTEMS = {
    "piip": PiipConfig(
        branches=branches(64, 96, 128), interaction=INTERACTION, projector=MERGE, framing="aspect"
    ),
    "piip in squares": PiipConfig(branches=branches(64, 128), interaction=INTERACTION, projector=MERGE),
    "piip cropped": PiipConfig(
        branches=branches(64, 128), interaction=INTERACTION, projector=MERGE, framing="crop"
    ),
    "pyramid_shared": PyramidSharedConfig(
        encoder="deit_t", sizes=(64, 128), arguments=VIT, projector=MERGE, framing="aspect"
    ),
    "llava_hr": LlavaHrConfig(
        fast="deit_t",
        slow="convnext_t",
        size=256,
        fast_least=64,
        adapters=1,
        framing="aspect",
        fast_arguments={**VIT, "class_token": False},
        slow_arguments={"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
    ),
    "anyres": AnyResConfig(encoder="deit_t", size=64, arguments=VIT),
    "uhd_v1": UhdV1Config(encoder="deit_t", size=64, arguments=VIT, windows={"grid": [2, 2], "num_heads": 2}),
    "uhd_v2": UhdV2Config(encoder="deit_t", size=64, arguments=VIT, windows={"grid": [2, 2], "num_heads": 2}),
    "inf": InfConfig(encoder="deit_t", size=64, resolutions=(64, 192), arguments=VIT),
    "inf by aspect": InfConfig(encoder="deit_t", size=64, resolutions=(64,), max_crops=6, arguments=VIT),
}
SIZE, REGION = (400, 600), (300, 100, 420, 140)


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request):
    config = SYSTEMS[request.param]
    torch.manual_seed(0)
    vision = config.build(48).eval()
    with torch.no_grad():
        for name, parameter in vision.named_parameters():
            if "gate" in name or not parameter.any():  # branches talk, and nothing that is added is zero
                parameter.normal_(std=0.3)
    return config, vision


def picture(size=SIZE, seed=0):
    torch.manual_seed(seed)
    height, width = size
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


def painted(image, box, seed):
    """The image with noise in a box."""
    left, top, right, bottom = box
    painted = image.copy()
    painted.paste(picture((bottom - top, right - left), seed), (left, top))
    return painted


@torch.no_grad()
def features(vision, image, layout):
    (found,) = vision.encode(vision.geometry.inputs(image, layout), [layout])
    return found


def lies_in(box, other):
    return all(a >= b for a, b in zip(box[:2], other[:2], strict=True)) and all(
        a <= b for a, b in zip(box[2:], other[2:], strict=True)
    )


def test_the_finest_views_show_the_region_and_the_others_the_whole(system):
    _, vision = system
    layout = vision.geometry.close_up(SIZE, REGION)
    height, width = layout.fine_size
    assert layout.region == REGION
    assert lies_in(REGION, layout.cut)
    assert lies_in(layout.cut, (0, 0, SIZE[1], SIZE[0]))
    assert (layout.cut[2] - layout.cut[0], layout.cut[3] - layout.cut[1]) == (width, height)
    whole = {
        view.box for view in vision.geometry.layout(SIZE).views if view.name[:5] not in ("local", "slice")
    }
    names = {view.name for view in layout.views if view.box not in whole}
    assert names
    assert len(names) < len(layout.views)
    for view in layout.views:
        if view.box not in whole:
            assert view.box[2] - view.box[0] <= max(width, height) + 1e-6
    inputs = vision.geometry.inputs(picture(), layout)
    assert [tuple(tensor.shape[1:]) for tensor in inputs] == list(layout.inputs)
    views = vision.geometry.views(inputs, layout)
    assert [tuple(tensor.shape[1:]) for tensor in views] == [view.size for view in layout.views]
    assert len(features(vision, picture(), layout).tokens) == layout.num_visual


def test_tokens_follow_what_is_in_the_region_and_hear_of_the_rest(system):
    _, vision = system
    layout, image = vision.geometry.close_up(SIZE, REGION), picture()
    tokens = features(vision, image, layout).tokens
    for box in (REGION, (120, 250, 200, 400)):
        assert not torch.equal(features(vision, painted(image, box, 1), layout).tokens, tokens)


def test_batches_of_regions_are_answered_as_alone(system):
    _, vision = system
    image, other = picture(), picture(seed=3)
    asked = [
        (image, REGION),
        (other, (10, 20, 130, 60)),
        (image, None),
        (other, (0, 0, 600, 400)),
        (image, REGION),
    ]
    layouts = [vision.geometry.layout_of(SIZE, region) for _, region in asked]
    inputs = [vision.geometry.inputs(x, layout) for (x, _), layout in zip(asked, layouts, strict=True)]
    with torch.no_grad():
        together = vision.encode([tensor for tensors in inputs for tensor in tensors], layouts)
        tokens = vision([tensor for tensors in inputs for tensor in tensors], layouts)
    for i, found in enumerate(together):
        alone = features(vision, asked[i][0], layouts[i])
        torch.testing.assert_close(found.tokens, alone.tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens[i], alone.tokens, rtol=1e-4, atol=1e-4)
        assert len(found.maps) == len(alone.maps)
        for one, same in zip(found.maps, alone.maps, strict=True):
            torch.testing.assert_close(one.map, same.map, rtol=1e-4, atol=1e-4)


def test_maps_of_a_close_up_know_their_views_and_strides(system):
    config, vision = system
    layout = vision.geometry.close_up(SIZE, REGION)
    maps = features(vision, picture(), layout).maps
    are_crops = config.kind == "inf"  # cut out of an input, at its size
    told = [found for found in maps if are_crops or found.view.size in layout.inputs]
    assert told
    for found in told:
        rows, cols = found.map.shape[-2:]
        height, width = found.view.size
        assert (round(height / rows, 6), round(width / cols, 6)) == (found.stride,) * 2


@pytest.mark.parametrize(
    "config",
    [
        PlainConfig(encoder="deit_t", size=64, arguments=VIT),
        AnyResConfig(encoder="deit_t", size=64, arguments=VIT, grids=()),
        InfConfig(encoder="deit_t", size=64, resolutions=(64,), arguments=VIT),
        PyramidSharedConfig(encoder="deit_t", sizes=(64,), arguments=VIT, projector=MERGE),
    ],
)
def test_a_system_of_one_view_takes_no_region(config):
    with pytest.raises(ValueError, match="one view, which always shows the whole image"):
        config.geometry().close_up(SIZE, REGION)
    assert config.geometry().layout_of(SIZE, None) == config.geometry().layout(SIZE)


@pytest.mark.parametrize("whole", [(0, 0, 600, 300), (1, 1, 599, 299)])
def test_the_region_that_is_all_is_seen_as_the_image_is(whole):
    """Up to how the smaller views are made: from the image itself, and not from the largest view."""
    vision = SYSTEMS["piip"].build(48).eval()
    for module in vision.modules():
        for name in ("gate", "ffn_gate"):
            if isinstance(getattr(module, name, None), torch.nn.Parameter):
                torch.nn.init.constant_(getattr(module, name), 0.3)
    image = Image.linear_gradient("L").resize((600, 300)).convert("RGB")
    layout, close = vision.geometry.layout((300, 600)), vision.geometry.close_up((300, 600), whole)
    assert close.cut == (0, 0, 600, 300)
    assert [view.grid for view in close.views] == [view.grid for view in layout.views]
    seen, closely = features(vision, image, layout), features(vision, image, close)
    assert (seen.tokens - closely.tokens).abs().max() < 0.02 * seen.tokens.abs().max()


def test_native_pixels_are_cut_whole():
    geometry = SYSTEMS["piip"].geometry()
    layout, image = geometry.close_up(SIZE, (300, 100, 360, 120)), picture()
    left, top, right, bottom = layout.cut
    assert layout.views[-1].size == (bottom - top, right - left) == (32, 80)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (geometry.mean, geometry.std))
    shown = (geometry.inputs(image, layout)[-1] * std + mean) * 255
    expected = torch.from_numpy(np.array(image.crop(layout.cut))).movedim(2, 0)
    torch.testing.assert_close(shown, expected.float(), rtol=0, atol=1e-3)


def test_a_part_of_a_small_image_is_enlarged_as_the_image_would_be():
    geometry = SYSTEMS["piip"].geometry()
    whole, close = geometry.layout((40, 60)), geometry.close_up((40, 60), (10, 10, 30, 20))
    width = close.cut[2] - close.cut[0]
    assert close.views[-1].size[1] / width >= 0.9 * whole.views[-1].size[1] / 60 > 1.5


def test_a_square_part_needs_crops_enough():
    geometry = InfConfig(encoder="deit_t", size=64, resolutions=(64,), max_crops=2, arguments=VIT).geometry()
    assert geometry.close_up((300, 400), (50, 60, 350, 120)).tiles == (1, 2)
    with pytest.raises(ValueError, match="one crop of at most 2; give a longer region"):
        geometry.close_up((300, 400), (100, 100, 200, 200))


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (5, 7), (2000, 1000)])
@pytest.mark.parametrize("kind", SYSTEMS)
def test_any_region_of_any_image_is_cut_from_it(size, kind):
    geometry = SYSTEMS[kind].geometry()
    height, width = size
    for region in [
        (0, 0, width, height),
        (0, 0, 1, 1),
        (width - 1, height - 1, width, height),
        (width // 2, 0, width // 2 + 1, height),
    ]:
        layout = geometry.close_up(size, region)
        assert lies_in(region, layout.cut)
        assert lies_in(layout.cut, (0, 0, width, height))
        assert all(min(view.grid) >= 1 for view in layout.views)
        shapes = [tuple(x.shape[1:]) for x in geometry.inputs(Image.new("RGB", (width, height)), layout)]
        assert shapes == list(layout.inputs)


def test_a_margin_is_by_the_shorter_side_and_stays_in_the_image():
    config = RegionConfig(margin=0.5)
    assert cut_around((100, 50, 200, 70), (400, 600), config, (1, 1)) == (90, 40, 210, 80)
    assert cut_around((0, 380, 100, 400), (400, 600), config, (1, 1)) == (0, 360, 120, 400)
    assert cut_around((100, 50, 200, 70), (400, 600), config, (100, 1)) == (90, 10, 210, 110)
    assert cut_around((100, 50, 200, 70), (60, 150), config, (100, 1000)) == (0, 0, 150, 60)


@pytest.mark.parametrize(
    ("enlarge", "region", "view"),
    [
        (1, (100, 50, 164, 66), (32, 80)),
        (2, (100, 50, 164, 66), (48, 144)),
        (4, (100, 50, 364, 66), (32, 320)),
    ],
)
def test_views_of_whole_cells_keep_the_aspect(enlarge, region, view):
    config = RegionConfig(margin=0.25, enlarge=enlarge)
    cut, size = whole_cells(region, (400, 600), config, side=320, stride=16, min_cells=1)
    assert size == view
    height, width = size_of(cut)
    assert size[0] / height == pytest.approx(size[1] / width, rel=0.03)
    assert size[0] / height <= enlarge + 0.01


@pytest.mark.parametrize(
    ("region", "complaint"),
    [
        ((0, 0, 0.5, 0.5), "seem to be fractions"),
        ((700, 0, 800, 10), "lies outside the image, which is 600 x 400 pixels"),
        ((-20, 0, -10, 10), "lies outside"),
        ((10, 0, 10, 10), "left < right and top < bottom"),
        ((10, 20, 20, 10), "left < right and top < bottom"),
        ((0, 0, float("nan"), 10), "in numbers"),
        ((0, 0, 10), r"a region is \(left, top, right, bottom\), got \(0, 0, 10\)"),
        ("1234", "a region is"),
        (5, "a region is"),
        ([None, 0, 1, 1], "a region is"),
    ],
)
def test_what_is_no_region_is_told_in_a_line(region, complaint):
    with pytest.raises(ValueError, match=complaint) as told:
        region_in_pixels(region, SIZE)
    assert "\n" not in str(told.value)


def test_regions_in_pixels_and_in_fractions():
    assert region_in_pixels((10.2, 20.9, 30.1, 40), SIZE) == (10, 20, 31, 40)
    assert region_in_pixels((-5, -5, 700, 500), SIZE) == (0, 0, 600, 400)
    assert region_in_pixels((0, 0, 1, 1), SIZE) == (0, 0, 1, 1)
    assert region_of_fractions((0.1, 0.35, 0.7, 0.55), SIZE) == (60, 140, 420, 220)
    assert region_of_fractions((0, 0, 1, 1), SIZE) == (0, 0, 600, 400)
    assert region_of_fractions((0.5, 0.5, 0.5 + 1e-10, 0.9), SIZE) == (300, 200, 301, 360)
    assert region_of_fractions((1 - 1e-12, 0.5, 1, 0.9), SIZE) == (599, 200, 600, 360)
    with pytest.raises(ValueError, match="in fractions of the image's sides"):
        region_of_fractions((10, 20, 300, 400), SIZE)


def test_regions_beside_images():
    assert regions_beside("Asia", 0) == []
    box = [0.1, 0.2, 0.3, 0.4]
    assert regions_beside(None, 2) == [None, None]
    assert regions_beside(box, 1) == [tuple(box)]
    assert regions_beside([box], 1) == [tuple(box)]
    assert regions_beside([None, box], 2) == [None, tuple(box)]
    for wrong in (box, [box]):
        with pytest.raises(ValueError, match="1 region stands beside 2 images"):
            regions_beside(wrong, 2)
    with pytest.raises(ValueError, match="a region is"):
        regions_beside("0.1,0.2,0.3,0.4", 1)


@pytest.mark.parametrize(
    ("region", "least", "most"),
    [
        ((100, 100, 300, 110), 3.9, 4.1),  # 10 pixels become 40
        ((100, 100, 300, 132), 1.2, 1.3),
        ((100, 100, 300, 160), 0.99, 1.01),  # what is larger is not made smaller
        ((100, 100, 300, 104), 4.5, 5.1),  # by no more than enlarge
    ],
)
def test_small_regions_are_enlarged_until_they_can_be_read(region, least, most):
    config = RegionConfig(margin=0.05, enlarge=5.0, short_side=40)
    cut, (height, _) = whole_cells(region, (4000, 3000), config, side=1280, stride=16, min_cells=2)
    assert least <= height / size_of(cut)[0] <= most


def test_views_of_regions_come_in_few_sizes_where_a_grain_is_told():
    config = RegionConfig(margin=0.05, enlarge=5.0, short_side=32, grain=4)
    seen = set()
    for width in range(20, 300):
        region = (100, 100, 100 + width, 112)
        cut, size = whole_cells(region, (400, 600), config, side=640, stride=16, min_cells=2)
        assert cut[0] <= 100 < 100 + width <= cut[2]
        assert size[0] / size_of(cut)[0] == pytest.approx(size[1] / size_of(cut)[1], rel=0.08)
        seen.add(size[1])
    assert seen == set(range(64, 641, 64))
    _, (height, _) = whole_cells((100, 100, 112, 180), (400, 600), config, side=640, stride=16, min_cells=2)
    assert height % 64 == 0  # the longer side, whichever it is


def test_a_region_of_a_small_image_is_enlarged_no_further_than_told():
    config = RegionConfig(margin=0.0, enlarge=5.0, short_side=40)
    cut, (height, _) = whole_cells((0, 100, 160, 140), (200, 160), config, side=1280, stride=16, min_cells=2)
    assert height / size_of(cut)[0] == pytest.approx(1.0, rel=0.05)


def test_views_of_squares_are_enlarged_as_little():
    told = PiipConfig(
        branches=branches(64, 128),
        interaction=INTERACTION,
        projector=MERGE,
        region=RegionConfig(enlarge=4.0, short_side=40),
    )
    cut = told.geometry().close_up(SIZE, (300, 100, 400, 120)).cut
    assert size_of(cut) == (64, 110)  # 128 pixels at twice the size, and what the region needs across


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("Read [0.037, 0.376, 0.223, 0.405]", (0.037, 0.376, 0.223, 0.405)),
        ("What is in [0,0,1,1]?", (0, 0, 1, 1)),
        ("[ .5 , 0.25 , 1.0 , 1 ]", (0.5, 0.25, 1, 1)),
        ("Is [0.1, 0.1, 0.2, 0.2] above [0.1, 0.3, 0.2, 0.4]?", None),
        ("Read [12, 40, 80, 60]", None),
        ("Read [0.5, 0.1, 0.2, 0.2]", None),
        ("Read [0.1, 0.1, 1.2, 0.2]", None),
        ("Read [0.1, 0.1, 0.2]", None),
        ("What is the total?", None),
    ],
)
def test_a_question_may_tell_one_box_in_words(text, box):
    assert region_in_words(text) == box


@pytest.mark.parametrize("region", [(10**400, 1, 2, 3), {"0": 1, "1": 2, "2": 3, "3": 4}, "1234"])
def test_what_is_no_region_is_refused_in_a_line(region):
    with pytest.raises(ValueError, match=r"a region is \(left, top, right, bottom\), got"):
        region_in_pixels(region, SIZE)
