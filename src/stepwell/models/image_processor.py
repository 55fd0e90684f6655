"""Images -> the tensors of a vision system's views.

Letters: V views in all, (H, W) the largest of them.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from stepwell.models.settings import PlainConfig, VisionConfig, vision_json, vision_settings
from stepwell.models.vision import build_geometry
from stepwell.structures import Geometry
from stepwell.views.decode import open_image, upright_rgb

__all__ = ["StepwellImageProcessor", "flat"]

_SAVED_BESIDE = frozenset({"image_processor_type", "processor_class", "backend", "use_fast"})

Picture = Image.Image | str | os.PathLike[str] | bytes | np.ndarray[Any, Any]


class StepwellImageProcessor(BaseImageProcessor):
    """Pictures -> `pixel_values` (V, 3, H, W), zero-padded at the right and bottom, and `image_sizes`
    (pictures, 2).

    vision_config: settings of a vision system or their JSON. Pictures may be PIL images, paths, bytes,
    data: URLs or uint8 arrays (H, W, 3); network addresses are refused, and everything is decoded within
    views/decode.py's limits.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012

    def __init__(self, vision_config: VisionConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if unknown := sorted(kwargs.keys() - _SAVED_BESIDE):
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, unknown))}")
        super().__init__(**kwargs)
        self.vision_config = vision_json(PlainConfig() if vision_config is None else vision_config)

    @cached_property
    def geometry(self) -> Geometry:
        return build_geometry(vision_settings(self.vision_config))

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        output.pop("geometry", None)
        return output

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Anything that names or holds a picture -> an upright RGB PIL image; lists are kept as they are
        nested."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return _open(image_url_or_urls)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """A picture, a list of them, or lists of lists -> BatchFeature, in reading order."""
        if kwargs:
            raise ValueError(f"StepwellImageProcessor knows no {', '.join(map(repr, sorted(kwargs)))}")
        pictures = list(flat(self.fetch_images(images)))
        views: list[Tensor] = []
        for picture in pictures:
            layout = self.geometry.layout((picture.height, picture.width))
            views += self.geometry.views(picture, layout)
        sizes = torch.tensor([(picture.height, picture.width) for picture in pictures])
        return BatchFeature(
            {"pixel_values": _stack_padded(views), "image_sizes": sizes}, tensor_type=return_tensors
        )

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


def flat(images: Any) -> Iterable[Any]:
    """Nested lists of images, one image after the other."""
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from flat(item)
    else:
        yield images


def _stack_padded(views: list[Tensor]) -> Tensor:
    """(3, h, w) each -> (V, 3, L, L), L the longest side: alike for all pictures of a pyramid, so that others
    may join batches made apart."""
    side = max(max(view.shape[1:]) for view in views)
    return torch.stack([F.pad(view, (0, side - view.shape[2], 0, side - view.shape[1])) for view in views])


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return upright_rgb(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise ValueError(f"an array picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] not in (3, 4)):
            raise ValueError(f"an array picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        return upright_rgb(Image.fromarray(picture))
    if isinstance(picture, str) and picture[:5].lower() == "data:":
        return open_image(_data_url(picture))
    if isinstance(picture, str) and "://" in picture[:16]:
        raise ValueError("pictures are not fetched from the network; download the file and pass its path")
    if isinstance(picture, (str, bytes, os.PathLike, io.IOBase)):
        return open_image(picture)
    raise TypeError(
        f"a picture is a PIL image, path, bytes, data: URL or uint8 array, got {type(picture).__name__}"
    )


def _data_url(url: str) -> bytes:
    head, _, payload = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data: URL of a picture must be base64-encoded")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the data: URL is not valid base64") from None
