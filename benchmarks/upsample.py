"""The inverse pyramid of LLaVA-UHD v2 against one built on F.unfold, with the same weights.

An adaptive convolution of 7x7 for 96x96 pixels; and the 4x stack, from a map of 24x24 cells of a 336x336
image. 1024 channels, batch 1, fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Row, Worker, compare
from peer_upsample import PeerPyramid, unfold_conv
from torch import Tensor, nn

from stepwell.fuse.upsample import UpsamplerConfig, build_upsampler
from stepwell.ops.adaptive_conv import adaptive_conv

DIM, SIDE, KERNEL, CELLS, IMAGE = 1024, 96, 7, 24, 336
CONV = f"adaptive convolution, {SIDE}x{SIDE}x{DIM}, {KERNEL}x{KERNEL}"
STACK = f"4x stack, {CELLS}x{CELLS}x{DIM}"


def rows() -> list[Row]:
    return [
        (f"{CONV}, inference", partial(_conv, "inference", "einsum", 20.0)),
        (f"{CONV}, inference, other: product and sum", partial(_conv, "inference", "sum", None)),
        (f"{CONV}, training step", partial(_conv, "training step", "einsum", None)),
        (f"{CONV}, memory", _memory),
        (f"{STACK}, inference", partial(_stack, "inference", 10.0)),
        (f"{STACK}, training step, stack frozen", partial(_stack, "training step, stack frozen", None)),
        (f"{STACK}, training step", partial(_stack, "training step", None)),
    ]


def _conv(what: str, by: str, target: float | None) -> Iterator[str]:
    name = f"{CONV}, {what}" + (", other: product and sum" if by == "sum" else "")
    commands = (("upsample", "build_conv", which, what) for which in ("ours", by))
    yield str(compare(name, *commands, target=target, rounds=3))


def _memory() -> Iterator[str]:
    """The peak of one inference over what the process held before, less the output."""
    output = 4 * DIM * SIDE**2 / 2**30
    for which, name in (("ours", "ours"), ("einsum", "other")):
        with Worker(("upsample", "build_conv", which, "inference")) as worker:
            extra = worker.ready()[1], worker.go()[1]
        ratio = (extra[1] - extra[0] - output) / output
        verdict = f"3.00, {'met' if ratio < 3 else 'missed'}" if which == "ours" else ""
        yield f"| {CONV}, {name}: extra memory over the output's | {ratio:.2f} | | | {verdict} | | | |"


def _stack(what: str, target: float | None) -> Iterator[str]:
    commands = (("upsample", "build_stack", which, what) for which in ("ours", "peer"))
    yield str(compare(f"{STACK}, {what}", *commands, target=target, rounds=3))


def build_conv(which: str, what: str) -> Callable[[], list[Tensor]]:
    """For a worker: the output of one call, or the gradients of one step."""
    generator = torch.Generator().manual_seed(0)
    padded = SIDE + KERNEL - 1
    x = torch.randn(1, DIM, padded, padded, generator=generator)
    kernels = torch.rand(1, KERNEL**2, SIDE, SIDE, generator=generator).softmax(1)
    run = adaptive_conv if which == "ours" else partial(unfold_conv, by=which)
    return (
        partial(_step, run, (x, kernels)) if what == "training step" else partial(_infer, run, (x, kernels))
    )


def build_stack(which: str, what: str) -> Callable[[], list[Tensor]]:
    """For a worker: the last map, or the gradients of one step: of the map that comes in, where the stack is
    frozen, and of the weights too."""
    torch.manual_seed(0)
    x, image = torch.randn(1, DIM, CELLS, CELLS), torch.randn(1, 3, IMAGE, IMAGE)
    peer = PeerPyramid(DIM, 2)
    model: nn.Module = peer
    if which == "ours":
        model = build_upsampler(UpsamplerConfig(), DIM, 2)
        model.load_state_dict(peer.state_dict())
    model.eval().requires_grad_(what == "training step")  # in eval mode, or dropout would differ
    if what == "inference":
        return partial(_infer, model, (x, image))
    return partial(_step, lambda x: model(x, image), (x,), tuple(model.parameters()))


def _infer(run: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.inference_mode():
        return [run(*tensors)]


def _step(
    run: Callable[..., Tensor], tensors: tuple[Tensor, ...], weights: tuple[Tensor, ...] = ()
) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = run(*leaves)
    sources = [*leaves, *(weight for weight in weights if weight.requires_grad)]
    grad = torch.linspace(-1, 1, out.numel()).view_as(out)
    return list(torch.autograd.grad(out, sources, grad))
