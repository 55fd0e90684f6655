"""States of a pyramid's branches -> class logits.

PIIP, arXiv 2501.07783, image classification: with pretrained branches every branch keeps its own head and the
logits are averaged; trained from scratch, the maps are merged under one head.
Letters: B batch, N tokens, C width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stepwell.ops.rearrange import map_to_tokens, tokens_to_map
from stepwell.structures import TokenMap

__all__ = ["BranchHeads", "MergedHead", "ReadToken"]

ReadToken = Literal["first_patch", "cls"]
"""What a branch's head reads: the top left patch, as the released models were trained; or the class token, as
the paper says.
"""


class BranchHeads(nn.Module):
    """A norm and a linear layer for every branch, and the mean of their logits."""

    def __init__(self, dims: Sequence[int], num_classes: int, *, read: ReadToken = "first_patch") -> None:
        super().__init__()
        if read not in ("first_patch", "cls"):
            raise ValueError(f"unknown token to read {read!r}; choose 'first_patch' or 'cls'")
        self.read = read
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.classifiers = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)

    def forward(self, states: Sequence[TokenMap]) -> Tensor:
        """One state per branch -> (B, K). Raises ValueError where there is no class token to read."""
        logits = [
            classifier(norm(self._token(state)))
            for classifier, norm, state in zip(self.classifiers, self.norms, states, strict=True)
        ]
        return torch.stack(logits).mean(0)

    def _token(self, state: TokenMap) -> Tensor:
        if self.read == "first_patch":
            return state.tokens[:, 0]
        if state.class_token is None:
            raise ValueError("a branch has no class token to read; build it with one, or read='first_patch'")
        return state.class_token[:, 0]


class MergedHead(nn.Module):
    """One map from all branches, a norm, the mean over its tokens and a linear layer.

    merge: the maps of all branches -> (B, C, H, W).
    """

    def __init__(self, merge: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.merge = merge
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, states: Sequence[TokenMap]) -> Tensor:
        """One state per branch -> (B, K)."""
        merged = self.merge([tokens_to_map(state.tokens, state.size) for state in states])
        logits: Tensor = self.classifier(self.norm(map_to_tokens(merged)).mean(1))
        return logits
