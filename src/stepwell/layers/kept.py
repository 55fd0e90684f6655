"""What depends on parameters alone, and between two trainings is always the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Kept", "can_keep"]

T = TypeVar("T")


def can_keep(parameters: Sequence[Tensor]) -> bool:
    """Whether they are parameters on a CPU (and no stand-ins without numbers) and no gradient is recorded.

    On other devices it is cheap to compute and dear to ask whether numbers have changed.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and all(
        type(parameter) is nn.Parameter and parameter.device.type == "cpu" for parameter in parameters
    )


class Kept(Generic[T]):
    """The last value that was made of some parameters, given again as long as they hold the same numbers.

    A change is told by their storage and torch's count of writes, and, as writes through `.data` are not
    counted, by the sum of every row. Copies and pickles of a network leave the value behind.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Tensor], T] | None = None

    def __call__(self, make: Callable[[], T], parameters: Sequence[Tensor], *, of: Hashable) -> T:
        """make(), or what it gave before for the same parameters and `of`: what else it is made of."""
        writes = tuple((p.data_ptr(), p.shape, p.dtype, _count(p)) for p in parameters)
        sums = [_row_sums(parameter) for parameter in parameters]
        kept = self._kept
        if kept is None or kept[0] != (of, writes) or not all(map(torch.equal, kept[1], sums)):
            self._kept = kept = None  # or both would be held for a while
            self._kept = kept = ((of, writes), sums, make())
        return kept[2]

    def forget(self) -> None:
        self._kept = None

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()


def _count(parameter: Tensor) -> int:
    """How often torch has written to it; tensors that were made in inference mode are not counted."""
    return 0 if parameter.is_inference() else parameter._version


def _row_sums(parameter: Tensor) -> Tensor:
    """Of the bits, so that no change is rounded away: (rows,)."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().view(whole).sum(-1, dtype=whole)
