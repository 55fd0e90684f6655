"""Outlines against the tensors that torch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from stepwell.flops.outlines import Outlines, outlines

X, ROW, INTEGERS = torch.rand(2, 4, 6, 8), torch.rand(8), torch.arange(8)
GRID = torch.rand(2, 3, 5, 2)

CALLS = {
    "broadcast": lambda x, row, n, grid: (
        row + x,
        x * n,
        n / 2,
        n * 2,
        2.0**n,
        n.clamp(None, 3),
        1 - n,
        n - row,
    ),
    "in place": lambda x, row, n, grid: (
        x.clone().add_(row),
        x.clone().zero_(),
        x.clone().copy_(row),
        x.clone().addcmul_(x, row),
    ),
    "functions": lambda x, row, n, grid: (
        x.cos().abs().floor(),
        (-x).exp(),
        x.rsqrt().nan_to_num(),
        F.gelu(x),
        x.relu(),
    ),
    "softmax": lambda x, row, n, grid: x.softmax(1),
    "reduced": lambda x, row, n, grid: (
        x.amax(-1, keepdim=True),
        x.mean((1, 2)),
        x.sum(0),
        x.sum((2, 3), True),
    ),
    "joined": lambda x, row, n, grid: (
        torch.cat([x, x[:, :1]], 1),
        torch.stack([x, x], -1),
        torch.stack([x, x]),
    ),
    "linear": lambda x, row, n, grid: F.linear(x, x[0, 0], x[0, 0, :, 0]),
    "norms": lambda x, row, n, grid: (F.layer_norm(x, (8,), row, row), F.group_norm(x, 2)),
    "resized": lambda x, row, n, grid: (
        F.interpolate(x, (5, 7), mode="bilinear"),
        F.interpolate(x, scale_factor=0.6, mode="bicubic"),
    ),
    "sampled": lambda x, row, n, grid: F.grid_sample(x, grid, align_corners=False),
    "convolved": lambda x, row, n, grid: (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2)(x),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1), groups=2)(x),
    ),
    "pooled": lambda x, row, n, grid: (
        F.max_pool2d(x, (2, 3), (2, 1)),
        F.max_pool2d(x, (2, 3), (2, 1), (1, 0)),
        F.adaptive_avg_pool2d(x, (5, 3)),
    ),
    "padded": lambda x, row, n, grid: F.pad(x, (1, 2, 3, 4), mode="reflect"),
    "repeated": lambda x, row, n, grid: (row.repeat(4), row.repeat(2, 3), x.repeat(1, 2, 1, 3)),
    "products": lambda x, row, n, grid: (x @ x.transpose(2, 3), x[0] @ x[1].mT, x[0, 0] @ x[0, 1].T),
    "bags": lambda x, row, n, grid: F.embedding_bag(n % 4, x[0, :, 0], n[:3], mode="sum"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_outline_has_the_shape_and_dtype_of_the_tensor(call):
    tensors = (X, ROW, INTEGERS, GRID)
    with outlines():
        drawn = call(*(tensor.to("meta") for tensor in tensors))
    computed = call(*tensors)
    assert tree_map(lambda t: (t.shape, t.dtype), drawn) == tree_map(lambda t: (t.shape, t.dtype), computed)


def test_tensors_with_memory_are_computed():
    with Outlines():
        summed, joined, stacked = X + ROW, torch.cat([X, X]), torch.stack([X, X])
    assert torch.equal(summed, X + ROW)
    assert torch.equal(joined, torch.cat([X, X]))
    assert torch.equal(stacked, torch.stack([X, X]))
