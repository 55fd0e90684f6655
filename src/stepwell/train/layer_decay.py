"""Slower learning for layers that were pretrained, the slower the nearer they are to the image.

BEiT, arXiv 2106.08254, appendix; for the branches of a pyramid as PIIP's code sets it (arXiv 2501.07783).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from stepwell.data.fields import Rate, Strict

__all__ = ["LayerDecay"]

_BRANCH = re.compile(r"(?:^|\.)branches\.(\d+)\.(.+)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = ("patch_embed.", "position", "class_token", "registers")


class LayerDecay(Strict):
    """rate: of a layer to that behind it. layers: of branch 1, the one that is said first. strides: of every
    other branch, how many of those layers one of its own counts as.

    With L layers, an embedding is layer 0, block l of branch 1 layer l + 1, that of branch j
    (l + 1) * strides[j - 2]; layer i learns at rate^(L + 1 - i). Everything else, ConvNeXts among it, learns
    at the full rate.
    """

    rate: Annotated[float, Field(gt=0, le=1)]
    layers: Annotated[int, Field(gt=0)]
    strides: tuple[Rate, ...] = ()

    def factor(self, name: str) -> float:
        """By what a parameter's learning rate is multiplied. Raises ValueError for a branch without a
        stride.
        """
        layer = self._layer(name)
        return 1.0 if layer is None else self.rate ** (self.layers + 1 - layer)

    def _layer(self, name: str) -> float | None:
        found = _BRANCH.search(name)
        if found is None:
            return None
        branch, rest = int(found[1]), found[2]
        if branch > len(self.strides):
            raise ValueError(
                f"layer_decay.strides has {len(self.strides)}, and there is a branch {branch + 1}: give one "
                "for every branch but the first"
            )
        if rest.startswith(_EMBEDDING):
            return 0
        if (block := _BLOCK.match(rest)) is None:
            return None
        return (int(block[1]) + 1) * (1 if branch == 0 else self.strides[branch - 1])

    def refuse_nothing_slowed(self, names: Collection[str]) -> None:
        """Raises ValueError where no parameter is slowed: then the names are others than were thought of."""
        if all(self._layer(name) is None for name in names):
            raise ValueError("layer_decay slows nothing: the model has no branch of transformer blocks")
