"""Detectors against straightforward peers with the same weights: time and memory.

Whole ones: PIIP-TSB at 1120/896/448 under Mask R-CNN, and under DINO's heads at a quarter of the official
width, on an image of 1120x1120. Heads alone: on maps of such an image, 768 wide, and DINO's on maps of an
image of 896x560 (half the sides of 1792x1120, so that a row takes a minute or two), 256 wide. Batch 1. "bf16"
is as the official code has it: the backbone in bf16, the heads in single precision; of heads alone it is
their layers, and DINO's only: torchvision has no RoIAlign in bf16 on a CPU.

Fairness: weights have learnt nothing, so scores are nearly uniform and a threshold would let through all or
nothing. On both sides it is 0 in the second stage: 1000 proposals enter it, every class of each is sorted
and suppressed, 100 detections leave it and get masks, which nobody pastes into the image. With these
weights nine proposals in ten lie on the finest map, and of 512 samples of a training step only the objects
and few more are positive. DINO has no threshold: 900 queries, 300 detections.

What the two find is not compared here. torchvision's boxes are not the official ones; and among a thousand
cells of a DINO that has learnt nothing a few differ by less than rounding, so that they change places, and
then all queries say something else. tests/test_peers.py compares on smaller maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from measure import Row, Worker, compare, has_bf16
from peer_dino import PeerDino
from peer_rcnn import PeerMaskRcnn
from piip_backbone import detection, detection_peer
from torch import Tensor, nn

from stepwell.heads.box_head import Selection
from stepwell.heads.dino import Dino, DinoConfig
from stepwell.heads.rcnn import Rcnn, RcnnConfig
from stepwell.keys.dino import dino_rules
from stepwell.keys.engine import convert
from stepwell.keys.rcnn import rcnn_rules
from stepwell.models.dense import PyramidFeatures
from stepwell.ops.double import AnyMap
from stepwell.structures import Extent, FoundObjects, Objects, Size

Heads = Literal["rcnn", "dino"]
Part = Literal["whole", "alone"]
NAMES = {
    ("rcnn", "whole"): "Mask R-CNN, PIIP-TSB 1120/896/448",
    ("rcnn", "alone"): "Mask R-CNN's heads, 1120x1120",
    ("dino", "whole"): "DINO, a quarter as wide, PIIP-TSB 1120/896/448",
    ("dino", "alone"): "DINO's heads, a quarter as wide, 896x560",
}
STRIDES = {"rcnn": (4, 8, 16, 32), "dino": (8, 16, 32)}
SIZES: dict[tuple[str, str], Size] = {
    ("rcnn", "whole"): (1120, 1120),
    ("rcnn", "alone"): (1120, 1120),
    ("dino", "whole"): (1120, 1120),
    ("dino", "alone"): (560, 896),
}
WIDTHS = {("rcnn", "whole"): 768, ("rcnn", "alone"): 768, ("dino", "whole"): 768, ("dino", "alone"): 256}
NUM_CLASSES, NUM_OBJECTS = 80, 8


def rows() -> list[Row]:
    return [
        row
        for (which, part), name in NAMES.items()
        for row in (
            (f"{name}, inference, fp32", partial(_inference, which, part, "float32")),
            *(
                [(f"{name}, inference, bf16", partial(_inference, which, part, "bfloat16"))]
                if (which, part) != ("rcnn", "alone")
                else []
            ),
            (f"{name}, training step, fp32", partial(_training, which, part)),
        )
    ]


def memory_rows() -> list[Row]:
    return [(f"{name}, fp32, peak memory", partial(_memory, *key)) for key, name in NAMES.items()]


def _inference(which: Heads, part: Part, dtype: str) -> Iterator[str]:
    name = f"{NAMES[which, part]}, inference, {'fp32' if dtype == 'float32' else 'bf16'}"
    ours, peer = (("detectors", "build_inference", which, part, whose, dtype) for whose in ("ours", "peer"))
    if dtype == "bfloat16" and part == "whole" and not has_bf16():  # a convolution of the peer takes minutes
        yield f"| {name} | not timed: this processor has no bf16 instructions | | | | | | |"
        return
    target = 1.25 if part == "whole" else None
    yield str(compare(name, ours, peer, target=target, close=None, rounds=5))


def _training(which: Heads, part: Part) -> Iterator[str]:
    name = f"{NAMES[which, part]}, training step, fp32"
    ours, peer = (("detectors", "build_training", which, part, whose) for whose in ("ours", "peer"))
    yield str(compare(name, ours, peer, target=1.1 if part == "whole" else None, close=None, rounds=3))


def _memory(which: Heads, part: Part) -> Iterator[str]:
    """Of one inference, with random weights: taking over the peer's would hold both networks. Both processes
    import the same."""
    found = []
    for whose in ("ours", "peer"):
        command = ("detectors", "build_inference", which, part, whose, "float32", "random")
        with Worker(command) as worker:
            found.append((*worker.ready(), worker.go()[1]))
    for what, of in (
        ("the whole process", lambda imports, built, peak: peak),
        ("weights and inference", lambda imports, built, peak: peak - imports),
        ("inference alone", lambda imports, built, peak: peak - built),
    ):
        ours, peer = (of(*peaks) for peaks in found)
        share = f"{ours / peer:.2f}"
        if what == "inference alone" and part == "whole":
            share += f" (target 0.70, {'met' if ours <= 0.7 * peer else 'missed'})"
        yield f"| {NAMES[which, part]}, {what} | {ours:.2f} | {peer:.2f} | {share} |"


class Detector(nn.Module):
    """backbone: image -> maps, finest first; none for heads alone, which are given maps."""

    def __init__(self, backbone: nn.Module | None, head: nn.Module, num_maps: int) -> None:
        super().__init__()
        self.backbone, self.head, self.num_maps = backbone, head, num_maps

    def maps(self, inputs: Sequence[Tensor]) -> list[AnyMap]:
        """The image, or the maps. Behind a backbone, heads compute in single precision."""
        if self.backbone is None:
            return list(inputs)
        if isinstance(self.backbone, PyramidFeatures):  # as our detectors call it
            places = range(len(self.backbone.strides))[-self.num_maps :]
            return [x.to(torch.float32) for x in self.backbone.unfinished(inputs[0], places)]
        return [x.float() for x in list(self.backbone(inputs[0]))[-self.num_maps :]]


def build_inference(
    which: Heads, part: Part, whose: str, dtype: str, weights: str = "shared"
) -> Callable[[], list[Tensor]]:
    """For a worker: one image, which returns the scores."""
    kind: torch.dtype = getattr(torch, dtype)
    detector = build(which, part, whose, weights).eval()
    (detector.head if detector.backbone is None else detector.backbone).to(kind)
    given, extents = [x.to(kind) for x in inputs(which, part)], _extents(which, part)

    def once() -> list[Tensor]:
        with torch.inference_mode():
            found: list[FoundObjects] = detector.head.detect(detector.maps(given), extents)
        return [x.scores for x in found]

    return once


def build_training(which: Heads, part: Part, whose: str) -> Callable[[], None]:
    """For a worker: one step, which is forward, losses and backward, on a few objects. Heads alone hand their
    maps gradients, as they would to a backbone."""
    detector = build(which, part, whose).train()
    given, extents, truth = inputs(which, part), _extents(which, part), [objects(SIZES[which, part])]
    if part == "alone":
        given = [x.requires_grad_() for x in given]

    def once() -> None:
        detector.zero_grad()
        for x in given:
            x.grad = None
        losses: dict[str, Tensor] = detector.head.losses(detector.maps(given), extents, truth)
        torch.stack(list(losses.values())).sum().backward()

    return once


def build(which: Heads, part: Part, whose: str, weights: str = "shared") -> Detector:
    """weights: "shared", ours takes over the peer's, which are the same in every process; "random", it is
    built alone."""
    torch.manual_seed(0)
    peer = None
    if whose == "peer" or weights == "shared":
        backbone = detection_peer() if part == "whole" else None
        peer = Detector(backbone, _peer_head(which, part), len(STRIDES[which]))
    if whose == "peer":
        assert peer is not None
        return peer
    backbone = detection(None if peer is None else peer.backbone) if part == "whole" else None
    return Detector(
        backbone, _our_head(which, part, None if peer is None else peer.head), len(STRIDES[which])
    )


def _peer_head(which: Heads, part: Part) -> PeerMaskRcnn | PeerDino:
    dims = [WIDTHS[which, part]] * len(STRIDES[which])
    if which == "rcnn":
        return PeerMaskRcnn(dims, NUM_CLASSES, score_threshold=0.0)
    return PeerDino(dims, NUM_CLASSES, width=64, hidden=512)


def _our_head(which: Heads, part: Part, peer: nn.Module | None) -> nn.Module:
    """With the weights of the peer's, where one is given."""
    dims = [WIDTHS[which, part]] * len(STRIDES[which])
    head: Rcnn | Dino
    if which == "rcnn":
        config = RcnnConfig(selection=Selection(above=0.0))
        head, rules = config.build(dims, STRIDES[which], NUM_CLASSES), rcnn_rules()
    else:
        head, rules = DinoConfig(dim=64, ffn_dim=512).build(dims, STRIDES[which], NUM_CLASSES), dino_rules()
    if peer is not None:
        weights = peer.official_weights() if isinstance(peer, PeerMaskRcnn) else peer.state_dict()
        head.load_state_dict(convert(weights, rules))
    return head


def inputs(which: Heads, part: Part) -> list[Tensor]:
    """The same noise in every process: one image (1, 3, H, W), or maps (1, C, h, w)."""
    generator = torch.Generator().manual_seed(1)
    height, width = SIZES[which, part]
    if part == "whole":
        return [torch.randn(1, 3, height, width, generator=generator)]
    return [
        torch.randn(1, WIDTHS[which, part], -(-height // stride), -(-width // stride), generator=generator)
        for stride in STRIDES[which]
    ]


def objects(size: Size) -> Objects:
    """Ellipses from a twentieth to a half of the image's sides."""
    generator = torch.Generator().manual_seed(2)
    whole = torch.tensor([size[1], size[0]])
    sides = torch.linspace(0.05, 0.5, NUM_OBJECTS)[:, None] * whole
    corners = torch.rand(NUM_OBJECTS, 2, generator=generator) * (whole - sides)
    centres = (corners + sides / 2)[:, :, None, None]
    ys, xs = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    away = (torch.stack([xs, ys]) - centres) / (sides / 2)[:, :, None, None]
    masks = (away.square().sum(1) <= 1).to(torch.uint8)
    labels = torch.randint(NUM_CLASSES, (NUM_OBJECTS,), generator=generator)
    return Objects(torch.cat([corners, corners + sides], 1), labels, masks)


def _extents(which: Heads, part: Part) -> list[Extent]:
    return [Extent(SIZES[which, part], SIZES[which, part])]
