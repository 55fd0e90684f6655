"""The names of LLaVA-HR's official code (arXiv 2403.03003) -> ours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepwell.keys.engine import Prefix, Rename, Rule

__all__ = ["ADAPTER", "vision_rules"]


def _of_a_cell(weight: Tensor) -> Tensor:
    """A 1x1 convolution's (C', C, 1, 1) -> a linear layer's (C', C)."""
    return weight.flatten(1)


ADAPTER: list[Rule] = [
    Rename(r"fast_conv\.(weight|bias)", r"local.0.\1"),
    Rename(r"fast_proj\.weight", "local.2.weight", _of_a_cell),
    Rename(r"fast_proj\.bias", "local.2.bias"),
    Rename(r"slow_conv\.weight", "slow.0.weight", _of_a_cell),
    Rename(r"slow_conv\.bias", "slow.0.bias"),
    Rename(r"slow_proj\.weight", "slow.2.weight", _of_a_cell),
    Rename(r"slow_proj\.bias", "slow.2.bias"),
    Rename(r"gate\.([02])\.(weight|bias)", r"\g<0>"),
]


def vision_rules(fast: Sequence[Rule], slow: Sequence[Rule], num_adapters: int) -> list[Rule]:
    """Tower and projector of a whole model -> LlavaHrVision. fast, slow: the encoders' tables."""
    tower = r"model\.vision_tower\."
    return [
        Prefix(rf"{tower}fast_vision_tower\.vision_tower\.", "branches.0.", fast),
        Prefix(rf"{tower}slow_vision_tower\.vision_tower\.", "branches.1.", slow),
        *(
            Prefix(rf"{tower}align_stages_latent\.{i}\.", f"adapters.{i}.", ADAPTER)
            for i in range(num_adapters)
        ),
        Rename(rf"{tower}align_stages\.0\.(fast|slow)_proj\.(weight|bias)", r"merge.\1.\2"),
        Rename(r"model\.mm_projector\.(\d+\.(?:weight|bias))", r"projector.\1"),
    ]
