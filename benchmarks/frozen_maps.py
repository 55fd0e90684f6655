"""Maps of a frozen encoder, and the ways to enlarge them that benchmarks compare: bilinear, and up-samplers
that the task `upsampler` of `stepwell train` left.

Letters: B batch, C channels, (h, w) the encoder's grid, p pixels a cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import stepwell
from stepwell.encoders.catalogue import build_encoder
from stepwell.models.upsampler import StepwellUpsampler
from stepwell.structures import Size
from stepwell.train.multiview import HiddenMap
from stepwell.views.preprocess import to_tensor

BATCH = 16  # of what is only computed
OF_THE_ENCODER = ("encoder", "arguments", "select_layer", "mean", "std")

Enlarge = Callable[[Tensor, Tensor, int], Tensor]
"""(map (B, C, h, w), image (B, 3, p*h, p*w), n) -> (B, C, n*h, n*w)."""


class Samples(NamedTuple):
    """Both in fp16: images (N, 3, p*h, p*w), normalised, and maps (N, C, h, w)."""

    images: Tensor
    maps: Tensor


def add_models(parser: argparse.ArgumentParser) -> None:
    """The options --encoder-weights and --upsampler."""
    parser.add_argument("--encoder-weights", required=True, help="of the encoder that the up-samplers name")
    help_text = "a folder that the task `upsampler` left, under a name of yours; as often as you like"
    parser.add_argument("--upsampler", action="append", required=True, metavar="NAME=FOLDER", help=help_text)


def named_paths(arguments: Sequence[str]) -> dict[str, str]:
    """["NAME=PATH"] -> {NAME: PATH}. Raises ValueError for another form, and for a name that comes twice."""
    paths: dict[str, str] = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        if not (name and path) or name in paths:
            raise ValueError(f"expected NAME=PATH, each name once, got {argument!r}")
        paths[name] = path
    return paths


def load_models(weights: str, upsamplers: Sequence[str]) -> tuple[HiddenMap, dict[str, StepwellUpsampler]]:
    """The frozen encoder, and the up-samplers by the names given to them.

    Raises ValueError for what is no up-sampler, for one of less than two levels, and for up-samplers of
    maps that differ.
    """
    paths = named_paths(upsamplers)
    models = {name: stepwell.load(path).eval() for name, path in paths.items()}
    first, config = next((name, model.config) for name, model in models.items())
    for name, model in models.items():
        if not isinstance(model, StepwellUpsampler) or model.config.levels < 2:
            raise ValueError(f"{paths[name]} is no up-sampler of two levels or more")
        for what in OF_THE_ENCODER:
            theirs, ours = getattr(model.config, what), getattr(config, what)
            if theirs != ours:
                raise ValueError(f"{name} takes maps of {what} {theirs}, and {first} of {ours}")
    encoder = build_encoder(config.encoder, weights=weights, **config.arguments)
    return HiddenMap(encoder, config.select_layer % (encoder.spec.depth + 1)).eval(), models


def plain(map: Tensor, image: Tensor, scale: int) -> Tensor:
    """Every cell repeated."""
    return F.interpolate(map, scale_factor=scale, mode="nearest")


def bilinear(map: Tensor, image: Tensor, scale: int) -> Tensor:
    return F.interpolate(map, scale_factor=scale, mode="bilinear")


def guided(upsampler: StepwellUpsampler) -> Enlarge:
    """By powers of two: every level doubles the size of the one before it."""

    def enlarge(map: Tensor, image: Tensor, scale: int) -> Tensor:
        return upsampler.levels(map, image)[scale.bit_length() - 2].corrected()

    return enlarge


@torch.inference_mode()
def extract(encoder: HiddenMap, images: Iterable[Image.Image], size: Size) -> Samples:
    """Every image, resized to `size`, and its map."""
    spec = encoder.encoder.spec
    tensors = torch.stack([to_tensor(image, size, spec.mean, spec.std).half() for image in images])
    return Samples(tensors, torch.cat([encoder(part.float()).half() for part in tensors.split(BATCH)]))


def statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, h, w) -> mean and deviation of every channel, (C, 1, 1)."""
    cells = maps.float().transpose(0, 1).flatten(1)
    return cells.mean(1)[:, None, None], cells.std(1).clamp(min=1e-6)[:, None, None]


@torch.inference_mode()
def enlarged(samples: Samples, way: Enlarge, scale: int, moments: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """Batches of standardised maps, in fp16."""
    mean, std = moments
    for images, maps in zip(samples.images.split(BATCH), samples.maps.split(BATCH), strict=True):
        yield ((way(maps.float(), images.float(), scale) - mean) / std).half()
