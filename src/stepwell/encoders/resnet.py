"""ResNet as a flat list of residual layers that tokens pass one by one, at any image size.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, with the stride in the 3x3
convolution of a bottleneck, as torchvision and transformers have it. Weights are named as by transformers.
Letters: B batch, C width, (H, W) the grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepwell.encoders.batch_statistics import BatchStatistics
from stepwell.encoders.encoder import run_layers
from stepwell.ops.rearrange import tokens_to_map
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Statistics, TokenMap

__all__ = ["ResNet"]

_STEM_STRIDE = 4
_NARROW = 16
"""Below it oneDNN 3.13 (torch 2.15, AVX-512) writes past its memory in the gradient of a strided 1x1
convolution of channels-last maps from 48x48 on: the process aborts.
"""


class ResNet(BatchStatistics):
    """Image -> stem -> residual layers, as an Encoder.

    `dims` and `depths` have one entry per stage; the first stage keeps the stem's stride of 4, each later one
    halves the grid in its first layer. `layer`: two 3x3 convolutions, or a bottleneck of a quarter of the
    width. `stem_dim`: width of the stem.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        layer: Literal["basic", "bottleneck"] = "basic",
        stem_dim: int = 64,
        checkpointing: bool = False,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if layer not in _LAYERS:
            raise ValueError(f"unknown layer {layer!r}; choose from {', '.join(_LAYERS)}")
        if layer == "bottleneck" and any(dim % 4 for dim in dims):
            raise ValueError(f"a bottleneck is a quarter as wide as its stage, got {list(dims)}")
        self.spec = self.spec_of(dims=dims, depths=depths, mean=mean, std=std)
        self.embedder = nn.Sequential(
            OrderedDict(embedder=_Convolution(3, stem_dim, kernel=7, stride=2), pooler=nn.MaxPool2d(3, 2, 1))
        )
        kind, widths = _LAYERS[layer], [stem_dim, *dims]
        stages = (
            _stage(kind, widths[i], dim, depth, stride=1 if i == 0 else 2)
            for i, (dim, depth) in enumerate(zip(dims, depths, strict=True))
        )
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})
        self.depths = tuple(depths)
        self.gradient_checkpointing = checkpointing  # as transformers looks for it
        self.reset_parameters()

    @staticmethod
    def spec_of(
        *, dims: Sequence[int], depths: Sequence[int], mean: Statistics, std: Statistics
    ) -> EncoderSpec:
        """The spec of a network with these constructor arguments."""
        if not len(dims) == len(depths) > 0 or min(*dims, *depths) < 1:
            raise ValueError(f"a stage needs width and depth, got {list(dims)}, {list(depths)}")
        stage_of_layer = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
        return EncoderSpec(
            dims=tuple(dims[stage] for stage in stage_of_layer),
            strides=tuple(_STEM_STRIDE * 2**stage for stage in stage_of_layer),
            mean=mean,
            std=std,
        )

    def reset_parameters(self) -> None:
        """He's normal values for convolutions, by what leaves them; norms pass on what they get."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> tokens; a remainder smaller than a stride is dropped, here and later."""
        image = _whole(image, _STEM_STRIDE).contiguous(memory_format=torch.channels_last)
        return _to_tokens(self.embedder(image))

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Layers first..last, both included; an empty range (last < first) returns `state` unchanged."""
        if last < first:
            return state
        map = tokens_to_map(state.tokens, state.size)
        return _to_tokens(run_layers(self._layers(), map, first, last, checkpointing=self.checkpointing))

    def _layers(self) -> list[Any]:
        """From a map (B, C, H, W) to the next."""
        stages: Any = self.encoder["stages"]
        return [
            _halved(layer) if i == 0 and stage > 0 else layer
            for stage, layers in enumerate(stages)
            for i, layer in enumerate(layers["layers"])
        ]

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W), a view whose memory is channels-last."""
        return tokens_to_map(state.tokens, state.size)

    def forward(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> the last layer's tokens."""
        return self.run(self.stem(image), 0, self.spec.depth - 1)


class _Convolution(nn.Module):
    """Convolution, norm, and a ReLU unless something is added first."""

    def __init__(self, dim: int, out_dim: int, *, kernel: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(dim, out_dim, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_dim)
        self.relu = relu
        self.skips = kernel == 1 and stride > 1 and dim < _NARROW

    def forward(self, map: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_dim, H / stride, W / stride)."""
        normed: Tensor = self.normalization(self._skipping(map) if self.skips else self.convolution(map))
        return normed.relu() if self.relu else normed

    def _skipping(self, map: Tensor) -> Tensor:
        """The convolution where it falls, without a stride: the same values."""
        rows, columns = self.convolution.stride
        seen = map[:, :, ::rows, ::columns].contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(seen, self.convolution.weight)


class _Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes differ."""

    def __init__(self, dim: int, out_dim: int, *, stride: int) -> None:
        super().__init__()
        self.shortcut = (
            nn.Identity()
            if dim == out_dim and stride == 1
            else _Convolution(dim, out_dim, kernel=1, stride=stride, relu=False)
        )
        self.layer = self.convolutions(dim, out_dim, stride)

    @staticmethod
    def convolutions(dim: int, out_dim: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            _Convolution(dim, out_dim, kernel=3, stride=stride),
            _Convolution(out_dim, out_dim, kernel=3, relu=False),
        )

    def forward(self, map: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_dim, H / stride, W / stride)."""
        added: Tensor = self.layer(map) + self.shortcut(map)
        return added.relu()


class _Bottleneck(_Basic):
    """A 3x3 convolution of a quarter of the width, between two of 1x1."""

    @staticmethod
    def convolutions(dim: int, out_dim: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            _Convolution(dim, out_dim // 4, kernel=1),
            _Convolution(out_dim // 4, out_dim // 4, kernel=3, stride=stride),
            _Convolution(out_dim // 4, out_dim, kernel=1, relu=False),
        )


_LAYERS = {"basic": _Basic, "bottleneck": _Bottleneck}


def _stage(kind: type[_Basic], dim: int, out_dim: int, depth: int, *, stride: int) -> nn.ModuleDict:
    layers = [kind(dim if i == 0 else out_dim, out_dim, stride=stride if i == 0 else 1) for i in range(depth)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def _halved(layer: Any) -> Any:
    """A layer of stride 2 on the part of a map that it halves."""

    def run(map: Tensor) -> Tensor:
        halved: Tensor = layer(_whole(map, 2))
        return halved

    return run


def _whole(map: Tensor, stride: int) -> Tensor:
    """(B, C, H, W) without the rest of a stride below and on the right."""
    height, width = map.shape[2] // stride * stride, map.shape[3] // stride * stride
    if not height or not width:
        raise ValueError(
            f"{map.shape[2]}x{map.shape[3]} is smaller than one cell of stride {stride}; use a larger image"
        )
    return map[:, :, :height, :width]


def _to_tokens(map: Tensor) -> TokenMap:
    """(B, C, H, W) -> tokens and their size."""
    return TokenMap(map.permute(0, 2, 3, 1).flatten(1, 2), (map.shape[2], map.shape[3]))
