"""The names of LLaVA-UHD's official code (arXiv 2412.13871), both of its versions -> ours.

Theirs name levels by their factor (1x, 2x, 4x, 8x) and make a projection for each, also for those that a
model does not read; ours are lists of the levels that it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepwell.keys.engine import Drop, Join, Prefix, Rename, Rule

__all__ = [
    "DOWNSAMPLER",
    "STAGE",
    "multiview_rules",
    "pyramid_rules",
    "resampler_rules",
    "upsampler_checkpoint_rules",
    "vision_rules",
    "window_rules",
]

STAGE: list[Rule] = [
    Rename(r"range_temp", "similarity", lambda scalar: scalar.reshape(1)),
    Rename(r"sigma_spatial", "distance_sigma", lambda scalar: scalar.reshape(1)),
    Rename(r"range_proj\.([03]\.(?:weight|bias))", r"keys.\1"),
    Rename(r"fixup_proj\.([03]\.(?:weight|bias))", r"correction.\1"),
]
"""Of a guided stage."""


def pyramid_rules(num_stages: int) -> list[Rule]:
    """Of a stack of guided stages; three of them correct every map, others the last one."""
    stages = [Prefix(rf"up{i + 1}\.", f"stages.{i}.", STAGE) for i in range(num_stages)]
    names = [f"fixup_proj_{2 ** (i + 1)}x" for i in range(num_stages)] if num_stages == 3 else []
    corrections: list[Rule] = []
    for i, name in enumerate([*names, "fixup_proj"]):
        corrections.append(Rename(rf"{name}\.1\.weight", f"corrections.{i}.linear.weight", _of_a_cell))
        corrections.append(Rename(rf"{name}\.1\.bias", f"corrections.{i}.linear.bias"))
    return [*stages, *corrections]


DOWNSAMPLER: list[Rule] = [
    Rename(r"attention_net\.1\.(weight|bias)", r"linear.\1"),
    Rename(r"w", "scale"),
    Rename(r"b", "shift"),
    Rename(r"kernel_params", "weights"),
]
"""Of either kind."""


def multiview_rules(num_stages: int) -> list[Rule]:
    """Of a checkpoint of stage 0, the up-sampler's training: the stack, and what only its training has."""
    rules: list[Rule] = [Prefix(r"upsampler\.", "upsampler.", pyramid_rules(num_stages))]
    for i in range(num_stages):
        suffix = "" if i == num_stages - 1 else f"_{2 ** (i + 1)}x"
        rules += [
            Prefix(rf"downsampler{suffix}\.", f"downsamplers.{i}.", DOWNSAMPLER),
            Rename(rf"scale_net{suffix}\.net\.(weight|bias)", rf"uncertainty.{i}.conv.\1"),
        ]
    return [*rules, *_NOT_TRAINED]


def upsampler_checkpoint_rules(num_stages: int) -> list[Rule]:
    """Of such a checkpoint, the stack alone, as a model takes it over."""
    return [
        Prefix(r"upsampler\.", "", pyramid_rules(num_stages)),
        Drop(r"downsampler(_\d+x)?\..+", "a down-sampler, of the training alone"),
        Drop(r"scale_net(_\d+x)?\..+", "a head of uncertainty, of the training alone"),
        *_NOT_TRAINED,
    ]


_NOT_TRAINED: list[Rule] = [
    Drop(r"(validation_)?model\..+", "the frozen encoder"),
    Drop(r"linear_(acc|iou)", "a number that the training logged"),
]

_ATTENTION: list[Rule] = [
    Rename(r"pos_embed", "position"),
    Rename(r"attn\.in_proj_(weight|bias)", r"qkv.\1"),
    Rename(r"attn\.out_proj\.(weight|bias)", r"mix.\1"),
    Rename(r"ln_q\.(weight|bias)", r"query_norm.\1"),
    Rename(r"ln_kv\.(weight|bias)", r"norm.\1"),
    Rename(r"ln_post\.(weight|bias)", r"out_norm.\1"),
    Rename(r"proj", "out.weight", lambda matrix: matrix.t()),  # theirs stands at the right
]


def window_rules(levels: Sequence[int], num_query_sets: int = 4) -> list[Rule]:
    """Of the window attention of version 2. levels: those that are read, 0 for the ViT's own map."""
    rules: list[Rule] = []
    for i, level in enumerate(levels):
        rules.append(Rename(rf"features_{2**level}x_projector\.(weight|bias)", rf"projections.{i}.\1"))
    rules += [
        Join(tuple(rf"feature_{2**level}x_embedding" for level in levels), "level_codes", _stacked),
        Drop(r"features?_[1248]x_(projector\..+|embedding)", "of a level that this model does not read"),
        Drop(r"query|kv_proj\.weight", "of version 1, unused"),
        Rename(r"ln_proj\.(weight|bias)", r"set_norm.\1"),
        Rename(r"cat_proj\.(weight|bias)", r"join.\1"),
        Join(tuple(f"query_{i + 1}" for i in range(num_query_sets)), "queries", torch.stack),
    ]
    return [*rules, *_ATTENTION]


def resampler_rules() -> list[Rule]:
    """Of the resampler of version 1."""
    return [
        Rename(r"query", "queries", lambda query: query[None]),
        Rename(r"kv_proj\.weight", "projections.0.weight"),
        *_ATTENTION,
    ]


def _stacked(codes: list[Tensor]) -> Tensor:
    """(1, 1, D) each -> (levels, D)."""
    return torch.cat(codes).flatten(1)


def _of_a_cell(weight: Tensor) -> Tensor:
    """A 1x1 convolution's (C, C, 1, 1) -> a linear layer's (C, C)."""
    return weight.flatten(1)


def vision_rules(tower: Sequence[Rule], projector: Sequence[Rule], *, num_stages: int | None) -> list[Rule]:
    """Tower and projector of a whole model, or the projector's own file -> UhdVision.

    tower: the encoder's table; projector: `window_rules` or `resampler_rules`; num_stages: of the stack,
    None where there is none.
    """
    stack: list[Rule] = [
        Drop(r"upsampler\.model\..+", "a second encoder and its norm, unused"),
        *([] if num_stages is None else [Prefix(r"upsampler\.upsampler\.", "", pyramid_rules(num_stages))]),
    ]
    return [
        Prefix(r"(?:model\.)?vision_tower\.vision_tower\.", "branches.0.", tower),
        Prefix(r"(?:model\.)?mm_projector\.", "upsampler.", stack),
        Prefix(r"(?:model\.)?mm_projector\.", "projector.", projector),
    ]
