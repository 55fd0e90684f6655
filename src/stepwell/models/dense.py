"""Pyramids for dense tasks and for classification: their settings, and how they are built.

PIIP, arXiv 2501.07783, section IV: maps of several strides for detectors and segmenters; class logits.
Letters: B batch, (H, W) the largest view, C widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import encoder_arguments
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import BranchMerge, LastMap, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.heads.neck import FACTORS, SIMPLE, NeckNorm, Resampling, SimplePyramid
from stepwell.layers.linear import is_plain
from stepwell.models.pyramid import BranchConfig, Branches, PyramidEncoder, build_pyramid
from stepwell.models.vision import STRICT
from stepwell.ops.double import AnyMap
from stepwell.structures import Statistics
from stepwell.views.pyramid import image_pyramid

__all__ = ["ClassifierSettings", "DenseSettings", "PyramidClassifier", "PyramidFeatures"]

_TINY = (
    BranchConfig(encoder="vit_t", size=224),
)  # transformers saves a configuration of defaults now and then


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _PyramidSettings:
    branches: Branches = _TINY
    shared: bool = False  # one network with the same weights for every view (Fig. 1b)
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    mean: Statistics | None = None  # of the images it takes; None: those that branch 1 was pretrained with
    std: Statistics | None = None
    image_branch: int | None = None  # the branch whose size the image has; None: the one of the largest size

    def __post_init__(self) -> None:
        if self.image_branch is not None and not 0 <= self.image_branch < len(self.branches):
            raise ValueError(f"image_branch {self.image_branch} of {len(self.branches)} branches")
        networks = [(b.encoder, encoder_arguments(b.encoder, b.arguments)) for b in self.branches]
        if self.shared and any(network != networks[0] for network in networks):
            raise ValueError("shared: branches of one network may differ in their sizes only")

    @property
    def statistics(self) -> tuple[Statistics, Statistics]:
        """Mean and std that images are normalised with."""
        spec = self.branches[0].spec
        return self.mean or spec.mean, self.std or spec.std

    @property
    def image_side(self) -> int:
        """Side in pixels of the square image that the branches' sizes are made for."""
        sizes = [branch.size for branch in self.branches]
        return max(sizes) if self.image_branch is None else sizes[self.image_branch]

    @property
    def ratios(self) -> list[float]:
        """The plain quotients, as in the official code: some lose a pixel when a side is rounded down."""
        return [branch.size / self.image_side for branch in self.branches]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DenseSettings(_PyramidSettings):
    """A pyramid whose maps leave at several strides.

    merge: "dense" (two convolutions in every branch), "stages" (one, and none in branch 1), or "none" for a
    single branch. merge_branches: positions of those that are merged, None for all (Table IX). merge_after:
    the interactions with a merge of their own, beside the last. operations: of the neck, one per map that
    leaves; none where the merged maps leave as they are. neck_norm: "layernorm" in baselines of one branch.
    """

    merge: Literal["dense", "stages", "none"] = "dense"
    merge_branches: tuple[int, ...] | None = None
    merge_after: tuple[int, ...] = ()
    operations: tuple[Resampling, ...] = SIMPLE
    neck_norm: NeckNorm = "groupnorm"

    def __post_init__(self) -> None:
        super().__post_init__()
        merges = len(self.merge_after) + 1
        if self.operations and merges not in (1, len(self.operations)):
            raise ValueError(f"{len(self.operations)} operations need 1 or as many merges, got {merges}")
        if self.merge == "none" and len(self.branches) > 1:
            raise ValueError(f"merge 'none' is for a single branch, not for {len(self.branches)} branches")
        count = len(self.branches[0].interactions)
        if list(self.merge_after) != sorted(set(self.merge_after) & set(range(count))):
            raise ValueError(
                f"merge_after {self.merge_after} must rise strictly within the {count} interactions"
            )
        if count - 1 in self.merge_after and all(
            b.interactions[-1][1] == b.spec.depth - 1 for b in self.branches
        ):
            raise ValueError(
                f"merge_after {self.merge_after} holds the last interaction, behind which no layer runs: "
                "the final merge is already there"
            )
        if self.merge_branches is not None:
            chosen = set(self.merge_branches)
            if not chosen or len(chosen) < len(self.merge_branches):
                raise ValueError(f"merge_branches {self.merge_branches} must name branches, each once")
            if not chosen <= set(range(len(self.branches))):
                raise ValueError(f"merge_branches {self.merge_branches} of {len(self.branches)} branches")

    def build(self) -> PyramidFeatures:
        """The pyramid with random weights."""
        encoder = build_pyramid(self.branches, self.interaction, shared=self.shared)
        specs = [branch.spec for branch in encoder.encoders]
        steps = [[branch.interactions[i][1] for branch in self.branches] for i in self.merge_after]
        steps.append(
            [spec.depth - 1 for spec in specs]
        )  # for each merge, the layer of every branch before it
        dims = [[spec.dims[layer] for spec, layer in zip(specs, layers, strict=True)] for layers in steps]
        widths = [step[0] for step in dims]  # a merged map is as wide as branch 1
        strides = [specs[-1].strides[layers[-1]] / self.ratios[-1] for layers in steps]
        neck = None
        if self.operations:
            if len(steps) == 1:
                strides, widths = strides * len(self.operations), widths * len(self.operations)
            strides = [stride / FACTORS[op] for stride, op in zip(strides, self.operations, strict=True)]
            neck = SimplePyramid(widths, operations=self.operations, norm=self.neck_norm)
        return PyramidFeatures(
            encoder,
            [self._merge(step) for step in dims],
            neck,
            ratios=self.ratios,
            strides=strides,
            dims=widths,
            merge_after=self.merge_after,
        )

    def _merge(self, dims: list[int]) -> nn.Module:
        if self.merge == "none":
            return LastMap()
        stacks = (dense_stacks if self.merge == "dense" else stage_stacks)(dims)
        if self.merge_branches is None:
            return BranchMerge(stacks)
        return BranchMerge([stacks[i] for i in self.merge_branches], branches=self.merge_branches)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierSettings(_PyramidSettings):
    """A pyramid with class logits.

    head: "first_patch" or "cls", a head per branch that reads that token; "merge", one on the merged map.
    """

    head: Literal["first_patch", "cls", "merge"] = "first_patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "cls" and not all(branch.has_class_token for branch in self.branches):
            raise ValueError(
                "head 'cls' reads the class token of every branch; build each with class_token=True, or take "
                "'first_patch'"
            )

    def build(self, num_classes: int) -> PyramidClassifier:
        """The classifier with random weights."""
        encoder = build_pyramid(self.branches, self.interaction, shared=self.shared)
        dims = [branch.spec.dim for branch in encoder.encoders]
        head: nn.Module
        if self.head == "merge":
            head = MergedHead(BranchMerge(linear_stacks(dims)), dims[0], num_classes)
        else:
            head = BranchHeads(dims, num_classes, read=self.head)
        return PyramidClassifier(encoder, head, ratios=self.ratios)


class PyramidFeatures(nn.Module):
    """One image -> maps of several strides, for dense tasks.

    ratios: side of every branch's view relative to the image. merges: one after each interaction in
    `merge_after`, whose numbers rise, and a last one for the final states (`LastMap` where nothing is to be
    merged). neck: resamples each of them, or the only one in several ways. Map i that leaves is `dims[i]`
    wide and at stride `strides[i]`, in pixels of the image.
    """

    def __init__(
        self,
        encoder: PyramidEncoder,
        merges: Sequence[nn.Module],
        neck: SimplePyramid | None = None,
        *,
        ratios: Sequence[float],
        strides: Sequence[float],
        dims: Sequence[int],
        merge_after: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if len(merges) != len(merge_after) + 1:
            raise ValueError(
                f"merging after {list(merge_after)} and at the end takes {len(merge_after) + 1} merges"
            )
        self.encoder = encoder
        self.merges = nn.ModuleList(merges)
        self.neck = neck
        self.ratios = tuple(ratios)
        self.strides = tuple(strides)
        self.dims = tuple(dims)
        self.merge_after = tuple(merge_after)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> a map (B, C, H / stride, W / stride) for each of `strides`."""
        return self._resampled(self._merged(image))

    def unfinished(self, image: Tensor, stages: Sequence[int]) -> tuple[AnyMap, ...]:
        """As `forward`, the maps at some places alone, for heads that begin with a `Projection`."""
        maps = self._merged(image)
        if self.neck is None or not is_plain(self.neck, SimplePyramid):
            resampled = self._resampled(maps)
            return tuple(resampled[i] for i in stages)
        return tuple(self.neck.unfinished(i, maps[i if self.merge_after else 0]) for i in stages)

    def _resampled(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(maps if self.neck is None else self.neck(maps if self.merge_after else maps[0]))

    def _merged(self, image: Tensor) -> list[Tensor]:
        steps = self.encoder(image_pyramid(image, self.ratios), self.merge_after)
        return [merge(self.encoder.maps(states)) for merge, states in zip(self.merges, steps, strict=True)]


class PyramidClassifier(nn.Module):
    """One image -> class logits. head: `BranchHeads`, or `MergedHead` with a merge of `linear_stacks`."""

    def __init__(self, encoder: PyramidEncoder, head: nn.Module, *, ratios: Sequence[float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.ratios = tuple(ratios)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, number of classes)."""
        (final,) = self.encoder(image_pyramid(image, self.ratios))
        logits: Tensor = self.head(final)
        return logits
