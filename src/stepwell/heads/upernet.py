"""Maps of a backbone -> a class for every pixel.

UperNet, arXiv 1807.10221, as MMSegmentation builds it and PIIP (arXiv 2501.07783, section IV) uses it: the
coarsest map is pooled to a few sizes and read with its surroundings, the finer maps are added to it from the
top down, and all are joined on the finest grid. While it learns, a small head on an earlier map (FCN, arXiv
1411.4038) is trained beside it.
Letters: B batch, K classes, C width of a map, (h, w) its grid, (H, W) the size of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.layers.conv import Conv2d
from stepwell.layers.projection import Projection
from stepwell.ops.double import AnyMap, finished
from stepwell.ops.precision import at_least_single
from stepwell.ops.resize import resize_map
from stepwell.structures import Size

__all__ = ["AuxiliaryHead", "ConvNormRelu", "UperNet", "UperNetConfig"]

Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UperNetConfig:
    """The defaults are MMSegmentation's; every released model of PIIP has 1536 channels in both heads.

    channels: width of all layers. pool_sizes: sides of the grids that the coarsest map is averaged to.
    auxiliary_map: position of the map that the auxiliary head reads, finest first; None leaves the head out.
    auxiliary_weight: of its loss. dropout: of whole channels before the classifiers. ignored_label: of pixels
    without a class. loss_mean: the loss is divided by all pixels, ignored ones too, as in the official code;
    or by those that are kept.
    """

    kind: Literal["upernet"] = "upernet"
    channels: Count = 512
    pool_sizes: tuple[Count, ...] = (1, 2, 3, 6)
    auxiliary_channels: Count = 256
    auxiliary_map: Annotated[int, Field(ge=0)] | None = 2
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    ignored_label: int = 255
    loss_mean: Literal["all_pixels", "kept_pixels"] = "all_pixels"

    def build(self, dims: Sequence[int], strides: Sequence[float], num_classes: int) -> UperNet:
        """The head with random weights. dims, strides: of the maps, finest first.

        Raises ValueError for strides that do not rise, and where there is no map for the auxiliary head.
        """
        if not dims or len(dims) != len(strides):
            raise ValueError(
                f"UperNet takes a width and a stride a map, got {list(dims)} and {list(strides)}"
            )
        if any(fine >= coarse for fine, coarse in pairwise(strides)):
            raise ValueError(
                f"UperNet takes maps from the finest to the coarsest, got strides {list(strides)}"
            )
        return UperNet(dims, num_classes, self)


class UperNet(nn.Module):
    """Norms are batch norms of one process: `nn.SyncBatchNorm.convert_sync_batchnorm` makes them those of
    several, as in the official training. Layers run in the precision of the parameters, losses in single
    precision at least.

    dims: width of every map, finest first.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, config: UperNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        *finer, coarsest = dims
        width = config.channels
        self.pools = nn.ModuleList(ConvNormRelu(coarsest, width) for _ in config.pool_sizes)
        self.context = ConvNormRelu(coarsest + len(config.pool_sizes) * width, width, 3)
        self.laterals = nn.ModuleList(ConvNormRelu(dim, width) for dim in finer)
        self.smooth = nn.ModuleList(ConvNormRelu(width, width, 3) for _ in finer)
        self.join = ConvNormRelu(len(dims) * width, width, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary: AuxiliaryHead | None = None
        if config.auxiliary_map is not None:
            if config.auxiliary_map >= len(dims):
                raise ValueError(
                    f"auxiliary_map {config.auxiliary_map} of {len(dims)} maps: name one of them, from 0 on, "
                    "or None for no auxiliary head"
                )
            self.auxiliary = AuxiliaryHead(dims[config.auxiliary_map], num_classes, config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of std 0.01 in the classifier; fan-out normal (He) in the other convolutions, as MMCV."""
        for module in self.modules():
            if isinstance(module, ConvNormRelu):
                module.reset_parameters()
        _start_classifier(self.classifier)
        if self.auxiliary is not None:
            _start_classifier(self.auxiliary.classifier)

    def forward(self, maps: Sequence[AnyMap]) -> Tensor:
        """(B, C, h, w), finest first -> logits (B, K, h, w) on the finest grid."""
        logits: Tensor = self.classifier(self.dropout(self.join(self._pyramid(self._given(maps)))))
        return logits

    def losses(self, maps: Sequence[AnyMap], labels: Tensor) -> dict[str, Tensor]:
        """maps: (B, C, h, w), finest first; labels: (B, H, W), a class or the ignored label.

        Cross-entropies with their weights in them, "segmentation" and, with an auxiliary head, "auxiliary":
        the loss is their sum. Raises ValueError for labels of another shape.
        """
        if labels.ndim != 3 or len(labels) != len(maps[0]):
            raise ValueError(
                f"labels are (B, H, W), a class a pixel, for {len(maps[0])} images, got {tuple(labels.shape)}"
            )
        losses = {"segmentation": self._loss(self(maps), labels)}
        if self.auxiliary is not None:
            assert self.config.auxiliary_map is not None
            logits = self.auxiliary(finished(self._given(maps)[self.config.auxiliary_map]))
            losses["auxiliary"] = self.config.auxiliary_weight * self._loss(logits, labels)
        return losses

    def _given(self, maps: Sequence[AnyMap]) -> list[AnyMap]:
        return [x.to(self.classifier.weight.dtype) for x in maps]

    def _pyramid(self, maps: Sequence[AnyMap]) -> Tensor:
        """-> (B, number of maps * width, h, w): all maps on the finest grid, finest first."""
        *finer, coarsest = maps
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        levels.append(self._with_context(finished(coarsest)))
        for i in reversed(range(len(finer))):
            levels[i] = levels[i] + resize_map(levels[i + 1], _size(levels[i]))
        levels[:-1] = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        return torch.cat([resize_map(level, _size(levels[0])) for level in levels], dim=1)

    def _with_context(self, x: Tensor) -> Tensor:
        """Pyramid pooling (PSPNet, arXiv 1612.01105): the map beside its averages over 1, 4, 9, ... parts."""
        averages = [
            resize_map(pool(F.adaptive_avg_pool2d(x, size)), _size(x))
            for pool, size in zip(self.pools, self.config.pool_sizes, strict=True)
        ]
        context: Tensor = self.context(torch.cat([x, *averages], dim=1))
        return context

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar without its weight."""
        logits = resize_map(logits.to(at_least_single(logits.dtype)), _size(labels))
        ignored = self.config.ignored_label
        total = F.cross_entropy(logits, labels.long(), ignore_index=ignored, reduction="sum")
        if self.config.loss_mean == "all_pixels":
            return total / labels.numel()
        return total / (labels != ignored).sum().clamp(min=1)


class AuxiliaryHead(nn.Module):
    """A convolution and a classifier on one map, for training alone."""

    def __init__(self, dim: int, num_classes: int, config: UperNetConfig) -> None:
        super().__init__()
        self.conv = ConvNormRelu(dim, config.auxiliary_channels, 3)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = nn.Conv2d(config.auxiliary_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K, h, w)."""
        logits: Tensor = self.classifier(self.dropout(self.conv(x)))
        return logits


class ConvNormRelu(nn.Module):
    """A convolution without bias that keeps the grid, batch norm, ReLU."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 1) -> None:
        super().__init__()
        if kernel_size == 1:
            self.conv: nn.Conv2d = Projection(dim, out_dim, bias=False)
        else:
            self.conv = Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_dim)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: AnyMap) -> Tensor:
        """(B, C, h, w) -> (B, E, h, w). Raises ValueError where batch norm would learn from single values."""
        if (
            self.norm.training
            and x.shape[0] * x.shape[-2] * x.shape[-1] == 1
            and type(self.norm) is nn.BatchNorm2d
        ):
            raise ValueError(
                "batch norm cannot learn from one image averaged to a single cell; train on batches of at "
                "least 2 images, or put the head in eval mode to keep its norms"
            )
        return F.relu(self.norm(self.conv(x)), inplace=True)


def _size(x: Tensor) -> Size:
    return x.shape[-2], x.shape[-1]


def _start_classifier(conv: nn.Conv2d) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
