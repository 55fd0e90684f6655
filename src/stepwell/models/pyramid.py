"""Encoders side by side on one image at several sizes, in conversation: what all of PIIP's models share.

PIIP, arXiv 2501.07783, section III. Branch 0 is the largest network on the smallest view, the last branch the
smallest network on the largest view; everything is a list, so any number of branches is the same code.
Letters: B batch, C widths, (h, w) the size of a branch's view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepwell.encoders.catalogue import build_encoder, encoder_arguments, encoder_spec
from stepwell.encoders.encoder import Encoder, same_path
from stepwell.fuse.interaction import Interaction, InteractionConfig
from stepwell.models.runs import layer_runs
from stepwell.models.vision import STRICT
from stepwell.structures import EncoderSpec, TokenMap

__all__ = [
    "BranchConfig",
    "Branches",
    "LayerRange",
    "PyramidEncoder",
    "build_interactions",
    "build_pyramid",
    "pyramid_branches",
]

LayerRange = tuple[int, int]
"""(first, last) layer of an encoder, both included."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BranchConfig:
    """One encoder of a pyramid. `size`: side of its square view, or the long side where aspect is kept."""

    encoder: str  # a name in encoders/catalogue.py
    size: Annotated[int, Field(gt=0)]
    interactions: tuple[LayerRange, ...] = ()  # layers run before each interaction
    arguments: dict[str, Any] = field(default_factory=dict)  # of the encoder, where the catalogue's differ

    def __post_init__(self) -> None:
        depth, expected = self.spec.depth, 0
        for first, last in self.interactions:
            if first != expected or not first <= last < depth:
                raise ValueError(
                    f"interactions must adjoin from 0 on and fit into {depth} layers, got {self.interactions}"
                )
            expected = last + 1

    @property
    def spec(self) -> EncoderSpec:
        """Of the encoder."""
        return encoder_spec(self.encoder, self.arguments)

    @property
    def has_class_token(self) -> bool:
        return bool(encoder_arguments(self.encoder, self.arguments).get("class_token"))


def _equal_in_number(branches: tuple[BranchConfig, ...]) -> tuple[BranchConfig, ...]:
    counts = {len(branch.interactions) for branch in branches}
    if len(counts) > 1:
        raise ValueError(f"every branch needs the same number of interactions, got {sorted(counts)}")
    return branches


Branches = Annotated[tuple[BranchConfig, ...], Field(min_length=1), AfterValidator(_equal_in_number)]
"""Branch 1, the largest network on the smallest view, comes first."""


def pyramid_branches(*networks: tuple[str, int], interactions: int = 12) -> tuple[BranchConfig, ...]:
    """(encoder, size) pairs, the largest network on the smallest view first -> branches that interact so many
    times, each network behind equal runs of its layers, or behind those that were published for it.

    Raises ValueError naming what the catalogue lacks, and where layers do not fall into so many runs.
    """
    return tuple(
        BranchConfig(
            encoder=encoder, size=size, interactions=layer_runs(encoder_spec(encoder).depth, interactions)
        )
        for encoder, size in networks
    )


class PyramidEncoder(nn.Module):
    """Encoders that run side by side and interact after chosen layers.

    branches: Encoders, or a single one that sees every view; ranges: for every view, the layers run before
    each interaction, as in `BranchConfig`; interactions: what happens after each. Layers behind the last
    range run after the last interaction, and all layers where there is none.
    """

    def __init__(
        self,
        branches: Sequence[Encoder],
        interactions: Sequence[nn.Module] = (),
        ranges: Sequence[Sequence[LayerRange]] | None = None,
    ) -> None:
        super().__init__()
        ranges = [()] * len(branches) if ranges is None else ranges
        self.branches = nn.ModuleList(cast("Sequence[nn.Module]", branches))
        self.interactions = nn.ModuleList(interactions)
        self.ranges = tuple(tuple(layers) for layers in ranges)
        self.gradient_checkpointing = False  # of interactions; transformers looks for it here and in encoders

    @property
    def ends(self) -> list[int]:
        """For every branch, the layers it has run when the last interaction takes place."""
        return [layers[-1][1] + 1 if layers else 0 for layers in self.ranges]

    @property
    def encoders(self) -> list[Encoder]:
        """One per view: the same again and again where it is shared."""
        encoders = cast("list[Encoder]", list(self.branches))
        return encoders if len(encoders) > 1 else encoders * len(self.ranges)

    def forward(
        self, views: Sequence[Tensor], after: Sequence[int] = (), cut: Tensor | None = None
    ) -> list[list[TokenMap]]:
        """views: one (B, 3, h, w) per branch -> the states of all branches after each interaction in `after`,
        in rising order, and last of all the final states. cut (B, 4): where the last view lies in the others,
        a box in fractions of these; None: all show the same.
        """
        encoders = self.encoders
        states = [encoder.stem(view) for encoder, view in zip(encoders, views, strict=True)]
        returned: list[list[TokenMap]] = []
        for i, interaction in enumerate(self.interactions):
            states = [
                encoder.run(state, *layers[i])
                for encoder, state, layers in zip(encoders, states, self.ranges, strict=True)
            ]
            states = self._interact(interaction, states, cut)
            if i in after:
                returned.append(states)
        final = [
            encoder.run(state, first, encoder.spec.depth - 1)
            for encoder, state, first in zip(encoders, states, self.ends, strict=True)
        ]
        return [*returned, final]

    def maps(self, states: Sequence[TokenMap]) -> list[Tensor]:
        """States of all branches -> one (B, C, h, w) each."""
        return [encoder.to_map(state) for encoder, state in zip(self.encoders, states, strict=True)]

    def _interact(self, interaction: nn.Module, states: list[TokenMap], cut: Tensor | None) -> list[TokenMap]:
        given = (states,) if cut is None else (states, cut)  # modules of others may know of no cut
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(
                "list[TokenMap]", checkpoint(interaction, *given, use_reentrant=False, context_fn=same_path)
            )
        return cast("list[TokenMap]", interaction(*given))


def build_pyramid(
    branches: Sequence[BranchConfig], interaction: InteractionConfig, *, shared: bool = False
) -> PyramidEncoder:
    """Branches with interactions between them, random weights.

    shared: all are one network, of which the first tells the arguments, and its weights are there once.
    """
    networks = branches[:1] if shared else branches
    encoders = [build_encoder(branch.encoder, **branch.arguments) for branch in networks]
    ranges = [branch.interactions for branch in branches]
    interactions = build_interactions([branch.spec for branch in branches], ranges, interaction)
    return PyramidEncoder(encoders, interactions, ranges)


def build_interactions(
    specs: Sequence[EncoderSpec], ranges: Sequence[Sequence[LayerRange]], config: InteractionConfig
) -> list[Interaction]:
    """One interaction per range, in the widths that the branches have where it ends."""
    return [
        Interaction([spec.dims[last] for spec, (_, last) in zip(specs, step, strict=True)], config, index=i)
        for i, step in enumerate(zip(*ranges, strict=True))
    ]
