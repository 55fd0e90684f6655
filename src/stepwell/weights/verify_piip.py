"""Golden files of PIIP: how each kind is built from its settings and run.

Settings list branch 1 first (widest network, smallest image); grids are [rows, columns].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepwell.fuse.interaction import DeformableCrossAttention, Injector, InteractionUnit
from stepwell.fuse.merge import TokenMerge
from stepwell.keys.piip import ATTENTION, INJECTOR, UNIT, token_merge_rules
from stepwell.structures import Size, TokenMap
from stepwell.weights.record import Case, Record

__all__ = ["CASES"]


def _size(grid: list[int]) -> Size:
    rows, cols = grid
    return rows, cols


def _injector_arguments(interaction: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Injector` for the settings' `interaction`."""
    deformable = interaction["attn_type"] == "deform"
    points = (
        {"num_points": interaction["n_points"], "ratio": interaction["deform_ratio"]} if deformable else {}
    )
    return {
        "attention": "deformable" if deformable else "regular",
        "num_heads": interaction["num_heads"],
        "ffn_ratio": interaction["cffn_ratio"] if interaction["with_cffn"] else None,
        "norm": interaction["norm"] != "none",
        "norm_eps": interaction["norm_eps"] or 1e-6,
        **points,
    }


def _message_arguments(interaction: dict[str, Any]) -> dict[str, Any]:
    return {"project": interaction["with_proj"], **_injector_arguments(interaction)}


def _deform_attention(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = DeformableCrossAttention(
        s["d_model"], s["d_feat"], num_heads=s["n_heads"], num_points=s["n_points"], ratio=s["ratio"]
    )
    record.load_into(module, ATTENTION)
    y = module(record.inputs["query"], _size(s["query_grid"]), record.inputs["feat"], _size(s["feat_grid"]))
    return {"y": y}


def _injector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = Injector(s["dim"], s["dim_feat"], **_injector_arguments(s["interaction"]))
    record.load_into(module, INJECTOR)
    y = module(record.inputs["query"], _size(s["query_grid"]), record.inputs["feat"], _size(s["feat_grid"]))
    return {"y": y}


def _states(record: Record) -> list[TokenMap]:
    """Inputs x1, x2, ... and their class tokens cls1, cls2, ... where there are any."""
    return [
        TokenMap(record.inputs[f"x{k}"], _size(grid), record.inputs.get(f"cls{k}"))
        for k, grid in enumerate(record.settings["grids"], start=1)
    ]


def _named(states: list[TokenMap]) -> dict[str, Tensor]:
    named = {f"x{k}": state.tokens for k, state in enumerate(states, start=1)}
    class_tokens = {f"cls{k}": state.class_token for k, state in enumerate(states, start=1)}
    return named | {name: token for name, token in class_tokens.items() if token is not None}


def _interaction_unit(record: Record) -> dict[str, Tensor]:
    s = record.settings
    unit = InteractionUnit(s["dims"], [(1, 0), (0, 1)], **_message_arguments(s["interaction"]))
    return _named(record.load_into(unit, UNIT)(_states(record)))


def _llava_projector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = _token_merge(s)
    record.load_into(module, token_merge_rules(s["norm"]))
    return {"tokens": module([record.inputs[f"x{k}"] for k in range(1, len(s["in_dims"]) + 1)]).tokens}


def _token_merge(s: dict[str, Any]) -> TokenMerge:
    return TokenMerge(
        s["in_dims"],
        s["hidden_size"],
        norm=s["norm"],
        num_groups=s["norm_groups"] or 1,
        norm_eps=s["norm_eps"],
        grid=_size(s["out_grid"]) if s["out_grid"] else None,
    )


CASES: dict[str, Case] = {
    "piip.deform_attention": _deform_attention,
    "piip.injector": _injector,
    "piip.interaction_unit": _interaction_unit,
    "piip.llava_projector": _llava_projector,
}
