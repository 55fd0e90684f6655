"""The planner's prices: what each part of a pyramid costs a cell, counted on built parts.

Counting a built model is the truth (flops/count.py), but a plan compares thousands of pyramids. Every part of
those (PIIP, arXiv 2501.07783, with interactions as released) costs a sum of a few quantities of one view: its
cells at a stride, the cells that windows add to them, the products of attention, and 1. So a few counts at
small sizes tell the part's cost at every size. prices.json holds them, in multiply-accumulates. After a
change to a network or to the catalogue `python -m stepwell.flops.prices` counts and writes them anew; tests
hold them equal to whole networks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import chain
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import Convention, count_macs, count_params
from stepwell.flops.outlines import outlines
from stepwell.fuse.interaction import DIRECTIONS, InteractionConfig, Message
from stepwell.fuse.merge import LastMap, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import MergedHead
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.models.runs import STAGE_MERGES
from stepwell.structures import EncoderSpec, Size, TokenMap

__all__ = ["branch_prices", "count_prices", "parameters", "quantities", "write_prices"]

FILE = Path(__file__).with_suffix(".json")


@cache
def _table() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def parameters(encoder: str) -> int:
    """Of an encoder as the catalogue has it."""
    return int(_table()["encoders"][encoder]["parameters"])


def quantities(spec: EncoderSpec, size: Size, *, padded: bool = True) -> dict[str, int]:
    """What the cost of a branch is a sum of; all its layers have the same windows, or none.

    size: of its view in pixels. padded: windows are filled before the qkv layer (`window_padding` "tokens").
    """
    rows, cols, window = size[0] // spec.stride, size[1] // spec.stride, spec.window
    cells = rows * cols
    added = -(-rows // window) * -(-cols // window) * window**2 - cells if window and padded else 0
    at_strides = {str(stride): (size[0] // stride) * (size[1] // stride) for stride in spec.strides}
    return {**at_strides, "padding": added, "attention": cells * (window**2 or cells), "view": 1}


def branch_prices(branches: Sequence[BranchConfig], convention: Convention) -> list[Counter[str]]:
    """What each branch adds to the cost of a pyramid, by quantity of its view.

    Its layers, its share of the messages between neighbours and of what the convention's counter has behind
    them: A, linear merging and a classifier of 1000; D, merging by stages, which is defined for twelve
    interactions, else the dense one; L, nothing. Raises ValueError where an interaction cannot be built.
    """
    specs = [encoder_spec(branch.encoder, branch.arguments) for branch in branches]
    prices = [Counter(_table()["encoders"][branch.encoder]["prices"]) for branch in branches]
    runs = list(zip(*([last for _, last in branch.interactions] for branch in branches), strict=True))
    final = tuple(spec.depth - 1 for spec in specs)

    def charge(j: int, layer: int, price: int) -> None:
        prices[j][str(specs[j].strides[layer])] += price

    for layers in runs:
        dims = [spec.dims[layer] for spec, layer in zip(specs, layers, strict=True)]
        for source, target in chain.from_iterable(DIRECTIONS["adjacent"](len(branches), 0)):
            charge(target, layers[target], _price(dims[target], "query"))
            sampled = runs[0] if convention == "L" else layers
            charge(target, sampled[target], _price(dims[target], "sampling"))
            charge(source, layers[source], _price(dims[target], "key", dims[source]))
    kind = {"A": "linear", "D": "stages" if len(runs) == 12 else "dense", "L": ""}[convention]
    merged = [*(runs[i] for i in STAGE_MERGES), final] if kind == "stages" else [final]
    for layers in merged if kind else []:
        dims = [spec.dims[layer] for spec, layer in zip(specs, layers, strict=True)]
        for j, layer in enumerate(layers):
            charge(j, layer, _price(dims[0], kind, dims[j] if j else "first"))
    if convention == "A":
        charge(-1, -1, _price(specs[0].dim, "head", "cell"))
        prices[-1]["view"] += _price(specs[0].dim, "head", "view")
    return prices


def _price(dim: int, *names: str | int) -> int:
    price = _table()["widths"].get(str(dim))
    for name in names:
        price = price and price.get(str(name))
    if price is None:
        widths = " and ".join(str(width) for width in (dim, *names) if isinstance(width, int))
        raise ValueError(f"branches of width {widths} cannot interact or merge as in the released models")
    return int(price)


# ---- how they are counted ---------------------------------------------------------------------------------

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
            encoder = build_encoder(name, **({"windows": window} if window else {}))
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
