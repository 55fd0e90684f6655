"""Attention of turns apart against one product under its mask, which is what transformers does.

A whole receipt with 32 questions, as `reader_tiny` is trained: 2400 visual tokens and turns of 72 tokens,
four heads of 64, the forward and the backward pass of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import CLOSE, Command, Row, compare
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stepwell.train.collate import turn_mask
from stepwell.train.turn_attention import attend_in_blocks

NAME = "attention of turns apart, training step of a layer"
VISUAL, TURNS, TOKENS, HEADS, WIDTH = 2400, 32, 72, 4, 64


def rows() -> list[Row]:
    return [(f"{NAME}, {dtype}", partial(_step, dtype)) for dtype in CLOSE]


def _step(dtype: str) -> Iterator[str]:
    ours, peer = (_command(whose, dtype) for whose in ("ours", "peer"))
    yield str(compare(f"{NAME}, {dtype}", ours, peer, close=CLOSE[dtype]))


def _command(whose: str, dtype: str) -> Command:
    return ("turns", "build", whose, dtype)


def build(whose: str, dtype: str) -> Callable[[], list[Tensor]]:
    """For a worker: a step, which returns what attention gives and the gradients of what went in."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.cat([torch.zeros(VISUAL), torch.arange(1, TURNS + 1).repeat_interleave(TOKENS)])
    shape = (1, HEADS, len(groups), WIDTH)
    made = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(4)]
    inputs, gradient = [tensor.requires_grad_() for tensor in made[:3]], made[3].transpose(1, 2)
    attend = attend_in_blocks if whose == "ours" else sdpa_attention_forward
    layer = nn.Identity()

    def once() -> list[Tensor]:
        output = attend(layer, *inputs, turn_mask(groups[None]))[0]
        return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]

    return once
