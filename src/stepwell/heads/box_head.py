"""What is in a region, and where exactly: classes and boxes of the second stage.

Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870.
Letters: R regions, C width, s side of a pooled region, K classes; background is class K.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.heads.box_coder import BoxCoder
from stepwell.heads.box_loss import BoxLoss
from stepwell.layers.linear import Linear
from stepwell.ops.finite import check_finite
from stepwell.ops.precision import at_least_single
from stepwell.ops.regions import suppress
from stepwell.structures import Size

__all__ = ["BoxHead", "BoxHeadConfig", "ScoredBoxes", "Selection", "choose_boxes"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BoxHeadConfig:
    """The defaults are those of the released Mask R-CNNs.

    num_convs, conv_dim: 3x3 convolutions before the linear layers, num_linears of them of width dim. norm:
    behind each convolution, which then has no bias; nn.SyncBatchNorm.convert_sync_batchnorm makes a batch of
    those of several processes. per_class: a class has a box of its own.
    """

    num_convs: int = Field(default=0, ge=0)
    conv_dim: int = Field(default=256, ge=1)
    norm: Literal["batch"] | None = None
    num_linears: int = Field(default=2, ge=1)
    dim: int = Field(default=1024, ge=1)
    per_class: bool = True
    coder: BoxCoder = BoxCoder(stds=(0.1, 0.1, 0.2, 0.2))
    box_loss: BoxLoss = BoxLoss()
    class_weight: float = 1.0


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Selection:
    """Of all boxes of all classes: those with a score above `above`, of two of a class that overlap by more
    than `iou` the better, and the best `num` of the image.
    """

    above: float = 0.05
    iou: float = 0.5
    num: int = Field(default=100, ge=1)


class ScoredBoxes(NamedTuple):
    """Of one image, best first."""

    boxes: Tensor  # (n, 4)
    scores: Tensor  # (n,)
    labels: Tensor  # (n,)


class BoxHead(nn.Module):
    """dim: width of the pooled regions, side: theirs in cells."""

    def __init__(self, dim: int, side: int, num_classes: int, config: BoxHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        conv_dims = [dim, *[config.conv_dim] * config.num_convs]
        self.convs = nn.ModuleList(_Conv(a, b, config.norm) for a, b in pairwise(conv_dims))
        dims = [conv_dims[-1] * side * side, *[config.dim] * config.num_linears]
        self.linears = nn.ModuleList(Linear(a, b) for a, b in pairwise(dims))
        self.classes = Linear(config.dim, num_classes + 1)
        self.deltas = Linear(config.dim, 4 * num_classes if config.per_class else 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        linears = cast("list[Linear]", list(self.linears))
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for linear in (*linears, self.classes, self.deltas):
            nn.init.zeros_(linear.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, s, s) -> logits (R, K+1) and deltas (R, K or 1, 4), in single precision at least."""
        for conv in self.convs:
            regions = conv(regions)
        hidden = regions.flatten(1)
        for linear in self.linears:
            hidden = F.relu(linear(hidden))
        dtype = at_least_single(hidden.dtype)
        return self.classes(hidden).to(dtype), self.deltas(hidden).to(dtype).unflatten(1, (-1, 4))

    def of_class(self, deltas: Tensor, labels: Tensor) -> Tensor:
        """deltas (R, K or 1, 4), labels (R,) -> (R, 4)."""
        places = labels if self.config.per_class else torch.zeros_like(labels)
        return deltas[torch.arange(len(deltas), device=deltas.device), places]

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Named classes and boxes, both by the number of regions.

        boxes (R, 4) are those of the regions, labels (R,) have background as K, targets (R, 4) are the boxes
        of the objects, and are not looked at for background.
        """
        num = max(len(labels), 1)
        classes = F.cross_entropy(logits, labels, reduction="sum") / num
        positive = (labels < self.num_classes).nonzero()[:, 0]
        moves = self.of_class(deltas[positive], labels[positive])
        errors = self.config.box_loss(moves, boxes[positive], targets[positive], self.config.coder)
        return {"classes": self.config.class_weight * classes, "boxes": errors.sum() / num}

    @torch.no_grad()
    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, size: Size, labels: Tensor | None = None
    ) -> Tensor:
        """(R, 4) boxes moved by the deltas of their class, and clipped to an image of size (H, W).

        labels (R,): known classes. Those of background, label K, move as their best class, and so do all
        without labels.
        """
        best = logits[:, :-1].argmax(1)
        labels = best if labels is None else torch.where(labels == self.num_classes, best, labels)
        return self.config.coder.decode(boxes, self.of_class(deltas, labels), size)

    def select(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, size: Size, selection: Selection
    ) -> ScoredBoxes:
        """What is found in one image of size (H, W). boxes (R, 4): those of the regions. Raises ValueError
        for logits and deltas that are no numbers.
        """
        check_finite(logits, deltas)
        scores = logits.softmax(1)[:, :-1]
        regions, labels = (scores > selection.above).nonzero(as_tuple=True)
        moves = self.of_class(deltas[regions], labels)
        decoded = self.config.coder.decode(boxes[regions], moves, size)
        return choose_boxes(decoded, scores[regions, labels], labels, selection)


def choose_boxes(boxes: Tensor, scores: Tensor, labels: Tensor, selection: Selection) -> ScoredBoxes:
    """Boxes (n, 4), scores (n,) and labels (n,) of one image, all scores above `selection.above`."""
    kept = suppress(boxes, scores, labels, selection.iou)[: selection.num]
    return ScoredBoxes(boxes[kept], scores[kept], labels[kept])


class _Conv(nn.Module):
    """3x3 convolution, norm and ReLU."""

    def __init__(self, dim: int, out_dim: int, norm: str | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1, bias=norm is None)
        self.norm = nn.BatchNorm2d(out_dim) if norm == "batch" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, s, s) -> (R, D, s, s)."""
        return F.relu(self.norm(self.conv(x)))
