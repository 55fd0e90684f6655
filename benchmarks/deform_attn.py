"""Deformable attention against eager grid_sample, which is what the official code does without its CUDA
op."""

from __future__ import annotations

import torch
from measure import Comparison, compare

from stepwell.ops.choose import prefer
from stepwell.ops.deform_attn import deform_attn

SIZES = (((70, 70), (28, 28)), ((28, 28), (70, 70)), ((98, 98), (70, 70)))


def run() -> list[Comparison]:
    return [row for query, key in SIZES for row in _one(query, key)]


def _one(query: tuple[int, int], key: tuple[int, int]) -> list[Comparison]:
    batch, heads, dim, points = 2, 6, 64, 4
    cells, queries = key[0] * key[1], query[0] * query[1]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, cells, heads, dim, generator=generator)
    x, y = (torch.rand(batch, queries, heads, points, generator=generator) * n - 0.5 for n in key[::-1])
    weights = torch.rand(batch, queries, heads, points, generator=generator).softmax(-1)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, x, y, weights)]

    def inference(path: str) -> None:
        with prefer(path), torch.inference_mode():
            deform_attn(value, key, x, y, weights)

    def step(path: str) -> None:
        with prefer(path):
            deform_attn(leaves[0], key, *leaves[1:]).sum().backward()

    name = f"{query[0]}x{query[1]} queries on {key[0]}x{key[1]}"
    return [
        compare(
            f"deformable attention, inference, {name}",
            lambda: inference("fast"),
            lambda: inference("reference"),
        ),
        compare(
            f"deformable attention, training step, {name}", lambda: step("fast"), lambda: step("reference")
        ),
    ]
