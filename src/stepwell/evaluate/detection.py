"""COCO's average precision of boxes and masks, computed by faster-coco-eval.

Lin et al., arXiv 1405.0312: the area below the curve of precision against recall, at 101 recalls, averaged
over IoUs of 0.50 to 0.95 in steps of 0.05 and over classes. Objects below 32^2 pixels are small, those above
96^2 large. Crowds are regions in which nothing found is wrong.
Letters: n objects, (H, W) the image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from stepwell.data.masks import compressed_mask, encode_mask, mask_area

__all__ = [
    "Array",
    "ClassPrecision",
    "DetectionResult",
    "DetectionScores",
    "Kind",
    "Rle",
    "ScoredObjects",
    "TrueObjects",
    "f1_of_boxes",
]

Array = np.ndarray[Any, np.dtype[Any]]
Rle = Mapping[str, Any]
"""COCO's run lengths of a mask: `size`, (height, width), and `counts`, a list or compressed to a text."""
Masks = Array | Sequence[Rle]
Kind = Literal["boxes", "masks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Objects:
    boxes: Array  # (n, 4), xyxy in pixels
    labels: Array  # (n,), from 0 on
    masks: Masks | None = None  # (n, H, W) booleans, or run lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueObjects(_Objects):
    """Of one image. is_crowd: None for no crowds. areas: in pixels, as a file says; None takes those of the
    masks, or of the boxes where there are no masks.
    """

    is_crowd: Array | None = None  # (n,), booleans
    areas: Array | None = None  # (n,)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredObjects(_Objects):
    """What a model finds in one image."""

    scores: Array  # (n,)


@dataclass(frozen=True, kw_only=True)
class ClassPrecision:
    """Of one class; None where it has no objects. objects: without crowds."""

    objects: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Of boxes or of masks, 0 to 1; None where no class has objects that count. AR: the recall at
    max_detections, averaged as AP is. precision: by curve, at the recalls 0, 0.01, ..., 1, averaged over the
    classes that have objects; no curves where none has.
    """

    max_detections: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    classes: dict[str, ClassPrecision]
    precision: dict[str, list[float]]


class DetectionScores:
    """Collects images one by one, masks as run lengths, and scores all of them together.

    classes: names, in the order of labels. masks: whether masks are scored beside the boxes.
    """

    def __init__(self, classes: Sequence[str], *, masks: bool = False) -> None:
        self.classes = tuple(classes)
        self.kinds: tuple[Kind, ...] = ("boxes", "masks") if masks else ("boxes",)
        self._images: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []

    def add(self, truth: TrueObjects, found: ScoredObjects) -> None:
        """An image, whether or not there is anything on it. Raises ValueError for arrays that do not belong
        together, labels that are no class, numbers that are not finite, and masks that are missing.
        """
        true_masks, found_masks = self._checked("true", truth), self._checked("found", found)
        count = len(truth.boxes)
        is_crowd = np.zeros(count, bool) if truth.is_crowd is None else np.asarray(truth.is_crowd, bool)
        areas = _areas(truth.boxes, true_masks) if truth.areas is None else np.asarray(truth.areas, float)
        scores = np.asarray(found.scores, float)
        for name, values, number in (
            ("is_crowd", is_crowd, count),
            ("areas", areas, count),
            ("scores", scores, len(found.boxes)),
        ):
            if values.shape != (number,) or not np.isfinite(values).all():
                raise ValueError(f"{name} are {number} finite numbers, one a box, got {values.shape}")
        true = [
            entry | {"area": float(area), "iscrowd": int(crowd)}
            for entry, area, crowd in zip(
                _entries(truth.boxes, truth.labels, true_masks), areas, is_crowd, strict=True
            )
        ]
        guesses = [
            entry | {"score": float(score)}
            for entry, score in zip(_entries(found.boxes, found.labels, found_masks), scores, strict=True)
        ]
        self._images.append((true, guesses))

    def _checked(self, who: str, objects: _Objects) -> list[Rle] | None:
        """The masks as run lengths, None where masks are not scored."""
        boxes, labels, masks = np.asarray(objects.boxes), np.asarray(objects.labels), objects.masks
        count, names = len(labels), self.classes
        if boxes.shape != (count, 4) or not np.isfinite(boxes).all():
            raise ValueError(f"{count} {who} labels need finite boxes ({count}, 4), got {boxes.shape}")
        if count and not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(f"{who} labels are 0 to {len(names) - 1}, got {labels.min()} to {labels.max()}")
        if "masks" not in self.kinds:
            return None
        if len([] if masks is None else masks) != count:
            raise ValueError(
                f"{count} {who} boxes need as many masks, got {0 if masks is None else len(masks)}"
            )
        return [] if masks is None else [_run_lengths(mask) for mask in masks]

    def result(self, max_detections: int = 100) -> dict[Kind, DetectionResult]:
        """max_detections: the best of every class in an image that count. Raises ValueError below 1, and
        ImportError without faster-coco-eval.
        """
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}")
        return {kind: self._result(kind, max_detections) for kind in self.kinds}

    def _result(self, kind: Kind, max_detections: int) -> DetectionResult:
        counted = [0] * len(self.classes)
        for true, _ in self._images:
            for entry in true:
                counted[entry["category_id"]] += not entry["iscrowd"]
        # (IoUs, recalls, K, areas, 1) and (IoUs, K, areas, 1); -1 for a class that has no such objects
        precision, recall = self._evaluated(kind, max_detections)
        precision, recall = precision[..., 0], recall[..., 0]
        whole = precision[..., 0]
        has_some = [k for k in range(len(self.classes)) if counted[k]]
        curves = {"IoU 0.50": whole[0], "IoU 0.75": whole[5], "IoU 0.50 to 0.95": whole.mean(0)}
        return DetectionResult(
            max_detections=max_detections,
            ap=_mean(whole),
            ap50=_mean(whole[0]),
            ap75=_mean(whole[5]),
            ap_small=_mean(precision[..., 1]),
            ap_medium=_mean(precision[..., 2]),
            ap_large=_mean(precision[..., 3]),
            ar=_mean(recall[..., 0]),
            classes={
                name: ClassPrecision(objects=counted[k], ap=_mean(whole[:, :, k]), ap50=_mean(whole[0, :, k]))
                for k, name in enumerate(self.classes)
            },
            precision={name: values[:, has_some].mean(1).tolist() for name, values in curves.items()}
            if has_some
            else {},
        )

    def _evaluated(self, kind: Kind, max_detections: int) -> tuple[Array, Array]:
        if not any(true for true, _ in self._images) or not self.classes:
            nothing = np.full((10, 101, len(self.classes), 4, 1), -1.0)
            return nothing, nothing[:, 0]
        coco, evaluator = _library()
        images: list[dict[str, Any]] = []
        true: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for i, (of_truth, of_model) in enumerate(self._images):
            first = next((entry["rle"]["size"] for entry in of_truth + of_model if "rle" in entry), (0, 0))
            images.append({"id": i, "height": first[0], "width": first[1]})
            # ids of objects from 1: 0 says of another that it is not matched
            true += [_annotation(entry, i, len(true) + k, kind) for k, entry in enumerate(of_truth, 1)]
            found += [_annotation(entry, i, len(found) + k, kind) for k, entry in enumerate(of_model, 1)]
        categories = [{"id": k, "name": name} for k, name in enumerate(self.classes)]
        about = {"images": images, "categories": categories}
        run = evaluator(
            coco({**about, "annotations": true}),
            coco({**about, "annotations": found}),
            "bbox" if kind == "boxes" else "segm",
        )
        run.params.maxDets = [max_detections]
        run.evaluate()
        run.accumulate()
        return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


def _run_lengths(mask: Array | Rle) -> Rle:
    """In the compressed form, which takes little memory."""
    if not isinstance(mask, Mapping):
        return encode_mask(np.asarray(mask, bool))
    height, width = mask["size"]
    return compressed_mask({**mask, "size": [height, width]}, (height, width))


def _areas(boxes: Array, masks: list[Rle] | None) -> Array:
    if masks is not None:
        return np.array([mask_area(mask) for mask in masks], float)
    boxes = np.asarray(boxes, float)
    return cast(Array, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _entries(boxes: Array, labels: Array, masks: list[Rle] | None) -> list[dict[str, Any]]:
    """In COCO's form, [left, top, width, height]."""
    boxes = np.asarray(boxes, float)
    corner_and_size = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    entries = [
        {"bbox": box, "category_id": int(label)} for box, label in zip(corner_and_size, labels, strict=True)
    ]
    if masks is not None:
        entries = [entry | {"rle": mask} for entry, mask in zip(entries, masks, strict=True)]
    return entries


def _annotation(entry: Mapping[str, Any], image: int, number: int, kind: Kind) -> dict[str, Any]:
    """An object for the evaluator. What is found is as large as its box, or as its mask, whichever counts."""
    fields: dict[str, Any] = {"iscrowd": 0, **entry, "id": number, "image_id": image}
    mask = fields.pop("rle", None)
    if kind == "masks":
        fields["segmentation"] = dict(mask)
    if "area" not in fields:
        width, height = fields["bbox"][2:]
        fields["area"] = width * height if kind == "boxes" else float(mask_area(mask))
    return fields


def _mean(values: Array) -> float | None:
    """Of classes that have objects; -1 stands for the others."""
    told = values[values > -1]
    return float(told.mean()) if told.size else None


def _library() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError("COCO's scores need faster-coco-eval: pip install 'stepwell[detect]'") from error
    return COCO, COCOeval_faster


def f1_of_boxes(boxes: Array, labels: Array, truth: TrueObjects, *, overlap: float = 0.5) -> float:
    """Of the boxes (n, 4) found in an image, best first, with labels (n,): each true object, but for crowds,
    is found by the first box of its class that overlaps it by more than `overlap`. 1 where there is nothing
    to find and nothing found.
    """
    counts = np.ones(len(truth.boxes), bool) if truth.is_crowd is None else ~truth.is_crowd
    wanted, classes = truth.boxes[counts], truth.labels[counts]
    if not len(wanted) or not len(boxes):
        return float(len(wanted) == len(boxes))
    ious = _ious(boxes, wanted) * (labels[:, None] == classes)
    for row in range(len(ious)):
        best = int(ious[row].argmax())
        if ious[row, best] > overlap:
            ious[row + 1 :, best] = 0
    return 2 * int((ious.max(1) > overlap).sum()) / (len(wanted) + len(boxes))


def _ious(boxes: Array, others: Array) -> Array:
    """(n, 4), (m, 4) -> (n, m)."""
    shared = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(
        boxes[:, None, :2], others[None, :, :2]
    )
    inter = shared.clip(min=0).prod(-1)
    areas, other_areas = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (boxes, others))
    return cast(Array, inter / np.maximum(areas[:, None] + other_areas - inter, 1e-9))
