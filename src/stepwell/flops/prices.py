"""The planner's prices: what every part of a pyramid costs a cell.

Counting a built model is the truth (flops/count.py), but a plan compares thousands of pyramids. Every part of
those (PIIP, arXiv 2501.07783, with interactions as released) costs a sum of a few quantities of one view: its
cells at a stride, the cells that windows add to them, the products of attention, and 1. So a few counts at
small sizes tell the part's cost at every size. prices.json holds them, in multiply-accumulates. After a
change to a network or to the catalogue `python tests/flops/write_prices.py` counts and writes them anew;
tests hold them equal to whole networks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any

from stepwell.encoders.catalogue import encoder_arguments
from stepwell.flops.count import Convention
from stepwell.fuse.interaction import DIRECTIONS
from stepwell.models.pyramid import BranchConfig
from stepwell.models.runs import STAGE_MERGES
from stepwell.structures import EncoderSpec, Size

__all__ = ["branch_macs", "branch_prices", "parameters", "prices", "quantities"]


@cache
def prices() -> Any:
    """What prices.json holds: "encoders" of the catalogue by name, and "widths": what is read, merged and
    classified at each, "key" and merges by the width of the other branch.
    """
    return json.loads((resources.files("stepwell.flops") / "prices.json").read_text(encoding="utf-8"))


def parameters(encoder: str) -> int:
    """Of an encoder as the catalogue has it."""
    return int(prices()["encoders"][encoder]["parameters"])


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
    specs = [branch.spec for branch in branches]
    totals = [Counter(prices()["encoders"][branch.encoder]["prices"]) for branch in branches]
    runs = list(zip(*([last for _, last in branch.interactions] for branch in branches), strict=True))
    final = tuple(spec.depth - 1 for spec in specs)

    def charge(j: int, layer: int, price: int) -> None:
        totals[j][str(specs[j].strides[layer])] += price

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
        totals[-1]["view"] += _price(specs[0].dim, "head", "view")
    return totals


def branch_macs(branch: BranchConfig, price_of: Mapping[str, int], view: Size) -> int:
    """Multiply-accumulates of a branch on a view of (height, width) pixels, at its own of `branch_prices`."""
    padding = encoder_arguments(branch.encoder, branch.arguments).get("window_padding", "tokens")
    amounts = quantities(branch.spec, view, padded=padding == "tokens")
    return sum(price * amounts[name] for name, price in price_of.items())


def _price(dim: int, *names: str | int) -> int:
    price = prices()["widths"].get(str(dim))
    for name in names:
        price = price and price.get(str(name))
    if price is None:
        widths = " and ".join(str(width) for width in (dim, *names) if isinstance(width, int))
        raise ValueError(f"branches of width {widths} cannot interact or merge as in the released models")
    return int(price)
