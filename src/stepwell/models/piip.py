"""Parameter-inverted image pyramids: several encoders on one picture at several sizes, in conversation.

PIIP, arXiv 2501.07783, section III. Branch 0 is the largest network on the smallest picture, the last branch
the smallest network on the largest picture; everything is a list, so any number of branches is the same code.
Letters: B batch, (H, W) the largest picture, C widths, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepwell.encoders.encoder import Encoder
from stepwell.fuse.interaction import DIRECTIONS, Interaction
from stepwell.fuse.merge import TokenMerge
from stepwell.models.geometry import PyramidGeometry
from stepwell.structures import EncoderSpec, FeatureMaps, Size, TokenLayout, TokenMap, VisualTokens
from stepwell.views.pyramid import image_pyramid

__all__ = [
    "LayerRange",
    "PiipVision",
    "PyramidClassifier",
    "PyramidEncoder",
    "PyramidFeatures",
    "build_interactions",
    "check_rising",
]

LayerRange = tuple[int, int]
"""(first, last) layer of an encoder, both included."""


class PyramidEncoder(nn.Module):
    """Encoders that run side by side and interact after chosen layers.

    branches: Encoders; ranges: for every branch, the layers it runs before each interaction, adjoining from 0
    on; interactions: what happens after each. Layers behind the last range run after the last interaction,
    and all layers where there is none. checkpointing: recompute interactions in the backward pass (encoders
    have their own).
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        interactions: Sequence[nn.Module] = (),
        ranges: Sequence[Sequence[LayerRange]] | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        ranges = [()] * len(branches) if ranges is None else ranges
        if not branches or len(ranges) != len(branches):
            raise ValueError(
                f"{len(branches)} branches need one list of layer ranges each, got {len(ranges)}"
            )
        for branch, found in zip(branches, ranges, strict=True):
            assert isinstance(branch, Encoder)
            _check_ranges(found, branch.spec.depth, len(interactions))
        self.branches = nn.ModuleList(branches)
        self.interactions = nn.ModuleList(interactions)
        self.ranges = tuple(tuple(found) for found in ranges)
        self.gradient_checkpointing = checkpointing  # as transformers looks for it

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def forward(self, views: Sequence[Tensor], after: Sequence[int] = ()) -> list[list[TokenMap]]:
        """views: one (B, 3, h, w) per branch -> the states of all branches after each interaction in `after`,
        in rising order, and last of all the final states.
        """
        encoders = self.encoders
        states = [encoder.stem(view) for encoder, view in zip(encoders, views, strict=True)]
        kept: list[list[TokenMap]] = []
        for i, interaction in enumerate(self.interactions):
            states = [
                encoder.run(state, *found[i])
                for encoder, state, found in zip(encoders, states, self.ranges, strict=True)
            ]
            states = self._interact(interaction, states)
            if i in after:
                kept.append(states)
        rest = [found[-1][1] + 1 if found else 0 for found in self.ranges]
        final = [
            encoder.run(state, first, encoder.spec.depth - 1)
            for encoder, state, first in zip(encoders, states, rest, strict=True)
        ]
        return [*kept, final]

    def maps(self, states: Sequence[TokenMap]) -> list[Tensor]:
        """States of all branches -> one (B, C, h, w) each."""
        return [encoder.to_map(state) for encoder, state in zip(self.encoders, states, strict=True)]

    def _interact(self, interaction: nn.Module, states: list[TokenMap]) -> list[TokenMap]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast("list[TokenMap]", checkpoint(interaction, states, use_reentrant=False))
        return cast("list[TokenMap]", interaction(states))


def build_interactions(
    specs: Sequence[EncoderSpec],
    ranges: Sequence[Sequence[LayerRange]],
    *,
    directions: str = "adjacent",
    **message: Any,
) -> list[Interaction]:
    """One interaction per range, in the widths that the branches have where it ends.

    directions: a name in `DIRECTIONS`; the other arguments are those of `Injector` and `Message`.
    """
    if directions not in DIRECTIONS:
        raise ValueError(f"unknown directions {directions!r}; choose from {sorted(DIRECTIONS)}")
    for spec, found in zip(specs, ranges, strict=True):
        _check_ranges(found, spec.depth, len(ranges[0]))
    schedule = DIRECTIONS[directions]
    return [
        Interaction(
            [spec.dims[last] for spec, (_, last) in zip(specs, step, strict=True)],
            schedule(len(specs), i),
            **message,
        )
        for i, step in enumerate(zip(*ranges, strict=True))
    ]


class PyramidFeatures(nn.Module):
    """One image -> maps of several strides, for dense tasks.

    ratios: side of every branch's picture relative to the image. merges: one after each interaction in
    `merge_after`, and a last one for the final states (`LastMap` where nothing is to be merged). Map i that
    leaves is merge `sources[i]` (by default merge i, or the only one), resampled by the neck where there is
    one, at stride `strides[i]`.
    """

    def __init__(
        self,
        encoder: PyramidEncoder,
        merges: Sequence[nn.Module],
        neck: nn.Module | None = None,
        *,
        ratios: Sequence[float],
        strides: Sequence[int],
        merge_after: Sequence[int] = (),
        sources: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(merges) != len(merge_after) + 1:
            raise ValueError(
                f"merging after {list(merge_after)} and at the end takes {len(merge_after) + 1} merges"
            )
        check_rising(merge_after, len(encoder.interactions))
        ends = [found[-1][1] + 1 if found else 0 for found in encoder.ranges]
        at_the_end = all(end == branch.spec.depth for end, branch in zip(ends, encoder.encoders, strict=True))
        if at_the_end and len(encoder.interactions) - 1 in merge_after:
            raise ValueError(
                f"merge_after {list(merge_after)} holds the last interaction, behind which no layer runs: "
                "the final merge is already there"
            )
        if sources is None:
            sources = range(len(merge_after) + 1) if merge_after else [0] * len(strides)
        if len(sources) != len(strides):
            raise ValueError(f"strides {list(strides)} need one merge each, got {list(sources)}")
        self.encoder = encoder
        self.merges = nn.ModuleList(merges)
        self.neck = neck
        self.ratios = tuple(ratios)
        self.strides = tuple(strides)
        self.merge_after = tuple(merge_after)
        self.sources = tuple(sources)

    def forward(self, image: Tensor) -> FeatureMaps:
        """(B, 3, H, W) -> stride -> (B, C, H / stride, W / stride), finest first."""
        kept = self.encoder(image_pyramid(image, self.ratios), self.merge_after)
        merged = [merge(self.encoder.maps(states)) for merge, states in zip(self.merges, kept, strict=True)]
        maps = [merged[source] for source in self.sources]
        if self.neck is not None:
            maps = self.neck(maps)
        return dict(zip(self.strides, maps, strict=True))


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


class PiipVision(nn.Module):
    """PIIP-LLaVA's vision: a picture -> its pyramid -> branches -> one sequence of tokens.

    geometry: what the branches see; the input is the largest view, the others are made from it.
    """

    def __init__(self, encoder: PyramidEncoder, projector: TokenMerge, geometry: PyramidGeometry) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.geometry = geometry

    def layout(self, size: Size) -> TokenLayout:
        return self.geometry.layout(size)

    def views(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        return self.geometry.views(image, layout)

    def maps(self, views: Sequence[Tensor]) -> list[Tensor]:
        """views: [(B, 3, H, W)] -> one map (B, C, h, w) per branch."""
        (image,) = views
        (final,) = self.encoder(image_pyramid(image, self.geometry.ratios))
        return self.encoder.maps(final)

    def features(self, views: Sequence[Tensor]) -> FeatureMaps:
        """The maps of all branches by stride in pixels of the largest view; of two alike, the later."""
        strides = [
            round(encoder.spec.stride / ratio)
            for encoder, ratio in zip(self.encoder.encoders, self.geometry.ratios, strict=True)
        ]
        return dict(sorted(zip(strides, self.maps(views), strict=True), key=lambda item: item[0]))

    def forward(self, views: Sequence[Tensor]) -> VisualTokens:
        merged = self.projector(self.maps(views))
        return VisualTokens(merged.tokens, merged.size)


def check_rising(merge_after: Sequence[int], interactions: int) -> None:
    """Raises ValueError unless merge_after holds rising indexes of interactions."""
    if list(merge_after) != sorted(set(merge_after) & set(range(interactions))):
        raise ValueError(
            f"merge_after {list(merge_after)} must rise strictly within the {interactions} interactions, "
            f"0 to {interactions - 1}"
            if interactions
            else f"merge_after {list(merge_after)} needs interactions, and there are none"
        )


def _check_ranges(ranges: Sequence[LayerRange], depth: int, count: int) -> None:
    if len(ranges) != count:
        raise ValueError(f"{count} interactions need as many layer ranges in every branch, got {len(ranges)}")
    expected = 0
    for first, last in ranges:
        if first != expected or not first <= last < depth:
            raise ValueError(f"layer ranges must adjoin and fit into {depth} layers, got {list(ranges)}")
        expected = last + 1
