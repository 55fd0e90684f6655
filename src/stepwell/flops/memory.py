"""What a training step holds at once, told on the meta device, where it takes neither memory nor time.

Every storage that an op makes is counted until nobody holds it any more, in the forward and in the backward
pass. Attention is taken to hold what its fused kernels keep, and not the weights of every pair of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """The most bytes that are live at once while `run`, on the meta device, makes a loss, and while that is
    differentiated; gradients of parameters are among them, the parameters not.
    """
    with _Live() as live, _fused_attention():
        run().backward()
    return int(live.peak)


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._held: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._held.add(tensor.untyped_storage()._cdata)  # was there before, or is counted already
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._held:
            return
        self._held.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, place: int, size: int) -> None:
        self._held.discard(place)
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """In place of torch's, which on the meta device would hold a weight for every pair of tokens. A mode of
    torch would not be there while checkpointed layers run again in the backward pass.
    """
    kept = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


class _Attention(torch.autograd.Function):
    """Keeps what it is given, what it gives, and a number for every query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
