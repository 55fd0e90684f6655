"""AP equals pycocotools' on awkward cases; and the cases that are worked by hand."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stepwell.data.masks import encode_mask
from stepwell.evaluate.detection import DetectionScores, ScoredObjects, TrueObjects

CLASSES = ["ant", "bee", "cat", "never seen", "only found"]
SIZE = (160, 200)
PLACES = {
    "ap": ("precision", slice(None), 0),
    "ap50": ("precision", 0, 0),
    "ap75": ("precision", 5, 0),
    "ap_small": ("precision", slice(None), 1),
    "ap_medium": ("precision", slice(None), 2),
    "ap_large": ("precision", slice(None), 3),
    "ar": ("recall", slice(None), 0),
}


def mask_of(box):
    """An ellipse in a box, so that masks and boxes have other IoUs."""
    left, top, right, bottom = box
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return (
        ((x - (left + right) / 2) / ((right - left) / 2)) ** 2
        + ((y - (top + bottom) / 2) / ((bottom - top) / 2)) ** 2
    ) <= 1


def boxes(draw, count):
    corner = draw.uniform(0, [110, 80], (count, 2))
    return np.concatenate([corner, corner + draw.uniform(4, 80, (count, 2))], 1).round(1)


def images(seed, *, masks, crowds=False, most=12):
    """Truth, and what is found: moved truths, doubles, strangers, and scores that are often alike."""
    draw = np.random.default_rng(seed)
    for i in range(8):
        truth = boxes(draw, 0 if i == 2 else draw.integers(1, 8))
        labels = draw.integers(0, 3, len(truth))
        moved = np.concatenate([truth, truth]) + draw.normal(0, 3, (2 * len(truth), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 2)
        guesses = np.concatenate([moved, boxes(draw, draw.integers(0, most))])
        names = np.concatenate([labels, labels, draw.integers(0, 5, len(guesses) - 2 * len(labels))])
        names[names == 3] = 4
        if i == 5:
            guesses, names = guesses[:0], names[:0]
        areas = None
        if i == 0:  # at both boundaries, and beside them
            areas = draw.choice([32**2, 32**2 - 1, 96**2, 96**2 + 1], len(truth)).astype(float)
        yield (
            TrueObjects(
                boxes=truth,
                labels=labels,
                is_crowd=draw.random(len(truth)) < 0.3 if crowds else None,
                masks=np.array([mask_of(box) for box in truth]).reshape(-1, *SIZE) if masks else None,
                areas=areas,
            ),
            ScoredObjects(
                boxes=guesses,
                scores=draw.integers(0, 6, len(guesses)) / 5,
                labels=names,
                masks=np.array([mask_of(box) for box in guesses]).reshape(-1, *SIZE) if masks else None,
            ),
        )


def reference(pairs, kind, max_detections):
    """What pycocotools makes of the same objects, from files as it takes them."""
    images, true, found = [], [], []
    for i, (truth, guesses) in enumerate(pairs, 1):
        images.append({"id": i, "height": SIZE[0], "width": SIZE[1]})
        for k, box in enumerate(truth.boxes):
            entry = annotation(i, box, truth.labels[k])
            entry |= {"id": len(true) + 1, "iscrowd": 0 if truth.is_crowd is None else int(truth.is_crowd[k])}
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            if truth.masks is not None:
                entry["segmentation"] = reference_masks.encode(np.asfortranarray(truth.masks[k], np.uint8))
                entry["area"] = float(truth.masks[k].sum())
            if truth.areas is not None:
                entry["area"] = float(truth.areas[k])
            true.append(entry)
        for k, box in enumerate(guesses.boxes):
            entry = annotation(i, box, guesses.labels[k]) | {"score": float(guesses.scores[k])}
            if kind == "masks":
                del entry["bbox"]  # pycocotools would take areas from it
                entry["segmentation"] = reference_masks.encode(np.asfortranarray(guesses.masks[k], np.uint8))
            found.append(entry)
    with redirect_stdout(StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": images,
            "annotations": true,
            "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES)],
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found), "bbox" if kind == "boxes" else "segm")
        run.params.maxDets = [max_detections]
        run.evaluate()
        run.accumulate()
    return run.eval


def annotation(image, box, label):
    left, top, right, bottom = map(float, box)
    return {
        "image_id": image,
        "category_id": int(label),
        "bbox": [left, top, right - left, bottom - top],
    }


def mean(values):
    told = values[values > -1]
    return told.mean() if told.size else None


def scored(pairs, *, masks=False, **options):
    scores = DetectionScores(CLASSES, masks=masks)
    for pair in pairs:
        scores.add(*pair)
    return scores.result(**options)


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize(
    ("kind", "most", "max_detections"),
    [
        ("boxes", 12, 100),
        ("boxes", 12, 2),
        ("boxes", 900, 100),
        ("boxes", 2500, 300),
        ("masks", 12, 100),
        ("masks", 12, 2),
    ],
)
def test_ap_equals_pycocotools(kind, crowds, most, max_detections):
    pairs = list(images(most, masks=kind == "masks", crowds=crowds, most=most))
    result = scored(pairs, masks=kind == "masks", max_detections=max_detections)[kind]
    told = reference(pairs, kind, max_detections)
    for name, (what, ious, area) in PLACES.items():
        values = (
            told["precision"][ious, :, :, area, 0] if what == "precision" else told["recall"][ious, :, area]
        )
        assert getattr(result, name) == pytest.approx(mean(values), abs=1e-9), name
    for k, name in enumerate(CLASSES):
        of_class = told["precision"][:, :, k, 0, 0]
        assert result.classes[name].ap == pytest.approx(mean(of_class), abs=1e-9)
        assert result.classes[name].ap50 == pytest.approx(mean(of_class[0]), abs=1e-9)
    assert result.classes["never seen"].ap is result.classes["only found"].ap is None
    assert 0 < result.ap < 0.95
    curve = np.array(result.precision["IoU 0.50"])
    assert curve == pytest.approx(told["precision"][0, :, :3, 0, 0].mean(1))


def test_more_detections_change_the_score_where_there_are_more():
    pairs = list(images(2500, masks=False, most=2500))
    few, many = (scored(pairs, max_detections=count)["boxes"] for count in (100, 300))
    assert few.ar < many.ar


def test_boxes_are_scored_alike_beside_masks_whose_areas_count():
    pairs = list(images(3, masks=True))
    result = scored(pairs, masks=True)["boxes"]
    told = reference(pairs, "boxes", 100)
    assert result.ap_small == pytest.approx(mean(told["precision"][:, :, :, 1, 0]), abs=1e-9)
    assert result.ap_large == pytest.approx(mean(told["precision"][:, :, :, 3, 0]), abs=1e-9)


def one(boxes, labels, **more):
    return {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels, int), **more}


def test_a_case_by_hand_and_crowds_count_as_no_objects():
    truth = one([[0, 0, 40, 40], [50, 0, 90, 40], [0, 50, 90, 90]], [0, 0, 1], is_crowd=[False, False, True])
    found = one([[0, 0, 40, 40], [5, 55, 20, 80]], [0, 1], scores=np.array([0.9, 0.8]))
    result = scored([(TrueObjects(**truth), ScoredObjects(**found))])["boxes"]
    assert result.classes["ant"].objects == 2
    assert result.classes["ant"].ap == pytest.approx(51 / 101)  # right up to a recall of a half
    assert (result.classes["bee"].objects, result.classes["bee"].ap) == (0, None)
    assert (result.ap, result.ar) == (pytest.approx(51 / 101), pytest.approx(0.5))
    assert (result.ap_small, result.ap_large) == (None, None)
    assert result.ap_medium == pytest.approx(51 / 101)


@pytest.mark.parametrize("count", [0, 1])
def test_without_truth_there_is_no_score(count):
    found = one([[0, 0, 9, 9]] * count, [0] * count, scores=np.ones(count))
    result = scored([(TrueObjects(**one([], [])), ScoredObjects(**found))])["boxes"]
    assert (result.ap, result.ar, result.precision) == (None, None, {})
    assert result.classes["ant"].ap is None


def test_nothing_found_is_zero():
    nothing = ScoredObjects(**one([], [], scores=np.ones(0)))
    result = scored([(TrueObjects(**one([[0, 0, 9, 9]], [1])), nothing)])["boxes"]
    assert (result.ap, result.ap_small, result.ap_large, result.ar) == (0, 0, None, 0)


def test_run_lengths_and_booleans_are_the_same_mask():
    mask = mask_of([10, 10, 90, 70])
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    forms = (mask[None], [encode_mask(mask)], [{"size": SIZE, "counts": counts}])
    box = [[10, 10, 90, 70]]
    for truth in forms:
        for found in forms:
            pair = (
                TrueObjects(**one(box, [0], masks=truth)),
                ScoredObjects(**one(box, [0], masks=found, scores=np.ones(1))),
            )
            result = scored([pair], masks=True)["masks"]
            assert result.ap == result.ap_medium == 1  # 3770 pixels in all three
    assert (
        encode_mask(mask)["counts"].encode()
        == reference_masks.encode(np.asfortranarray(mask, np.uint8))["counts"]
    )


@pytest.mark.parametrize(
    ("true", "found", "told"),
    [
        ({"labels": np.array([5])}, {}, "true labels are 0 to 4, got 5 to 5"),
        ({}, {"labels": np.array([-1])}, "found labels are 0 to 4, got -1"),
        ({"boxes": np.full((1, 4), np.nan)}, {}, "1 true labels need finite boxes"),
        ({}, {"boxes": np.zeros((2, 4))}, r"need finite boxes \(1, 4\), got \(2, 4\)"),
        ({}, {"scores": np.array([np.nan])}, "scores are 1 finite numbers"),
        ({"is_crowd": np.array([True, False])}, {}, "is_crowd are 1 finite numbers"),
        ({"areas": np.array([1.0, 2.0])}, {}, "areas are 1 finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(true, found, told):
    truth = one([[0, 0, 9, 9]], [0]) | true
    guess = one([[0, 0, 9, 9]], [0], scores=np.ones(1)) | found
    with pytest.raises(ValueError, match=told):
        scored([(TrueObjects(**truth), ScoredObjects(**guess))])


def test_missing_masks_and_no_detections_are_refused():
    pair = TrueObjects(**one([[0, 0, 9, 9]], [0])), ScoredObjects(**one([], [], scores=np.ones(0)))
    with pytest.raises(ValueError, match="1 true boxes need as many masks, got 0"):
        scored([pair], masks=True)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        scored([pair], max_detections=0)


def test_without_the_library_a_line_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    pair = TrueObjects(**one([[0, 0, 9, 9]], [0])), ScoredObjects(**one([], [], scores=np.ones(0)))
    with pytest.raises(ImportError, match=r"need faster-coco-eval: pip install 'stepwell\[detect\]'"):
        scored([pair])
