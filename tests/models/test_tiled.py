"""Tiles put together, by models that see exactly what is in their tile: nothing twice, lost or cut."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from stepwell.models.masks import CroppedMasks
from stepwell.models.predictions import Detections
from stepwell.models.seams import join_across_seams
from stepwell.models.tiled import detect_in_tiles, label_in_tiles
from stepwell.ops.sliding_windows import Window
from stepwell.views.tiling import Tiles

NAMES = ("ship", "car")


def oracle(masks=True):
    """Every colour of a picture is an object: its class is in the blue, black is background."""

    def run(images, sizes):
        return [found_in(np.array(image), masks) for image in images]

    return run


def found_in(pixels, with_masks):
    colours = [tuple(colour) for colour in np.unique(pixels.reshape(-1, 3), axis=0) if colour.any()]
    boxes, crops, windows = [], [], []
    for colour in colours:
        mask = (pixels == colour).all(2)
        rows, cols = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        window = Window(int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1)
        windows.append(window)
        boxes.append([window.left, window.top, window.right, window.bottom])
        crops.append(torch.from_numpy(mask[window.top : window.bottom, window.left : window.right]))
    size = pixels.shape[:2]
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        scores=torch.tensor([1 - int(colour[0]) / 1000 for colour in colours]),
        labels=torch.tensor([int(colour[2] > 128) for colour in colours], dtype=torch.int64),
        class_names=NAMES,
        image_size=size,
        masks=CroppedMasks(tuple(crops), tuple(windows), size) if with_masks else None,
    )


def drawn(size, *objects):
    """objects: (kind, xyxy, class); each has a colour of its own."""
    image = Image.new("RGB", (size[1], size[0]))
    draw = ImageDraw.Draw(image)
    for number, (kind, (left, top, right, bottom), label) in enumerate(objects, start=1):
        shape = {"box": draw.rectangle, "round": draw.ellipse}.get(kind)
        colour = (number, 100 + number, 200 * label + 10)
        if kind == "slanted":
            draw.line((left, top, right, bottom), fill=colour, width=9)
        else:
            shape((left, top, right - 1, bottom - 1), fill=colour)
    return image


def same(found, expected):
    """The same objects, in any order, exactly."""

    def facts(one):
        order = sorted(range(len(one)), key=lambda i: one.boxes[i].tolist())
        masks = None if one.masks is None else [one.masks[i].numpy().tobytes() for i in order]
        return one.boxes[order].tolist(), one.labels[order].tolist(), masks

    assert facts(found) == facts(expected)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


PICTURES = {
    "nothing": ((150, 250), []),
    "small and apart": (
        (150, 250),
        [("box", (x, y, x + 8, y + 8), 0) for x in range(4, 240, 22) for y in (5, 70, 88, 130)],
    ),
    "round on seams": (
        (250, 250),
        [("round", (x, y, x + 19, y + 19), 1) for x in range(3, 220, 31) for y in range(3, 220, 31)],
    ),
    "wider than the overlap": ((100, 300), [("box", (60, 20, 140, 60), 0), ("box", (60, 70, 240, 90), 0)]),
    "larger than a tile": ((300, 400), [("round", (20, 20, 380, 290), 0)]),
    "over the whole picture": ((300, 400), [("box", (0, 0, 400, 300), 1)]),
    "side by side on a seam": ((100, 300), [("box", (60, y, 140, y + 10), 0) for y in range(0, 100, 10)]),
    "one in another, both cut": ((100, 300), [("box", (50, 10, 250, 90), 0), ("box", (70, 30, 230, 60), 1)]),
    "at the border": ((150, 150), [("box", (0, 60, 40, 110), 0), ("box", (120, 140, 150, 150), 0)]),
}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("overlap", [0.25, 0.6])
@pytest.mark.parametrize("name", PICTURES)
def test_what_tiles_find_is_what_is_in_the_picture(name, overlap, masks):
    size, objects = PICTURES[name]
    image = drawn(size, *objects)
    tiles = Tiles(size=100, overlap=overlap).cut(size, side=1)
    found = detect_in_tiles(image, tiles, oracle(masks), batch=3)
    same(found, oracle(masks)([image], [size])[0])
    assert len(found) == len(objects)


def test_masks_tell_what_boxes_cannot_a_slanted_object_is_put_together():
    image = drawn((300, 300), ("slanted", (5, 8, 290, 295), 0), ("slanted", (150, 5, 295, 140), 0))
    tiles = Tiles(size=100, overlap=0.25).cut((300, 300), side=1)
    same(detect_in_tiles(image, tiles, oracle(), batch=4), found_in(np.array(image), True))


def test_two_ends_that_a_tile_sees_of_one_object_are_no_objects():
    """A horseshoe: the left tile sees its two arms apart, the right one sees it whole."""
    image = Image.new("RGB", (160, 100))
    draw = ImageDraw.Draw(image)
    for part in ((70, 10, 150, 20), (70, 70, 150, 80), (140, 10, 150, 80)):
        draw.rectangle(part, fill=(9, 9, 9))
    tiles = Tiles(size=100, overlap=0.4).cut((100, 160), side=1)
    assert [tile.source.left for tile in tiles] == [0, 60]

    def run(images, sizes):
        numbers, _ = ndimage.label(np.array(images[0])[..., 0])
        return [found_in(np.stack([numbers] * 3, 2).astype(np.uint8), True)]

    found = detect_in_tiles(image, tiles, run, batch=1)
    same(found, found_in(np.array(image), True))


def boxes_of(*rows):
    """rows: (box, score) -> of one tile."""
    return Detections(
        boxes=torch.tensor([list(box) for box, _ in rows], dtype=torch.float32).view(-1, 4),
        scores=torch.tensor([score for _, score in rows]),
        labels=torch.zeros(len(rows), dtype=torch.int64),
        class_names=NAMES,
        image_size=(100, 175),
    )


LEFT_AND_RIGHT = [Window(0, 0, 100, 100), Window(0, 75, 100, 175)]


def test_what_is_seen_whole_is_taken_from_there_though_a_cut_part_scores_more():
    cut, whole = boxes_of(((80, 10, 100, 40), 0.9)), boxes_of(((81, 10, 120, 41), 0.6))
    found = join_across_seams([cut, whole], LEFT_AND_RIGHT, (100, 175))
    assert found.boxes.tolist() == [[81, 10, 120, 41]]
    assert found.scores.tolist() == pytest.approx([0.6])


def test_an_object_that_both_have_seen_whole_is_where_it_is_farthest_from_a_seam_with_the_better_score():
    left, right = boxes_of(((80, 10, 92, 30), 0.7)), boxes_of(((81, 11, 92, 31), 0.8))
    for found in ([left, right], [right, left]):  # 8 pixels from the seam, and 6
        joined = join_across_seams([found[0], found[1]], LEFT_AND_RIGHT, (100, 175))
        assert joined.boxes.tolist() == [found[0].boxes[0].tolist()]
        assert joined.scores.tolist() == pytest.approx([0.8])


def test_a_cut_part_that_ends_short_of_the_seam_is_not_taken_for_the_whole():
    cut, whole = boxes_of(((78, 10, 97, 40), 0.95)), boxes_of(((80, 10, 110, 40), 0.9))
    found = join_across_seams([cut, whole], LEFT_AND_RIGHT, (100, 175))
    assert found.boxes.tolist() == [[80, 10, 110, 40]]


def test_objects_that_one_tile_tells_apart_stay_apart():
    """A small one on a large one of the same class, both across the seam."""
    left = boxes_of(((50, 10, 100, 90), 0.9), ((70, 40, 100, 50), 0.8))
    right = boxes_of(((75, 10, 130, 90), 0.7), ((75, 40, 110, 50), 0.6))
    found = join_across_seams([left, right], LEFT_AND_RIGHT, (100, 175))
    assert found.boxes.tolist() == [[50, 10, 130, 90], [70, 40, 110, 50]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_neighbours_that_only_touch_are_two_and_so_are_other_classes():
    left, right = boxes_of(((78, 10, 92, 30), 0.7)), boxes_of(((80, 29, 92, 50), 0.8))
    assert len(join_across_seams([left, right], LEFT_AND_RIGHT, (100, 175))) == 2
    other = Detections(**{**vars(boxes_of(((78, 10, 92, 30), 0.8))), "labels": torch.tensor([1])})
    assert len(join_across_seams([left, other], LEFT_AND_RIGHT, (100, 175))) == 2


def logits_of_colour(classes=5):
    """A model whose logits depend on the picture alone: red is the class."""

    def run(images, sizes):
        for image, seen in zip(images, sizes, strict=True):
            assert (image.height, image.width) == seen
        reds = [torch.from_numpy(np.array(image)[..., 0].astype(np.int64)) for image in images]
        return [torch.nn.functional.one_hot(red, classes).movedim(-1, 0).float() for red in reds]

    return run


@pytest.mark.parametrize("size", [(80, 170), (200, 130), (40, 40)])
def test_a_map_of_classes_has_no_seam(size):
    labels = np.random.default_rng(0).integers(0, 5, size).astype(np.uint8)
    image = Image.fromarray(np.stack([labels] * 3, 2))
    tiles = Tiles(size=60, overlap=0.3)
    found = label_in_tiles(
        image, tiles.cut(size, side=1), logits_of_colour(), batch=3, scaled=tiles.scaled(size)
    )
    assert found.dtype == torch.uint8
    assert (found.numpy() == labels).all()


def test_tiles_that_disagree_are_weighed_by_how_near_their_edges_are():
    image = Image.new("RGB", (160, 100))
    tiles = Tiles(size=100, overlap=0.4).cut((100, 160), side=1)
    answers = iter([0, 1])

    def run(images, sizes):
        label = next(answers)
        return [torch.nn.functional.one_hot(torch.full(sizes[0], label), 2).movedim(-1, 0).float()]

    found = label_in_tiles(image, tiles, run, batch=1, scaled=(100, 160))
    assert (found[:, :80] == 0).all()
    assert (found[:, 80:] == 1).all()


def test_logits_wait_for_their_neighbours_only(monkeypatch):
    """Of all the values of the whole picture few are held at a time."""
    from stepwell.models import tiled

    held = []
    add = tiled._Cells.add

    def watched(self, view, logits):
        yield from add(self, view, logits)
        held.append(sum(sums.numel() for sums, _ in self.sums.values()))

    monkeypatch.setattr(tiled._Cells, "add", watched)
    size = (580, 420)
    image, tiles = Image.new("RGB", size[::-1]), Tiles(size=100, overlap=0.2)
    label_in_tiles(image, tiles.cut(size, side=1), logits_of_colour(), batch=1, scaled=size)
    assert held[-1] == 0
    assert max(held) <= 5 * (420 * 20 + 100 * 40)  # of 5 x 580 x 420
