"""Where the branches of a pyramid read each other for a point of the picture.

PIIP, arXiv 2501.07783, equations 1 and 2 and figure 9. In every interaction a cell of one branch reads a few
points of another branch's map, in each head, by weights that sum to 1 over its points. Letters: B batch, M
heads, P points of a head, d width of a head, (H, W) the grid of the branch that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepwell.fuse.interaction import DeformableCrossAttention, Interaction, Message
from stepwell.look.attention_rows import Attended, SeeAttention
from stepwell.look.encoder_rows import cell_at
from stepwell.look.subject import Point, Subject, holds
from stepwell.ops.choose import prefer
from stepwell.structures import Size, View

__all__ = ["Sampled", "sampled", "to_source"]


class Sampled(NamedTuple):
    """What one branch reads of another in one interaction."""

    interaction: int  # from 0 on, and within it the unit of messages that are sent at the same time
    unit: int
    source: int  # numbers of branches
    target: int
    view: View  # of the source
    cell: tuple[int, int]  # row and column of the target's grid that hold the point
    gate: float  # mean size of the gate that what is read passes; 0 as it starts
    places: Tensor | None  # (M, P, 2): x and y in source pixels; None: every cell is read
    weights: Tensor  # (M, P), a row sums to 1; where every cell is read (M, H, W)


def sampled(subject: Subject, point: Point) -> list[Sampled]:
    """Of all interactions, in their order, and all branches that show the point. Nothing where there are no
    interactions.
    """
    found: list[Sampled] = []
    interactions = [module for module in subject.network.modules() if isinstance(module, Interaction)]
    messages = [
        (number, unit_number, message)
        for number, interaction in enumerate(interactions)
        for unit_number, unit in enumerate(interaction.units)
        for message in unit.messages  # type: ignore[union-attr]
        if isinstance(message, Message) and holds(subject.views[message.target], point)
    ]
    if not messages:
        return found
    hooks = [
        (message, _reader(subject, point, number, unit, message, found)) for number, unit, message in messages
    ]
    with _hooked(hooks):
        subject.look()
    return found


def to_source(x: Tensor, y: Tensor, grid: Size, view: View) -> Tensor:
    """Columns and rows, in cells of a view's grid from the centre of the first -> (..., 2): x and y in source
    pixels.
    """
    left, top, right, bottom = view.box
    across, down = (x + 0.5) / grid[1], (y + 0.5) / grid[0]
    return torch.stack([left + across * (right - left), top + down * (bottom - top)], -1)


Hook = Callable[..., None]


@contextmanager
def _hooked(hooks: list[tuple[Message, Hook]]) -> Iterator[None]:
    handles = [
        message.injector.attn.register_forward_pre_hook(hook, with_kwargs=True) for message, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reader(
    subject: Subject, point: Point, number: int, unit: int, message: Message, found: list[Sampled]
) -> Hook:
    """A hook that notes what the attention of a message reads for the point."""

    def read(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, size, values, grid, box = (*args, None)[:5] if "box" not in kwargs else (*args, kwargs["box"])
        view = subject.views[message.source]
        cell = cell_at(subject.views[message.target], point, size)
        index = cell[0] * size[1] + cell[1]
        places = None
        if isinstance(attention, DeformableCrossAttention):
            x, y, weights = (part[0, index].cpu() for part in attention.places(query, size, grid, box))
            places = to_source(x, y, grid, view)
        else:
            weights = _taken(attention, query[:, index : index + 1], values, grid)
        gate = float(message.injector.gate.detach().abs().mean())
        found.append(Sampled(number, unit, message.source, message.target, view, cell, gate, places, weights))

    return read


def _taken(attention: Any, query: Tensor, values: Tensor, grid: Size) -> Tensor:
    """What one query (1, 1, d) of regular cross-attention takes of every cell: (M, H, W)."""
    calls: list[Attended] = []
    with prefer("auto"), SeeAttention(calls.append):
        attention.forward(query, (1, 1), values, grid)
    cells: Tensor = calls[0].rows([0])[0, :, 0].unflatten(1, grid)
    return cells.cpu()
