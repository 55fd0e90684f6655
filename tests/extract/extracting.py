"""Pictures, a tiny classifier and what a folder of an extraction holds, for the tests of this folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from PIL import Image

from stepwell.extract.folder import MANIFEST
from stepwell.models.dense import ClassifierSettings
from stepwell.models.perception import PyramidClassifierConfig, PyramidForImageClassification
from stepwell.models.pyramid import BranchConfig

BRANCH = BranchConfig(
    encoder="vit_nano",
    size=32,
    interactions=((0, 0), (1, 1)),
    arguments={"dim": 32, "depth": 2, "num_heads": 2, "class_token": False},
)


def classifier() -> PyramidForImageClassification:
    torch.manual_seed(0)
    config = PyramidClassifierConfig(pyramid=ClassifierSettings(branches=(BRANCH,)), num_labels=4)
    return PyramidForImageClassification(config).eval()


def picture(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """size: (width, height)."""
    numbers = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def png(seed: int = 0, size: tuple[int, int] = (24, 20)) -> bytes:
    file = io.BytesIO()
    picture(seed, size).save(file, "png")
    return file.getvalue()


def pictures_in(folder: Path, count: int) -> list[str]:
    """Their names as ids have them, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:04}.png")
    return [str(folder / f"{i:04}.png") for i in range(count)]


def read(folder: Path) -> pandas.DataFrame:
    """With None where there is nothing."""
    frame = pandas.read_parquet(folder).astype(object)
    return frame.where(frame.notna(), None)


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["settings"]
    return found
