"""What happens to images by chance: sizes, parts, flips and colours by the official numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from timm.data.auto_augment import rand_augment_transform
from torchvision import tv_tensors
from torchvision.transforms import v2

from stepwell.data.masks import encode_mask, mask_spans
from stepwell.train import augment
from stepwell.train.augment import (
    ClassifyAugment,
    DeiT3Augment,
    DeiTAugment,
    DetectAugment,
    FixedAugment,
    JitterAugment,
    MultiScaleAugment,
    PhotometricDistortion,
    SegmentCropAugment,
)
from stepwell.train.mask_planes import pack_masks, unpack_masks

COCO = (480, 640)  # height, width of most images
RED, BLUE = (220, 60, 40), (40, 90, 220)
PLACES = ((10, 20, 40, 36), (50, 8, 62, 60))  # xyxy of a red and of a blue block
QUIET = {"flip": 0.0, "colour": False}


def drawn(size=(64, 80), places=PLACES, scale=1):
    """Blocks on white, with their boxes, labels and masks in planes."""
    height, width = (side * scale for side in size)
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    masks = torch.zeros(len(places), height, width, dtype=torch.uint8)
    for place, colour, mask in zip(places, (RED, BLUE), masks, strict=False):
        left, top, right, bottom = (side * scale for side in place)
        image[:, top:bottom, left:right] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(places, dtype=torch.float32).reshape(-1, 4) * scale
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(places)) + 7,
        "masks": tv_tensors.Mask(
            pack_masks(
                [mask_spans(encode_mask(mask), (height, width)) for mask in masks.bool().numpy()],
                (height, width),
            )
        ),
    }


def masks_of(sample):
    return unpack_masks(sample["masks"].as_subclass(torch.Tensor), len(sample["labels"]))


def empty(size):
    """An image without boxes."""
    return drawn((1, 1), places=()) | {
        "image": tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)),
        "masks": tv_tensors.Mask(torch.zeros(0, *size, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size),
    }


def sizes_of(transform, size, times=40):
    """Those of the image that come about."""
    torch.manual_seed(0)
    return [tuple(transform(empty(size))["image"].shape[-2:]) for _ in range(times)]


def extent(mask):
    """xyxy around the pixels of a mask."""
    rows, cols = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [int(x) for x in (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1)]


def coloured(image, colour):
    """Pixels about as coloured as a block."""
    return ((image.int() - torch.tensor(colour)[:, None, None]).abs() < 40).all(0)


def belongs_together(sample, slack=1):
    """Boxes, masks and labels are of the blocks that the image shows, wherever they came to lie."""
    for box, mask, label in zip(sample["boxes"], masks_of(sample), sample["labels"], strict=True):
        shown = coloured(sample["image"], (RED, BLUE)[int(label) - 7])
        assert np.allclose(box, extent(mask), atol=slack)
        assert np.allclose(box, extent(shown), atol=slack)
        assert (shown != mask.bool()).float().mean() < 0.06


# Sizes of detectors


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ((1568, 941), COCO, (941, 1255)),  # 941 / 480 * 640 = 1254.67
        ((1568, 941), (640, 480), (1255, 941)),
        ((1120, 672), (200, 1000), (224, 1120)),
        ((1333, 800), (427, 640), (800, 1199)),  # 800 / 427 * 640 = 1199.06
        ((1333, 800), (333, 999), (444, 1333)),  # 444.33
        ((1333, 800), (3, 1000), (4, 1333)),  # 3.999
    ],
)
def test_fixed_images_are_as_large_as_the_limits_allow(limits, size, expected):
    assert set(sizes_of(FixedAugment().build(limits), size, times=2)) == {expected}


def multi_scale(size, factor=1.0, crop=10**6, times=60):
    return sizes_of(MultiScaleAugment(factor=factor, crop=crop).build((1, 1)), size, times)


def test_whole_images_of_many_scales(monkeypatch):
    """(A): the short side of 480, 512, ..., 800, as far as the long one stays within 1333."""
    monkeypatch.setattr(v2, "RandomChoice", lambda of: of[0])
    sides = {size[0] for size in multi_scale((50, 50), times=100)}
    assert sides == set(range(480, 801, 32))
    assert max(multi_scale((40, 100), times=12)) == (533, 1333)
    assert {min(size) for size in multi_scale((50, 50), factor=0.35, times=100)} == {
        int(0.35 * side) for side in range(480, 801, 32)
    }
    assert max(multi_scale((40, 100), factor=1.75, times=8)) == (933, 2332)  # int(1333 * 1.75), 932.8


def parts_of_many_scales(monkeypatch, factor):
    """(B): sizes of the image, of its part, and of that part in the end."""
    monkeypatch.setattr(v2, "RandomChoice", lambda of: of[1])
    transform = MultiScaleAugment(factor=factor, crop=10**6, flip=0).build((1, 1))
    resize, part, whole = transform.transforms[0].transforms
    torch.manual_seed(0)
    samples = []
    for _ in range(60):
        steps = [empty(COCO)]
        for step in (resize, part, whole):
            steps.append(step(steps[-1]))
        samples.append([tuple(step["image"].shape[-2:]) for step in steps[1:]])
    return zip(*samples, strict=True)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_parts_of_many_scales(monkeypatch, factor):
    whole, parts, end = parts_of_many_scales(monkeypatch, factor)
    assert {size[0] for size in whole} == {int(side * factor) for side in (400, 500, 600)}
    low, high = int(384 * factor), int(600 * factor)
    for size, part, last in zip(whole, parts, end, strict=True):
        for side, of in zip(part, size, strict=True):
            assert min(of, low) <= side <= min(of, high)
        assert last[0] / last[1] == pytest.approx(part[0] / part[1], rel=0.01)
        assert min(last) in {int(side * factor) for side in range(480, 801, 32)} or max(last) == int(
            1333 * factor
        )
    assert len({part[0] - part[1] for part in parts}) > 5  # both sides are drawn


def test_the_bounds_of_a_part_are_among_its_sides():
    part = augment._RandomPart(3, 5)
    assert {shape[0] for shape in sizes_of(part, (9, 9), times=60)} == {3, 4, 5}
    assert set(sizes_of(part, (2, 4), times=60)) == {(2, 3), (2, 4)}


def test_a_part_may_lie_anywhere():
    part = augment._RandomPart(5, 5)
    torch.manual_seed(0)
    places = {tuple(extent(_cornered(part))) for _ in range(200)}
    assert {(left, top) for left, top, *_ in places} == {(i, j) for i in range(3) for j in range(4)}


def _cornered(part):
    """The part of a canvas of 8 x 7 that is taken, as a mask of the canvas."""
    numbers = torch.arange(56).view(1, 8, 7)
    taken = part(tv_tensors.Image(numbers.to(torch.uint8)))
    return torch.isin(numbers[0], taken.long())


def test_both_ways_have_the_same_chance():
    """(A) gives images of the ratio that they had, (B) hardly ever."""
    ratios = [width / height for height, width in multi_scale(COCO, times=150)]
    whole = sum(abs(ratio - 4 / 3) < 0.004 for ratio in ratios)
    assert 55 <= whole <= 95


def test_the_end_is_no_larger_than_the_crop():
    sizes = multi_scale(COCO, crop=512)
    assert max(max(size) for size in sizes) == 512
    assert all(min(size) >= 384 for size in sizes)
    assert len(set(sizes)) > 1


def test_jitter_scales_about_the_limits_and_takes_a_part():
    sizes = sizes_of(JitterAugment(scale=(0.5, 2.0)).build((80, 60)), (60, 80))
    assert max(map(max, sizes)) == 80
    assert min(map(max, sizes)) < 60
    limited = JitterAugment(scale=(2.0, 2.0), crop=32).build((80, 60))
    assert set(sizes_of(limited, (60, 80), times=3)) == {(32, 32)}
    doubled = JitterAugment(scale=(1.26, 1.26), crop=1000).build((80, 61))
    assert set(sizes_of(doubled, (60, 80), times=3)) == {(75, 100)}  # int(1.26 * 80) = 100


# What is known of an image follows it


@pytest.mark.parametrize(
    "settings", [FixedAugment(flip=1.0), FixedAugment(flip=0.0, vertical_flip=1.0)], ids=["left", "up"]
)
def test_flips_are_exact(settings):
    before = drawn()
    after = settings.build((80, 64))(before)
    axis = -1 if settings.flip else -2
    assert torch.equal(after["image"], before["image"].flip(axis))
    assert torch.equal(masks_of(after), masks_of(before).flip(axis))
    expected = [[40, 20, 70, 36], [18, 8, 30, 60]] if settings.flip else [[10, 28, 40, 44], [50, 4, 62, 56]]
    assert after["boxes"].tolist() == expected
    assert after["labels"].tolist() == [7, 8]
    belongs_together(after, slack=0)


def test_half_of_the_images_are_flipped():
    transform, before = FixedAugment().build((80, 64)), drawn()
    torch.manual_seed(0)
    flipped = sum(not torch.equal(transform(before)["image"], before["image"]) for _ in range(100))
    assert 35 < flipped < 65


@pytest.mark.parametrize(
    "settings",
    [
        FixedAugment(vertical_flip=0.5),
        MultiScaleAugment(factor=0.3, crop=240),
        JitterAugment(colour=False),
    ],
    ids=["fixed", "multi_scale", "jitter"],
)
def test_boxes_masks_and_labels_stay_with_their_objects(settings):
    transform, before = settings.build((160, 128)), drawn(scale=3)
    torch.manual_seed(0)
    counts = set()
    for _ in range(12):
        after = transform(before)
        belongs_together(after, slack=2)
        counts.add(len(after["boxes"]))
        assert after["boxes"].canvas_size == tuple(after["image"].shape[-2:])
    assert counts <= {0, 1, 2}
    assert 2 in counts


def test_a_resized_box_is_exactly_the_scaled_box():
    after = FixedAugment(flip=0).build((101, 101))(drawn())
    assert tuple(after["image"].shape[-2:]) == (81, 101)  # 80.8
    scale = torch.tensor([101 / 80, 81 / 64] * 2)
    torch.testing.assert_close(after["boxes"].as_subclass(torch.Tensor), torch.tensor(PLACES) * scale)


def test_images_are_resized_without_antialiasing_and_masks_by_their_nearest_pixels():
    before = drawn(scale=4)
    after = FixedAugment(flip=0).build((80, 64))(before)
    expected = torch.nn.functional.interpolate(before["image"][None].float(), (64, 80), mode="bilinear")[0]
    assert (after["image"].float() - expected).abs().max() <= 1
    assert torch.equal(masks_of(after), masks_of(before)[:, ::4, ::4])


@pytest.mark.parametrize(
    ("top", "left", "box", "label"), [(16, 25, [0, 4, 15, 20], 7), (10, 45, [5, 0, 17, 30], 8)]
)
def test_a_crop_clips_boxes_and_drops_those_that_it_leaves_out(monkeypatch, top, left, box, label):
    """A part of 30 x 24 with some of one block, and nothing of the other."""
    place = {"top": top, "left": left, "height": 30, "width": 24}
    monkeypatch.setattr(augment, "_place", lambda size, part: place)
    after = JitterAugment(scale=(1.0, 1.0), crop=30, **QUIET).build((80, 64))(drawn())
    assert after["boxes"].tolist() == [box]
    assert after["labels"].tolist() == [label]
    assert masks_of(after).shape == (1, 30, 24)
    assert extent(masks_of(after)[0]) == box


@pytest.mark.parametrize(
    "settings", [FixedAugment(), MultiScaleAugment(factor=0.2, crop=64), JitterAugment()]
)
def test_images_without_objects_pass(settings):
    torch.manual_seed(0)
    for _ in range(4):
        after = settings.build((80, 64))(empty((60, 40)))
        height, width = after["image"].shape[-2:]
        assert after["boxes"].shape == (0, 4)
        assert after["labels"].shape == (0,)
        assert after["masks"].shape == (0, height, width)


# Segmenters


def maps(labels):
    labels = torch.as_tensor(labels)
    image = (labels * 100).clamp(max=255).to(torch.uint8).expand(3, -1, -1)
    return {"image": tv_tensors.Image(image), "labels": tv_tensors.Mask(labels)}


def halves(size=(40, 60), border=30):
    """Class 0 at the left, 1 at the right."""
    return (torch.arange(size[1]) >= border).long().expand(size)


def test_segmenters_scale_by_the_ratio_and_keep_to_the_limit(monkeypatch):
    settings = SegmentCropAugment(crop=10**5, **QUIET)
    torch.manual_seed(0)
    transform = settings.build(10**5, 64)
    sides = [min(transform(maps(halves()))["image"].shape[-2:]) for _ in range(60)]
    assert min(sides) < 40
    assert max(sides) > 115
    assert all(32 <= side <= 128 for side in sides)
    fixed = SegmentCropAugment(crop=10**5, scale=(0.5, 0.5), long_limit=150, **QUIET)
    assert fixed.build(10**5, 64)(maps(halves((20, 60))))["image"].shape[-2:] == (25, 75)  # int(150 / 2)
    free = SegmentCropAugment(crop=10**5, scale=(1.0, 1.0), long_limit=None, **QUIET)
    assert free.build(10**5, 64)(maps(halves((1, 300))))["image"].shape[-2:] == (64, 19200)
    monkeypatch.setattr(augment, "_uniform", lambda low, high: 1.01)
    assert settings.build(10**5, 64)(maps(halves((64, 64))))["image"].shape[-2:] == (64, 64)  # int(64.64)


def test_a_map_follows_its_image():
    transform = SegmentCropAugment(flip=0.5, vertical_flip=0.5, colour=False).build(48, 64)
    torch.manual_seed(0)
    for _ in range(8):
        after = transform(maps(halves()))
        assert after["labels"].shape == after["image"].shape[-2:]
        assert ((after["image"][0].float() - 100 * after["labels"]).abs() > 1).float().mean() < 0.1
        assert set(after["labels"].unique().tolist()) <= {0, 1}


def crops_of(labels, side, most=0.75):
    """Class counts of 60 crops."""
    crop = augment._CropOfClasses(side, most)
    torch.manual_seed(0)
    crops = [crop(maps(labels))["labels"] for _ in range(60)]
    assert {tuple(x.shape) for x in crops} == {(min(side, labels.shape[0]), min(side, labels.shape[1]))}
    return [x.as_subclass(torch.Tensor) for x in crops]


def test_crops_are_drawn_until_no_class_has_too_much():
    """Of 100 columns, 10 places of a crop 20 wide have either class below 75 %."""
    labels = halves((20, 100), border=50)
    shares = [float(crop.float().mean()) for crop in crops_of(labels, 20)]
    good = sum(0.25 < share < 0.75 for share in shares)
    assert good > 30  # 1 - (72 / 81) ** 11 = 0.73 of 60
    everywhere = [float(crop.float().mean()) for crop in crops_of(labels, 20, most=1.0)]
    assert sum(0.25 < share < 0.75 for share in everywhere) < good


def test_the_share_is_below_the_most():
    """A crop of 4 columns of which one is of the other class has exactly 75 % of one."""
    labels = torch.tensor([[0, 0, 0, 1]]).repeat(4, 30)
    assert all(torch.equal(crop.unique(), torch.tensor([0, 1])) for crop in crops_of(labels, 4))
    counts = {"n": 0}

    def counting(size, part):
        counts["n"] += 1
        return {"top": 0, "left": 0, "height": part[0], "width": part[1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "_place", counting)
        augment._CropOfClasses(4, 0.75)(maps(labels))
        assert counts["n"] == 11  # ten times again
        counts["n"] = 0
        augment._CropOfClasses(4, 0.76)(maps(labels))
        assert counts["n"] == 1


def test_ignored_pixels_are_of_no_class():
    """With them, the one class would have 40 % of a crop; a crop of one class alone is drawn again."""
    labels = torch.full((10, 40), augment.IGNORED)
    labels[:4] = 0
    labels[:4, 36:] = 1
    calls = []

    def counting(size, part):
        calls.append(1)
        return {"top": 0, "left": 0, "height": part[0], "width": part[1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "_place", counting)
        augment._CropOfClasses(10, 0.75)(maps(labels))
        assert len(calls) == 11
        augment._CropOfClasses(10, 0.75)(maps(torch.full((10, 40), augment.IGNORED)))
        assert len(calls) == 22


# Colours


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [PhotometricDistortion().make_params([]) for _ in range(400)]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", -32 / 255, 32 / 255),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -0.1, 0.1),
    ],
)
def test_colours_vary_in_their_ranges_every_other_time(parameters, name, low, high):
    values = [each[name] for each in parameters if each[name] is not None]
    assert 150 < len(values) < 250
    width = high - low
    assert low <= min(values) < low + width / 20
    assert high - width / 20 < max(values) <= high


def test_contrast_comes_before_or_behind_the_colours(parameters):
    assert 150 < sum(each["contrast_first"] for each in parameters) < 250


NONE = {"brightness": None, "contrast": None, "saturation": None, "hue": None, "contrast_first": True}


def changed(pixels, **parameters):
    image = tv_tensors.Image(torch.tensor(pixels, dtype=torch.uint8).view(3, 1, -1))
    return PhotometricDistortion().transform(image, NONE | parameters).flatten().tolist()


def test_what_the_colours_do():
    assert changed([10, 100, 250], brightness=20 / 255) == [30, 120, 255]
    assert changed([10, 100, 250], contrast=1.5) == [15, 150, 255]
    assert changed([200, 50, 50], hue=1 / 3) == [50, 200, 50]  # a third of a turn
    gray = 0.2989 * 200 + 0.587 * 50 + 0.114 * 50
    expected = [0.5 * value + 0.5 * gray for value in (200, 50, 50)]
    assert changed([200, 50, 50], saturation=0.5) == pytest.approx(expected, abs=1)
    # saturated first, 300 is cut to 255 before it is halved
    assert changed([250, 50, 50], saturation=1.5, contrast=0.5, contrast_first=False)[0] == 127
    assert changed([250, 50, 50], saturation=1.5, contrast=0.5, contrast_first=True)[0] > 128


def test_maps_and_boxes_keep_their_values():
    torch.manual_seed(0)
    sample = drawn()
    after = v2.Compose([PhotometricDistortion()])(sample)
    for name in ("boxes", "labels", "masks"):
        assert torch.equal(after[name], sample[name])
    assert after["image"].dtype == torch.uint8


@pytest.mark.parametrize("settings", [JitterAugment, SegmentCropAugment])
def test_colours_may_be_left_out(settings):
    for colour in (True, False):
        steps = settings(colour=colour).build(*((80, 64),) if settings is JitterAugment else (64, 64))
        assert any(isinstance(step, PhotometricDistortion) for step in steps.transforms) == colour


# Classifiers


def photo():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 12, 16, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(pixels, (48, 64), mode="bilinear")
    return tv_tensors.Image(smooth[0].to(torch.uint8))


def test_deit_takes_a_square_part():
    (crop, flip, changes) = DeiTAugment().build(32).transforms
    assert isinstance(crop, v2.RandomResizedCrop)
    assert (crop.size, crop.scale, crop.ratio) == ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3))
    assert (crop.interpolation.value, crop.antialias) == ("bicubic", True)
    assert (type(flip), flip.p) == (v2.RandomHorizontalFlip, 0.5)
    assert (changes.changes, changes.mean, changes.std) == (2, 9, 0.5)
    assert DeiTAugment().build(32)(photo()).shape == (3, 32, 32)
    assert len(DeiTAugment(changes=0).build(32).transforms) == 2


def magnitudes(monkeypatch, **settings):
    """Of the changes that RandAugment makes, by image."""
    made = []

    def change(self, image):
        made[-1].append(self.magnitude)
        return image

    monkeypatch.setattr(v2.RandAugment, "forward", change)
    (*_, transform) = DeiTAugment(**settings).build(32).transforms
    torch.manual_seed(0)
    for _ in range(400):
        made.append([])
        transform(photo())
    return made


def test_two_changes_are_made_each_every_other_time(monkeypatch):
    """As timm's rand-m9-mstd0.5-inc1 does."""
    made = magnitudes(monkeypatch)
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    op = theirs.ops[0]
    assert (theirs.num_layers, op.prob, op.magnitude, op.magnitude_std) == (2, 0.5, 9, 0.5)
    assert {len(each) for each in made} == {0, 1, 2}
    assert 340 < sum(map(len, made)) < 460
    assert any(len(set(each)) == 2 for each in made)  # a magnitude for each
    values = torch.tensor([value / 3 for each in made for value in each])
    assert 8.8 < values.mean() < 9.2
    assert 0.4 < values.std() < 0.6
    assert values.max() <= 10


def test_a_magnitude_without_a_spread(monkeypatch):
    made = magnitudes(monkeypatch, magnitude=4, magnitude_std=0)
    assert {value for each in made for value in each} == {12}  # of 30


def test_the_largest_magnitude_is_ten(monkeypatch):
    values = [value for each in magnitudes(monkeypatch, magnitude=10, magnitude_std=3) for value in each]
    assert max(values) == 30
    assert min(values) >= 0


def test_deit_changes_images():
    torch.manual_seed(0)
    plain = [DeiTAugment(area=(1, 1), ratio=(4 / 3, 4 / 3), flip=0, changes=0).build(48)(photo())]
    changed = [DeiTAugment(area=(1, 1), ratio=(4 / 3, 4 / 3), flip=0).build(48)(photo()) for _ in range(20)]
    kinds = [torch.equal(each, plain[0]) for each in changed]
    assert 0 < sum(kinds) < 15
    assert {each.dtype for each in changed} == {torch.uint8}


def test_deit3_makes_exactly_one_of_three_changes():
    crop, flip, one, jitter = DeiT3Augment().build(32).transforms
    assert (crop.size, crop.scale) == ((32, 32), (0.08, 1.0))
    assert flip.p == 0.5
    assert one.p == [1 / 3] * 3
    gray, solarised, blurred = one.transforms
    image = photo()
    seen = set()
    torch.manual_seed(0)
    for _ in range(30):
        after = one(image)
        if torch.equal(after[0], after[1]):
            seen.add("gray")
        elif torch.equal(after, torch.where(image >= 128, 255 - image, image)):
            seen.add("solarised")
        elif not torch.equal(after, image):
            seen.add("blurred")
    assert seen == {"gray", "solarised", "blurred"}
    assert (gray.p, solarised.p, solarised.threshold, blurred.sigma) == (1.0, 1.0, 128, [0.1, 2.0])
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.7, 1.3),) * 3
    assert jitter.hue is None


# Settings


@pytest.mark.parametrize(
    ("kinds", "fields", "complaint"),
    [
        (DetectAugment, {"kind": "fixed", "flop": 0.5}, "flop"),
        (DetectAugment, {"kind": "fixed", "flip": 1.5}, "less than or equal to 1"),
        (DetectAugment, {"kind": "multi_scale", "scale": (1, 2)}, "scale"),
        (DetectAugment, {"kind": "multi_scale", "factor": 0}, "greater than 0"),
        (DetectAugment, {"kind": "jitter", "crop": 0}, "greater than 0"),
        (DetectAugment, {"kind": "deit"}, "'fixed', 'multi_scale', 'jitter'"),
        (SegmentCropAugment, {"kind": "crop", "least": 0.5}, "least"),
        (SegmentCropAugment, {"kind": "fixed"}, "crop"),
        (ClassifyAugment, {"kind": "deit", "colour": 0.3}, "colour"),
        (ClassifyAugment, {"kind": "deit", "magnitude": 11}, "less than or equal to 10"),
        (ClassifyAugment, {"kind": "deit3", "changes": 1}, "changes"),
    ],
)
def test_unknown_fields_are_refused(kinds, fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        TypeAdapter(kinds).validate_python(fields)
