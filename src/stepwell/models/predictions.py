"""What models say of a picture: objects, a class for every pixel, or classes of the whole.

Plain dataclasses of tensors on the CPU, in pixels of the upright source picture. Letters: n objects,
k classes that are named, (H, W) the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepwell.images.draw import class_colours, draw_boxes, draw_lines, tint, tint_classes
from stepwell.images.limits import TILED_LIMITS
from stepwell.images.open import ImageSource, open_image
from stepwell.models.masks import CroppedMasks
from stepwell.ops.run_lengths import compressed, label_runs
from stepwell.structures import Size

__all__ = ["TOP", "Classification", "Detections", "Prediction", "Segmentation", "label_dtype"]


TOP = 5
"""Classes of a picture that are named, and scored, where nobody says how many."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Detections:
    """Objects of a picture, best first. Raises ValueError for parts of unequal length.

    masks: `masks[i]` is the mask (H, W) of an object; kept small, see `CroppedMasks`. None without masks.
    """

    boxes: Tensor  # (n, 4), xyxy
    scores: Tensor  # (n,), 0..1
    labels: Tensor  # (n,), int64, places in class_names
    class_names: tuple[str, ...]
    image_size: Size
    masks: CroppedMasks | None = None

    def __post_init__(self) -> None:
        count = len(self.scores)
        lengths = [len(part) for part in (self.boxes, self.labels, self.masks) if part is not None]
        if lengths != [count] * len(lengths):
            raise ValueError(f"{count} scores need as many boxes, labels and masks, got {lengths}")

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"Detections({self.summary()})"

    def summary(self) -> str:
        """In a few words."""
        kind = "boxes" if self.masks is None else "boxes and masks"
        return f"{_counted(self.names())}, {kind} in {_pixels(self.image_size)}"

    def lines(self) -> list[str]:
        """Of each object class, score and box, in columns."""
        width = max(map(len, self.names()), default=0)
        return [
            f"{name:{width}}{score:7.3f}{''.join(f'{edge:10.1f}' for edge in box)}"
            for name, score, box in zip(self.names(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        ]

    def names(self) -> list[str]:
        """The class of each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def select(self, places: Tensor) -> Detections:
        """Some of the objects: their numbers (m,), in the order wanted, or bool (n,) for those wanted."""
        if places.dtype == torch.bool:
            if places.shape != self.scores.shape:
                raise ValueError(
                    f"of {len(self)} objects as many are wanted or not, got {tuple(places.shape)}"
                )
            places = places.nonzero().flatten()
        return Detections(
            boxes=self.boxes[places],
            scores=self.scores[places],
            labels=self.labels[places],
            class_names=self.class_names,
            image_size=self.image_size,
            masks=None if self.masks is None else self.masks.select(places.tolist()),
        )

    def draw(self, image: ImageSource) -> Image.Image:
        """A copy of the picture with masks, boxes, classes and scores, the best on top. Raises ValueError for
        a picture of another size.
        """
        pixels = _copied(image, self.image_size)
        palette = class_colours(len(self.class_names))
        order = range(len(self) - 1, -1, -1)
        labels = self.labels.tolist()
        if self.masks is not None:
            for i in order:
                top, left, bottom, right = self.masks.windows[i]
                tint(pixels[top:bottom, left:right], self.masks.crops[i].numpy(), palette[labels[i]])
        drawn = Image.fromarray(pixels)
        boxes, scores, names = self.boxes.tolist(), self.scores.tolist(), self.names()
        draw_boxes(
            drawn,
            [boxes[i] for i in order],
            [f"{names[i]} {scores[i]:.2f}" for i in order],
            [palette[labels[i]] for i in order],
        )
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `objects` with box (xyxy), score, class_id, class and, with masks, COCO's run lengths."""
        objects: list[dict[str, Any]] = [
            {"box": [round(x, 2) for x in box], "score": round(score, 6), "class_id": label, "class": name}
            for box, score, label, name in zip(
                self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names(), strict=True
            )
        ]
        if self.masks is not None:
            objects = [entry | {"mask": self.masks.run_lengths(i)} for i, entry in enumerate(objects)]
        return {"task": "detection", "image_size": list(self.image_size), "objects": objects}

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO's results: bbox is left, top, width, height; category_id is the class id, from 0 on."""
        records = []
        for i, entry in enumerate(self.to_dict()["objects"]):
            left, top, right, bottom = entry["box"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            record = _record(image_id, entry["class_id"], score=entry["score"], bbox=box)
            if self.masks is None:
                records.append(record | {"area": round(box[2] * box[3], 2)})
            else:
                records.append(record | {"area": self.masks.area(i), "segmentation": entry["mask"]})
        return records

    def to_supervision(self) -> Any:
        """`supervision.Detections`; its masks are whole. Raises ImportError without that package."""
        return _supervision().Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            mask=None if self.masks is None else self.masks.whole().numpy(),
            data={"class_name": np.array(self.names(), dtype=str)},
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Segmentation:
    """A class for every pixel of a picture. Raises ValueError for a map of another shape."""

    labels: Tensor  # (H, W), places in class_names: uint8 for up to 256 classes, int32 for more
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.ndim != 2:
            raise ValueError(f"labels are (H, W), got {tuple(self.labels.shape)}")

    @property
    def image_size(self) -> Size:
        return self.labels.shape[0], self.labels.shape[1]

    def __len__(self) -> int:
        """Classes that are there."""
        return len(self.shares())

    def __repr__(self) -> str:
        return f"Segmentation({self.summary()})"

    def summary(self) -> str:
        """In a few words."""
        shares = [f"{share:.0%} {self.class_names[label]}" for label, share in self.shares().items()]
        return f"{_shortened(shares)} of {_pixels(self.image_size)}"

    def lines(self) -> list[str]:
        """Of each class that is there its name and share, in columns."""
        named = [(self.class_names[label], share) for label, share in self.shares().items()]
        width = max(len(name) for name, _ in named)
        return [f"{name:{width}}{share:7.1%}" for name, share in named]

    def shares(self) -> dict[int, float]:
        """Of the picture's pixels, by class, the largest first; classes that are not there left out."""
        counts = np.zeros(len(self.class_names), np.int64)
        for row in self.labels.numpy():
            counts += np.bincount(row, minlength=len(counts))
        order = np.argsort(-counts, kind="stable")
        return {int(k): float(counts[k] / self.labels.numel()) for k in order if counts[k]}

    def draw(self, image: ImageSource) -> Image.Image:
        """A copy of the picture under the colours of its classes, with their names and shares. Raises
        ValueError for a picture of another size.
        """
        pixels = _copied(image, self.image_size)
        palette = class_colours(len(self.class_names))
        tint_classes(pixels, self.labels.numpy(), palette)
        drawn = Image.fromarray(pixels)
        draw_lines(drawn, self.lines(), [palette[label] for label in self.shares()])
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `classes` that are there with class_id, class, share and mask, COCO's run lengths."""
        runs = label_runs(self.labels.numpy(), len(self.class_names))
        size = list(self.image_size)
        classes = [
            {
                "class_id": label,
                "class": self.class_names[label],
                "share": round(share, 6),
                "mask": {"size": size, "counts": compressed(runs[label])},
            }
            for label, share in self.shares().items()
        ]
        return {"task": "segmentation", "image_size": size, "classes": classes}

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """A record for each class that is there: its mask, and the box around it."""
        records = []
        for entry in self.to_dict()["classes"]:
            mask = self.labels == entry["class_id"]
            left, top, right, bottom = _box_around(mask)
            record = _record(image_id, entry["class_id"], bbox=[left, top, right - left, bottom - top])
            records.append(record | {"area": int(mask.sum()), "segmentation": entry["mask"]})
        return records

    def to_supervision(self) -> Any:
        """`supervision.Detections`, one for each class that is there. Raises ImportError without that
        package.
        """
        labels = list(self.shares())
        masks = [self.labels == label for label in labels]
        return _supervision().Detections(
            xyxy=np.array([_box_around(mask) for mask in masks], np.float32),
            class_id=np.array(labels),
            mask=torch.stack(masks).numpy(),
            data={"class_name": np.array([self.class_names[label] for label in labels], dtype=str)},
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Classification:
    """Classes of a whole picture, best first. Raises ValueError for parts of unequal length."""

    labels: Tensor  # (k,), int64, places in class_names
    scores: Tensor  # (k,), 0..1
    class_names: tuple[str, ...]
    image_size: Size

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.scores):
            raise ValueError(f"{len(self.labels)} labels need as many scores, got {len(self.scores)}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Classification({self.summary()})"

    def summary(self) -> str:
        """In a few words."""
        named = zip(self.names(), self.scores.tolist(), strict=True)
        return _shortened([f"{name} {score:.2f}" for name, score in named]) or "nothing"

    def lines(self) -> list[str]:
        """Of each class its name and score, in columns."""
        width = max(map(len, self.names()), default=0)
        named = zip(self.names(), self.scores.tolist(), strict=True)
        return [f"{name:{width}}{score:7.3f}" for name, score in named]

    def names(self) -> list[str]:
        """Of the classes, best first."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def draw(self, image: ImageSource) -> Image.Image:
        """A copy of the picture with classes and scores. Raises ValueError for a picture of another size."""
        drawn = Image.fromarray(_copied(image, self.image_size))
        palette = class_colours(len(self.class_names))
        draw_lines(drawn, self.lines(), [palette[label] for label in self.labels.tolist()])
        return drawn

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `classes` with class_id, class and score."""
        classes = [
            {"class_id": label, "class": name, "score": round(score, 6)}
            for label, name, score in zip(
                self.labels.tolist(), self.names(), self.scores.tolist(), strict=True
            )
        ]
        return {"task": "classification", "image_size": list(self.image_size), "classes": classes}

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """A record for each class: image, class id and score; there is no box in it."""
        return [
            _record(image_id, entry["class_id"], score=entry["score"]) for entry in self.to_dict()["classes"]
        ]

    def to_supervision(self) -> Any:
        """`supervision.Classifications`. Raises ImportError without that package."""
        return _supervision().Classifications(class_id=self.labels.numpy(), confidence=self.scores.numpy())


Prediction = Detections | Segmentation | Classification


def label_dtype(classes: int) -> torch.dtype:
    """The smallest in which a map of so many classes is kept."""
    return torch.uint8 if classes <= 256 else torch.int32


def _record(image_id: int, label: int, **fields: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": label, "iscrowd": 0, **fields}


def _copied(image: ImageSource, size: Size) -> Any:
    """Pixels (H, W, 3) that may be drawn on."""
    opened = open_image(image, limits=TILED_LIMITS)
    if (opened.height, opened.width) != size:
        raise ValueError(
            f"this was predicted on a picture of {_pixels(size)}, got one of "
            f"{_pixels((opened.height, opened.width))}"
        )
    return np.array(opened)


def _box_around(mask: Tensor) -> tuple[int, int, int, int]:
    """xyxy of a mask (H, W) that is not empty."""
    rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _supervision() -> Any:
    try:
        return import_module("supervision")
    except ImportError:
        raise ImportError("to_supervision needs supervision: pip install supervision") from None


def _counted(names: list[str]) -> str:
    """Such as '3 car, 1 bus'."""
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return _shortened([f"{count} {name}" for name, count in counts.items()]) or "nothing"


def _shortened(words: list[str]) -> str:
    return ", ".join(words[:4] + (["..."] if len(words) > 4 else []))


def _pixels(size: Size) -> str:
    return f"{size[1]} x {size[0]} pixels"
