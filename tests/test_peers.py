"""Peers of the benchmarks that are not compared where they are timed give what ours give."""

from __future__ import annotations

from pathlib import Path

import torch

from stepwell.heads.dino import DinoConfig
from stepwell.keys.dino import dino_rules
from stepwell.keys.engine import convert
from stepwell.structures import Extent, Objects

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXTENTS = [Extent((60, 75), (64, 96)), Extent((64, 96), (64, 96))]
OBJECTS = [
    Objects(torch.tensor([[3.0, 4, 30, 40], [10, 10, 50, 60]]), torch.tensor([1, 79])),
    Objects(torch.tensor([[0.0, 0, 96, 64]]), torch.tensor([0])),
]


def test_dino(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from peer_dino import PeerDino

    torch.manual_seed(0)
    peer = PeerDino([8, 8, 8], width=64, hidden=32, num_queries=20).eval()
    config = DinoConfig(dim=64, ffn_dim=32, num_queries=20)
    ours = config.build([8, 8, 8], [8, 16, 32], num_classes=80).eval()
    ours.load_state_dict(convert(peer.state_dict(), dino_rules()))
    maps = [torch.randn(2, 8, 64 // stride, 96 // stride) for stride in (8, 16, 32)]
    with torch.no_grad():
        for mine, theirs in zip(ours.detect(maps, EXTENTS), peer.detect(maps, EXTENTS), strict=True):
            torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine.boxes, theirs.boxes, rtol=1e-4, atol=1e-3)
            assert torch.equal(mine.labels, theirs.labels)
        mine, theirs = ours.losses(maps, EXTENTS, OBJECTS), peer.losses(maps, EXTENTS, OBJECTS)
    pairs = [("encoder", "encoder"), *((f"layer{i + 1}", f"layer{i}") for i in range(6))]
    for ours_of, theirs_of in pairs:  # both draw what is denoised, each its own way
        for ours_is, theirs_is in (("class", "class"), ("box", "box"), ("giou", "overlap")):
            loss, other = mine[f"{ours_of}_{ours_is}"], theirs[f"{theirs_of}_{theirs_is}"]
            torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-5)
