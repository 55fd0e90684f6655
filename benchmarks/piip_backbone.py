"""PIIP as a detection backbone against a straightforward peer with the same weights: time, rate and memory.

PIIP-TSB at 1120/896/448 with its feature pyramid: 750 GFLOP of matrix products and convolutions, 2 per
multiply-accumulate, batch 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from measure import compare, matmul_rate, own_peak_gib, peak_gib
from peer_piip import PeerPiip
from torch import nn

GFLOP = 750
DIMS, HEADS, SIDES = (768, 384, 192), (12, 6, 3), (448, 896, 1120)
NAME = "piip_tsb_1120_896_448_det"


def ours(peer: PeerPiip | None = None) -> nn.Module:
    """The published configuration, with the peer's weights taken over through the key tables."""
    from stepwell.keys.engine import convert
    from stepwell.models.published import build_published
    from stepwell.weights.convert import rules_of

    model = build_published(NAME).eval()
    if peer is not None:
        model.load_state_dict(convert(peer.state_dict(), rules_of(NAME)))
    return model


def run() -> list[str]:
    peer = PeerPiip(DIMS, HEADS, SIDES).eval()
    model = ours(peer)
    image = torch.randn(1, 3, 1120, 1120)
    rows = []
    with torch.inference_mode():
        pairs = zip(maps(model, image), peer(image), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        rows.append(f"| largest difference of the maps, relative | {worst:.1e} | | |")
        for dtype in (torch.float32, torch.bfloat16):
            rate = matmul_rate(dtype)
            a, b, x = model.to(dtype), peer.to(dtype), image.to(dtype)
            name = f"PIIP-TSB, inference, {dtype}"
            row = compare(name, partial(maps, a, x), partial(b, x), rounds=3)
            share = GFLOP * 1e9 / row.ours / rate
            rows += [
                f"{row}",
                f"| share of the matrix rate, {rate / 1e9:.0f} GFLOP/s | {share:.2f} | | |",
            ]
    model.float().train(), peer.float().train()
    row = compare("PIIP-TSB, training step, fp32", step(model, image), step(peer, image), rounds=1)
    rows.append(f"{row}")
    mine, theirs = (peak_gib(__file__, which) for which in ("ours", "peer"))
    rows.append(f"| peak memory, inference, fp32, GiB | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} |")
    return rows


def maps(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    return list(model(image).feature_maps)


def step(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    def run_once() -> None:
        out = model(image)
        sum(m.square().mean() for m in (out if isinstance(out, list) else out.feature_maps)).backward()
        model.zero_grad(set_to_none=True)

    return run_once


if __name__ == "__main__":
    with torch.inference_mode():
        network = ours() if sys.argv[1] == "ours" else PeerPiip(DIMS, HEADS, SIDES).eval()
        network(torch.randn(1, 3, 1120, 1120))
    print(own_peak_gib())
