"""Counts the planner's prices on built parts and writes them: python tests/flops/write_prices.py.

What the prices are is told in src/stepwell/flops/prices.py, which reads them from the prices.json beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import count_macs, count_params
from stepwell.flops.outlines import outlines
from stepwell.flops.prices import quantities
from stepwell.fuse.interaction import InteractionConfig, Message
from stepwell.fuse.merge import LastMap, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import MergedHead
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.structures import TokenMap

FILE = Path(__file__).parents[2] / "src/stepwell/flops/prices.json"
INTERACTION = InteractionConfig()
STACKS = {"linear": linear_stacks, "dense": dense_stacks, "stages": stage_stacks}
CLASSES = 1000


def count_prices(encoders: Iterable[str], widths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Of encoders of the catalogue; and of what is read, merged and classified at each of the widths."""
    return {
        "encoders": {name: _count_encoder(name) for name in encoders},
        "widths": {str(dim): _count_width(dim, widths) for dim in widths},
    }


def _count_encoder(name: str) -> dict[str, Any]:
    has_attention = ENCODERS[name].build is VisionTransformer
    windows = (1, 2) if has_attention and not ENCODERS[name].arguments.get("class_token") else (None,)
    side, strides = encoder_spec(name).stride, sorted(set(encoder_spec(name).strides))
    names = [*map(str, strides), *(("padding", "attention", "view") if has_attention else ())]
    samples = []
    for window in windows:
        with outlines():
            encoder = build_encoder(name, **({"windows": window} if window else {})).eval()
        for size in [(side, side), *((side + stride, side) for stride in strides), (2 * side, 2 * side)]:
            amounts = quantities(encoder.spec, size)
            macs = count_macs(encoder, partial(encoder, torch.empty(1, 3, *size, device="meta")), "D")
            samples.append(([amounts[name] for name in names], macs.total()))
    with outlines():
        params = count_params(build_encoder(name)).total()
    return {"parameters": params, "prices": dict(zip(names, _solve(samples), strict=True))}


def _count_width(dim: int, widths: Sequence[int]) -> dict[str, Any]:
    """All that is read or merged at a width: `key` and the merges by the width of the other branch."""
    messages = {str(other): _count_message(dim, other) for other in widths}
    query, sampling, _ = messages[str(dim)]
    prices: dict[str, Any] = {"query": query, "sampling": sampling}
    prices["key"] = {other: key for other, (_, _, key) in messages.items()}
    for kind, build in STACKS.items():
        with outlines():
            first, *others = build([dim, *widths])
        prices[kind] = {"first": _count_stack(first, dim)}
        prices[kind] |= {
            str(other): _count_stack(stack, other) for other, stack in zip(widths, others, strict=True)
        }
    return prices | {"head": _count_head(dim)}


def _count_message(dim: int, other: int) -> list[int]:
    """Branch 0, `dim` wide, reads branch 1: the price of one of its cells, of one as a place of sampling, and
    of one that is read.
    """
    arguments = [{"dim": width, "depth": 1, "num_heads": 1} for width in (dim, other)]
    branches = tuple(
        BranchConfig(encoder="vit_t", size=16, interactions=((0, 0),), arguments=a) for a in arguments
    )
    with outlines():
        encoder = build_pyramid(branches, INTERACTION)
    reader = next(path for path, m in encoder.named_modules() if isinstance(m, Message) and m.target == 0)
    samples = []
    for cells in (1, 2):
        views = [torch.empty(1, 3, 16 * n, 16, device="meta") for n in (cells, 1)]
        macs = count_macs(encoder, partial(encoder, views), "D")
        sampling = macs.pop(f"{reader}.injector.attn")
        samples.append(([cells, 1], sum(n for path, n in macs.items() if path.startswith(reader))))
    query, key = _solve(samples)
    return [query, sampling // 2, key]


def _count_stack(stack: nn.Module, dim: int) -> int:
    """A cell, counted on two: one has no statistics."""
    return count_macs(stack, partial(stack, torch.empty(1, dim, 2, 1, device="meta")), "D").total() // 2


def _count_head(dim: int) -> dict[str, int]:
    with outlines():
        head = MergedHead(LastMap(), dim, CLASSES)
    samples = []
    for cells in (1, 2):
        state = TokenMap(torch.empty(1, cells, dim, device="meta"), (cells, 1))
        samples.append(([cells, 1], count_macs(head, partial(head, [state]), "D").total()))
    return dict(zip(("cell", "view"), _solve(samples), strict=True))


def _solve(samples: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """Whole prices at which the amounts of every sample cost what was counted for it."""
    amounts, costs = zip(*samples, strict=True)
    prices = [round(price) for price in np.linalg.lstsq(np.array(amounts, float), np.array(costs, float))[0]]
    assert all(sum(map(mul, row, prices)) == cost for row, cost in samples)
    return prices


def write_prices() -> None:
    """Writes prices.json anew, an encoder of the catalogue or a width of theirs a line."""
    widths = sorted({dim for name in ENCODERS for dim in encoder_spec(name).dims})
    widths = [dim for dim in widths if int(dim * INTERACTION.ratio) % INTERACTION.num_heads == 0]
    sections = (
        f'"{section}": {{\n' + ",\n".join(f'"{key}": {json.dumps(row)}' for key, row in rows.items()) + "\n}"
        for section, rows in count_prices(ENCODERS, widths).items()
    )
    FILE.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_prices()
