"""Deformable attention against eager grid_sample, which is what the official code does without its CUDA
op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Row, compare
from torch import Tensor

from stepwell.ops.choose import prefer
from stepwell.ops.deform_attn import deform_attn

SIZES = (((70, 70), (28, 28)), ((28, 28), (70, 70)), ((98, 98), (70, 70)))
TARGETS = {"inference": 3.0, "training step": 1.8}


def rows() -> list[Row]:
    return [
        (f"{what}, {query[0]}x{query[1]} queries on {key[0]}x{key[1]}", partial(_row, what, query, key))
        for query, key in SIZES
        for what in TARGETS
    ]


def _row(what: str, query: tuple[int, int], key: tuple[int, int]) -> Iterator[str]:
    arguments = [what, *map(str, query + key)]
    yield str(
        compare(
            f"{what}, {query[0]}x{query[1]} queries on {key[0]}x{key[1]}",
            ("deform_attn", "build", "fast", *arguments),
            ("deform_attn", "build", "reference", *arguments),
            target=TARGETS[what],
        )
    )


def build(path: str, what: str, *sizes: str) -> Callable[[], list[Tensor]]:
    """For a worker: the outputs of one call, or the gradients of one step."""
    query, key = tuple(map(int, sizes[:2])), tuple(map(int, sizes[2:]))
    batch, heads, dim, points = 2, 6, 64, 4
    cells, queries = key[0] * key[1], query[0] * query[1]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, cells, heads, dim, generator=generator)
    x, y = (torch.rand(batch, queries, heads, points, generator=generator) * n - 0.5 for n in key[::-1])
    weights = torch.rand(batch, queries, heads, points, generator=generator).softmax(-1)
    tensors = (value, x, y, weights)

    def inference() -> list[Tensor]:
        with prefer(path), torch.inference_mode():
            return [deform_attn(value, [key], x, y, weights)]

    def step() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with prefer(path):
            deform_attn(leaves[0], [key], *leaves[1:]).sum().backward()
        return [leaf.grad for leaf in leaves]

    return step if what == "training step" else inference
