"""What a vision system makes of images, for the tests of each."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image


def seen(vision: Any, images: list[Image.Image]) -> list[Any]:
    """Features of every image, all of them in one call."""
    layouts = [vision.geometry.layout((image.height, image.width)) for image in images]
    inputs = [
        x
        for image, layout in zip(images, layouts, strict=True)
        for x in vision.geometry.inputs(image, layout)
    ]
    with torch.no_grad():
        return vision.encode(inputs, layouts)
