"""Which pixels of a region are the object's.

He et al., arXiv 1703.06870, sections 3 and 3.1.
Letters: R regions, C width, s side of a pooled region, m = 2*s side of a mask, K classes.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.ops.boxes import clip_boxes
from stepwell.ops.double import double_map
from stepwell.ops.precision import at_least_single
from stepwell.ops.regions import pool_regions

__all__ = ["MaskHead", "MaskHeadConfig", "mask_loss", "mask_targets"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class MaskHeadConfig:
    """The defaults are those of the released Mask R-CNNs. weight: of the loss."""

    num_convs: int = Field(default=4, ge=1)
    dim: int = Field(default=256, ge=1)
    kernel_size: int = Field(default=3, ge=1)
    weight: float = 1.0


class MaskHead(nn.Module):
    """dim: width of the pooled regions."""

    def __init__(self, dim: int, num_classes: int, config: MaskHeadConfig) -> None:
        super().__init__()
        dims = [dim, *[config.dim] * config.num_convs]
        padding = (config.kernel_size - 1) // 2
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, config.kernel_size, padding=padding) for a, b in pairwise(dims)
        )
        self.upsample = _Double(config.dim, config.dim, 2, stride=2)
        self.logits = _OfClasses(config.dim, num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (*self.convs, self.upsample, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor, labels: Tensor | None = None) -> Tensor:
        """(R, C, s, s) -> logits in single precision at least: (R, m, m) of the classes `labels` (R,), or
        (R, K, m, m) of all.
        """
        for conv in self.convs:
            regions = F.relu(conv(regions))
        regions = F.relu(self.upsample(regions))
        logits: Tensor = self.logits(regions, labels)
        return logits.to(at_least_single(logits.dtype))


class _Double(nn.ConvTranspose2d):
    """The transposed convolution of a 2x2 kernel at stride 2, by one matrix product where that is faster."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(R, C, s, s) -> (R, C, 2*s, 2*s)."""
        assert self.bias is not None
        return double_map(x, self.weight, self.bias)


class _OfClasses(nn.Conv2d):
    """A convolution of one pixel, of whose channels each region may want one."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(R, C, m, m) -> (R, K, m, m), or (R, m, m) of the channels `labels` (R,)."""
        if labels is None:
            return super().forward(x)
        assert self.bias is not None
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (R, m*m, C)
        products = rows @ self.weight[labels][:, :, 0].to(rows.dtype) + self.bias[labels][:, None, None]
        return products.view(-1, *x.shape[-2:])


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """What masks of boxes should be: (R, side, side), 0 or 1, in the dtype of the boxes.

    masks (n, H, W), 0 or 1; boxes (R, 4), of which only what lies in the image counts; objects (R,): places
    of their masks.
    """
    boxes = clip_boxes(boxes, (masks.shape[1], masks.shape[2]))
    shares = pool_regions(masks[:, None].to(boxes.dtype), boxes, objects, side, stride=1)
    return (shares[:, 0] >= 0.5).to(boxes.dtype)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(R, m, m), (R, m, m): mean over cells and regions; 0 without regions."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / max(targets.numel(), 1)
