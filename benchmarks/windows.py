"""Hierarchical window attention against a straightforward peer with the same weights: time and memory.

The projector of LLaVA-UHD v2 in front of Vicuna-7B, 1024 -> 4096 channels: one view of 24x24 cells on three
levels, 144 queries in four sets, fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from measure import Command, Row, Worker, compare
from peer_windows import PeerWindows
from torch import Tensor, nn

from stepwell.fuse.upsample import Level
from stepwell.fuse.windows import WindowAttention, WindowConfig

NAME = "LLaVA-UHD v2's projector, one view"
DIM, OUT_DIM, SIDE, LEVELS = 1024, 4096, 24, (0, 1, 2)
FASTER, LEANER = 8.0, 3.0  # what is asked of inference


def rows() -> list[Row]:
    return [
        (f"{NAME}, inference", _inference),
        (f"{NAME}, training step", _training),
        (f"{NAME}, memory beside weights and maps", _memory),
    ]


def _command(function: str, whose: str) -> Command:
    return ("windows", function, whose)


def _inference() -> Iterator[str]:
    ours, peer = (_command("build_inference", whose) for whose in ("ours", "peer"))
    yield str(compare(f"{NAME}, inference", ours, peer, target=FASTER))


def _training() -> Iterator[str]:
    ours, peer = (_command("build_training", whose) for whose in ("ours", "peer"))
    yield str(compare(f"{NAME}, training step", ours, peer, rounds=3))


def _memory() -> Iterator[str]:
    own = []
    for whose in ("ours", "peer"):
        with Worker(_command("build_inference", whose)) as worker:
            _, built = worker.ready()
            own.append(max(worker.go()[1] for _ in range(2)) - built)
    ratio = own[1] / own[0]
    target = f"{LEANER:.2f}x, {'met' if ratio >= LEANER else 'missed'}"
    what = f"{NAME}, inference: memory beside weights and maps"
    yield f"| {what} | | | {ratio:.2f}x | {target} | | {own[0]:.2f} and {own[1]:.2f} | |"


def build_inference(whose: str) -> Callable[[], list[Tensor]]:
    """For a worker: the visual tokens of one view."""
    run, _ = build(whose)
    maps = levels()

    def once() -> list[Tensor]:
        with torch.inference_mode():
            return [run(maps)]

    return once


def build_training(whose: str) -> Callable[[], list[Tensor]]:
    """For a worker: a step, which is forward, and backward from a gradient that a language model would hand
    it, to all parameters and to the maps. It returns the maps' gradients."""
    run, network = build(whose)
    maps = [level.requires_grad_() for level in levels()]
    grad = torch.randn(1, 144, OUT_DIM, generator=torch.Generator().manual_seed(2))

    def once() -> list[Tensor]:
        for tensor in (*network.parameters(), *maps):
            tensor.grad = None
        run(maps).backward(grad)
        return [level.grad for level in maps if level.grad is not None]

    return once


def levels() -> list[Tensor]:
    """The same noise in every process, in the memory order that a ViT and our stages leave."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, DIM, SIDE << level, SIDE << level, generator=generator) for level in LEVELS]
    return [map.contiguous(memory_format=torch.channels_last) for map in maps]


def build(whose: str) -> tuple[Callable[[list[Tensor]], Tensor], nn.Module]:
    """What turns maps into tokens, and the network that it belongs to: the peer's parameters are ours."""
    torch.manual_seed(0)
    with torch.device("meta"):  # to start from without a copy: what building takes is not to be measured
        ours = WindowAttention([DIM] * len(LEVELS), OUT_DIM, WindowConfig(), levels=LEVELS).eval()
    for parameter in ours.to_empty(device="cpu").parameters():
        nn.init.normal_(parameter, std=0.02)
    for norm in (ours.query_norm, ours.norm, ours.set_norm, ours.out_norm):
        nn.init.ones_(norm.get_parameter("weight"))
    if whose == "peer":
        peer = PeerWindows(ours).eval()
        return peer, peer
    return lambda maps: ours([[Level(map) for map in maps]]), ours
