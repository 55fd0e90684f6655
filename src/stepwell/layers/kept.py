"""What depends on parameters alone, and between two trainings is always the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Kept", "can_keep"]

T = TypeVar("T")

NUMBERS = random.Random(0).sample(range(1, 2**11, 2), 2**10)
"""Odd and no two alike; all of them together, times words of 32 bits, are whole numbers in fp64."""
FEWEST_LANES = 2**16  # half a MB, which stays in a processor's cache


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
    counted, by a fingerprint of every bit. Copies and pickles of a network leave the value behind.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Tensor], T] | None = None

    def __call__(self, make: Callable[[], T], parameters: Sequence[Tensor], *, of: Hashable) -> T:
        """make(), or what it gave before for the same parameters and `of`: what else it is made of."""
        writes = tuple((p.data_ptr(), p.shape, p.dtype, _count(p)) for p in parameters)
        prints = [_fingerprint(parameter) for parameter in parameters]
        kept = self._kept
        if kept is None or kept[0] != (of, writes) or not all(map(torch.equal, kept[1], prints)):
            self._kept = kept = None  # or both would be held for a while
            self._kept = kept = ((of, writes), prints, make())
        return kept[2]

    def forget(self) -> None:
        self._kept = None

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()


def _count(parameter: Tensor) -> int:
    """How often torch has written to it; tensors that were made in inference mode are not counted."""
    return 0 if parameter.is_inference() else parameter._version


def _fingerprint(parameter: Tensor) -> Tensor:
    """(lanes,): of every lane of its bits, in words of 32, the sum of each word times its place's number.

    In fp64 that is exact. One other word, and two that change places or change by as much, change the sum of
    their lane for certain; whatever else happens in a lane, all but once in thousands.
    """
    bits = parameter.detach().flatten()
    per_word = max(1, 4 // bits.element_size())
    if len(bits) % per_word or bits.storage_offset() % per_word:  # as it lies there are no whole words of it
        bits = F.pad(bits, (0, -len(bits) % per_word))
    words = bits.view(torch.int32)
    lanes = max(FEWEST_LANES, math.ceil(len(words) / len(NUMBERS)))
    sums, exact = torch.zeros(2, min(lanes, len(words)), dtype=torch.float64, device=words.device)
    for part, number in zip(words.split(lanes), NUMBERS, strict=False):
        sums[: len(part)].add_(exact[: len(part)].copy_(part), alpha=number)
    return cast(Tensor, sums)
