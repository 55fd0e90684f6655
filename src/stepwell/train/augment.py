"""What happens by chance to an image, and to what is known of it, before a network learns from it.

The official pipelines of PIIP (arXiv 2501.07783: those of MMDetection, MMSegmentation and DeiT) by their
settings, and defaults for people's own images, out of torchvision's v2 transforms. The ratio of an image's
sides is kept throughout, but for classifiers, which are given squares. Random numbers are torch's.
Letters: (H, W) the size of an image.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from stepwell.data.fields import Share
from stepwell.data.label_maps import IGNORED
from stepwell.structures import Size
from stepwell.train.mask_planes import select_masks
from stepwell.views.resize import size_within

__all__ = [
    "ClassifyAugment",
    "DeiT3Augment",
    "DeiTAugment",
    "DetectAugment",
    "FixedAugment",
    "JitterAugment",
    "MultiScaleAugment",
    "PhotometricDistortion",
    "SegmentCropAugment",
]

CROP_TRIES = 10
Side = Annotated[int, Field(gt=0)]
Limits = tuple[int, int]
"""Of the long side of an image, and of its short side."""
_SETTINGS = ConfigDict(extra="forbid")
_ANY = 2**31


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class FixedAugment:
    """To the size that the model's images have, and flipped: "plain" and "base" of PIIP's detectors."""

    kind: Literal["fixed"] = "fixed"
    flip: Share = 0.5
    vertical_flip: Share = 0.0

    def build(self, limits: Limits) -> v2.Transform:
        return v2.Compose([_ResizeWithin([limits]), *_flips(self.flip, self.vertical_flip), *_CLEAN])


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class MultiScaleAugment:
    """Many sizes, and parts of images at many sizes: DETR's (arXiv 2005.12872), "MS" of PIIP's detectors.

    factor multiplies all sides; crop: the most that an image may have in the end.
    """

    kind: Literal["multi_scale"] = "multi_scale"
    factor: Annotated[float, Field(gt=0)] = 1.0
    crop: Side = 1024
    flip: Share = 0.5

    def build(self, limits: Limits) -> v2.Transform:
        def scaled(side: int) -> int:
            return int(side * self.factor)

        long = scaled(1333)
        whole = _ResizeWithin([(long, scaled(side)) for side in range(480, 801, 32)])
        part = v2.Compose(
            [
                _ResizeWithin([(long, scaled(side)) for side in (400, 500, 600)]),
                _RandomPart(scaled(384), scaled(600)),
                whole,
            ]
        )
        either = v2.RandomChoice([whole, part])
        return v2.Compose([*_flips(self.flip, 0), either, _RandomPart(self.crop, self.crop), *_CLEAN])


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class JitterAugment:
    """For people's own images: the size that the model's images have times a scale by chance, a part of it no
    larger than `crop`, by default the long limit of the model's images, flips and colours.

    scale: smallest and largest. colour: whether brightness, contrast, saturation and hue vary.
    """

    kind: Literal["jitter"] = "jitter"
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.6, 1.4)
    crop: Side | None = None
    flip: Share = 0.5
    vertical_flip: Share = 0.0
    colour: bool = True

    def build(self, limits: Limits) -> v2.Transform:
        crop = self.crop or max(limits)
        steps: list[v2.Transform] = [
            _ResizeWithin([limits], scale=self.scale),
            _RandomPart(crop, crop),
            *_flips(self.flip, self.vertical_flip),
        ]
        return v2.Compose([*steps, *([PhotometricDistortion()] if self.colour else []), *_CLEAN])


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class SegmentCropAugment:
    """A scale by chance, a crop that holds several classes, a flip and colours: PIIP's segmenters.

    long_limit: of the size that the scale multiplies, whose short side is that of the model's images. crop:
    its side, by default that of the windows in which the model looks at images. most: the share of a crop's
    labelled pixels that one class may have; crops are drawn again, up to ten times, until it has less. A crop
    is smaller where the image is.
    """

    kind: Literal["crop"] = "crop"
    long_limit: Side | None = 2048
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    crop: Side | None = None
    most: Share = 0.75
    flip: Share = 0.5
    vertical_flip: Share = 0.0
    colour: bool = True

    def build(self, crop: int, short_side: int) -> v2.Transform:
        """crop: the side of crops; short_side: of the model's images."""
        steps: list[v2.Transform] = [
            _ResizeWithin([(self.long_limit or _ANY, short_side)], scale=self.scale),
            _CropOfClasses(crop, self.most),
            *_flips(self.flip, self.vertical_flip),
        ]
        return v2.Compose([*steps, *([PhotometricDistortion()] if self.colour else [])])


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class DeiTAugment:
    """A part of the image as a square, a flip, and two changes of RandAugment (arXiv 1909.13719): DeiT's.

    area, ratio: of the part. magnitude, magnitude_std: of the changes, of 10.
    """

    kind: Literal["deit"] = "deit"
    area: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    changes: Annotated[int, Field(ge=0)] = 2
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9
    magnitude_std: Annotated[float, Field(ge=0)] = 0.5

    def build(self, side: int) -> v2.Transform:
        """side: of the square."""
        steps: list[v2.Transform] = [_square(side, self.area, self.ratio), *_flips(self.flip, 0)]
        if self.changes:
            steps.append(_RandAugment(self.changes, self.magnitude, self.magnitude_std))
        return v2.Compose(steps)


@dataclass(frozen=True, kw_only=True, config=_SETTINGS)
class DeiT3Augment:
    """A part of the image as a square, a flip, exactly one of gray, solarised or blurred, and colours:
    DeiT III's (arXiv 2204.07118), PIIP-B's from scratch.
    """

    kind: Literal["deit3"] = "deit3"
    area: tuple[Share, Share] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    colour: Annotated[float, Field(ge=0)] = 0.3

    def build(self, side: int) -> v2.Transform:
        """side: of the square."""
        one = v2.RandomChoice(
            [
                v2.RandomGrayscale(1.0),
                v2.RandomSolarize(128, 1.0),
                v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0)),
            ]
        )
        jitter = v2.ColorJitter(self.colour, self.colour, self.colour)
        return v2.Compose([_square(side, self.area, self.ratio), *_flips(self.flip, 0), one, jitter])


DetectAugment = Annotated[FixedAugment | MultiScaleAugment | JitterAugment, Field(discriminator="kind")]
ClassifyAugment = Annotated[DeiTAugment | DeiT3Augment, Field(discriminator="kind")]


class PhotometricDistortion(v2.Transform):
    """SSD's (arXiv 1512.02325), by MMSegmentation's numbers: each with even chance brightness up to 32 of 255
    more or less, contrast and saturation 0.5 to 1.5 times, hue up to 36 degrees; contrast before or after the
    colours.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        def drawn(low: float, high: float) -> float | None:
            return _uniform(low, high) if _chance(0.5) else None

        return {
            "brightness": drawn(-32 / 255, 32 / 255),
            "contrast_first": _chance(0.5),
            "contrast": drawn(0.5, 1.5),
            "saturation": drawn(0.5, 1.5),
            "hue": drawn(-0.1, 0.1),  # of a whole turn
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = F.to_dtype(inpt, torch.float32, scale=True)
        if params["brightness"] is not None:
            image = (image + params["brightness"]).clamp(0, 1)
        if params["contrast_first"]:
            image = _contrast(image, params["contrast"])
        if params["saturation"] is not None:
            image = F.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = F.adjust_hue(image, params["hue"])
        if not params["contrast_first"]:
            image = _contrast(image, params["contrast"])
        return tv_tensors.wrap(F.to_dtype(image, inpt.dtype, scale=True), like=inpt)


def _contrast(image: Tensor, factor: float | None) -> Tensor:
    """Around black, as OpenCV multiplies; torchvision's is around the mean."""
    return image if factor is None else (image * factor).clamp(0, 1)


class _ResizeWithin(v2.Transform):
    """To the size within one of the limits, each with the same chance, times a scale by chance."""

    def __init__(self, limits: list[Limits], *, scale: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.limits, self.scale = limits, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size: Size = v2.query_size(flat_inputs)
        limits = self.limits[int(torch.randint(len(self.limits), ()))]
        scale = _uniform(*self.scale)
        return {"size": size_within(size, (int(scale * limits[0]), int(scale * limits[1])))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = list(params["size"])
        return self._call_kernel(
            F.resize, inpt, size, interpolation=InterpolationMode.BILINEAR, antialias=False
        )


class _RandomPart(v2.Transform):
    """A part whose sides lie, each by chance, between two bounds; no larger than the image."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.bounds = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size: Size = v2.query_size(flat_inputs)
        height, width = (_integer(min(side, self.bounds[0]), min(side, self.bounds[1])) for side in size)
        return _place(size, (height, width))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class _CropOfClasses(v2.Transform):
    """A square part in which no class has more than a share of the labelled pixels, if one is found."""

    def __init__(self, side: int, most: float) -> None:
        super().__init__()
        self.side, self.most = side, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size: Size = v2.query_size(flat_inputs)
        (labels,) = (x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        shape = min(self.side, size[0]), min(self.side, size[1])
        place = _place(size, shape)
        for _ in range(CROP_TRIES):
            part = F.crop(labels, **place)
            counts = part[part != IGNORED].unique(return_counts=True)[1]
            if len(counts) > 1 and float(counts.max() / counts.sum()) < self.most:
                break
            place = _place(size, shape)
        return place

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class _RandAugment(v2.RandAugment):
    """timm's and DeiT's increasing set by torchvision's changes, each made with even chance, by a
    magnitude of its own.
    """

    def __init__(self, changes: int, magnitude: float, std: float) -> None:
        super().__init__(num_ops=1, magnitude=0, num_magnitude_bins=31)
        self.changes, self.mean, self.std = changes, magnitude, std

    def forward(self, image: Any) -> Any:
        for _ in range(self.changes):
            if _chance(0.5):
                drawn = float(torch.randn(())) * self.std + self.mean
                self.magnitude = round(min(max(drawn, 0), 10) * 3)
                image = super().forward(image)
        return image


class _ObjectsLeft(v2.Transform):
    """Objects whose boxes have a pixel, with their masks (train/mask_planes.py), where there are any."""

    def forward(self, sample: Any) -> Any:
        boxes, is_left = F.sanitize_bounding_boxes(sample["boxes"], min_size=1)
        left = {**sample, "boxes": boxes, "labels": sample["labels"][is_left]}
        if "masks" in sample and not is_left.all():
            numbers = is_left.nonzero().flatten().tolist()
            left["masks"] = tv_tensors.Mask(select_masks(sample["masks"].as_subclass(Tensor), numbers))
        return left


_CLEAN: list[v2.Transform] = [v2.ClampBoundingBoxes(), _ObjectsLeft()]
"""Boxes end at the image, and those without a pixel go, with their labels and masks."""


def _flips(horizontal: float, vertical: float) -> list[v2.Transform]:
    flips = [(v2.RandomHorizontalFlip, horizontal), (v2.RandomVerticalFlip, vertical)]
    return [kind(chance) for kind, chance in flips if chance]


def _square(side: int, area: tuple[float, float], ratio: tuple[float, float]) -> v2.Transform:
    return v2.RandomResizedCrop(
        side, scale=area, ratio=ratio, interpolation=InterpolationMode.BICUBIC, antialias=True
    )


def _place(size: Size, part: Size) -> dict[str, int]:
    top, left = (_integer(0, whole - side) for whole, side in zip(size, part, strict=True))
    return {"top": top, "left": left, "height": part[0], "width": part[1]}


def _chance(share: float) -> bool:
    return bool(torch.rand(()) < share)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _integer(low: int, high: int) -> int:
    """Between two numbers, both of them among those."""
    return int(torch.randint(low, high + 1, ()))
