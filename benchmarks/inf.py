"""INF-LLaVA as its released code computes it, against the official order of passes, with the same weights.

CLIP-L/14 up to its second to last layer, three crops a side, fp32. The peer (peer_inf.py) sees 19 views one
by one, of transformers' CLIP, and calls one attention window by window; ours encodes the ten that reach a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Row, Worker, compare
from peer_inf import PeerEnhancement, PeerVision
from torch import Tensor, nn
from transformers import CLIPVisionModel

from stepwell.fuse.dual import DualEnhancement, EnhancementConfig
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import convert
from stepwell.keys.inf import ENHANCEMENT
from stepwell.language.projector import build_projector
from stepwell.models.inf import InfConfig, InfVision
from uhd import clip_l

ENHANCEMENT_NAME = "INF-LLaVA's dual enhancement, 3x3 crops of 24x24x1024"
VISION_NAME = "INF-LLaVA's vision, 1008x1008"
DIM, SIDE, CROPS, OUT_DIM = 1024, 24, 3, 4096


def rows() -> list[Row]:
    return [
        (f"{ENHANCEMENT_NAME}, inference", partial(_enhancement, "infer", 2.0)),
        (f"{ENHANCEMENT_NAME}, training step", partial(_enhancement, "train", None)),
        (f"{VISION_NAME}, inference", _vision),
        (f"{VISION_NAME}, memory beside the weights", _memory),
    ]


def _enhancement(what: str, target: float | None) -> Iterator[str]:
    ours, peer = (("inf", "build_enhancement", whose, what) for whose in ("ours", "peer"))
    name = "inference" if what == "infer" else "training step"
    yield str(compare(f"{ENHANCEMENT_NAME}, {name}", ours, peer, target=target))


def _vision() -> Iterator[str]:
    ours, peer = (("inf", "build_vision", whose) for whose in ("ours", "peer"))
    yield str(compare(f"{VISION_NAME}, inference", ours, peer, target=1.7, rounds=3))


def _memory() -> Iterator[str]:
    own = []
    for whose in ("ours", "peer"):
        with Worker(("inf", "build_alone", whose)) as worker:
            _, built = worker.ready()
            own.append(max(worker.go()[1] for _ in range(2)) - built)
    share = own[0] / own[1]
    target = f"0.60, {'met' if share < 0.6 else 'missed'}"
    what = f"{VISION_NAME}, memory beside the weights"
    yield f"| {what} | | | {share:.2f} | {target} | | {own[0]:.2f} and {own[1]:.2f} | |"


def build_enhancement(whose: str, what: str) -> Callable[[], list[Tensor]]:
    """For a worker: one map of two times nine crops, or their gradients and those of two weights."""
    torch.manual_seed(0)
    peer = PeerEnhancement(DIM, n=CROPS).eval()
    ours = DualEnhancement(DIM, EnhancementConfig()).eval()
    ours.load_state_dict(convert(peer.state_dict(), ENHANCEMENT))
    local, strided = (torch.randn(1, CROPS**2, SIDE, SIDE, DIM).requires_grad_() for _ in range(2))
    grad = torch.randn(1, SIDE**2, DIM)

    def run() -> Tensor:
        if whose == "ours":
            return ours(local, strided, (CROPS, CROPS)).flatten(1, 2)
        crops, strides = ([x.flatten(1, 2) for x in maps.unbind(1)] for maps in (local, strided))
        return peer(crops, strides)

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            return [run()]

    def step() -> list[Tensor]:
        network: nn.Module = ours if whose == "ours" else peer
        network.zero_grad()
        local.grad = strided.grad = None
        run().backward(grad)
        assert local.grad is not None
        assert strided.grad is not None
        return [local.grad, strided.grad]

    return infer if what == "infer" else step


def build_vision(whose: str) -> Callable[[], list[Tensor]]:
    """For a worker: the visual tokens of an image, of the same weights."""
    torch.manual_seed(0)
    clip, peer, vision = clip_l(), PeerEnhancement(DIM, n=CROPS), InfConfig().build(OUT_DIM).eval()
    assert vision.enhancement is not None
    if whose == "peer":
        return _infer(PeerVision(partial(_tokens, clip), peer, vision.projector, 336).eval())
    vision.enhancement.load_state_dict(convert(peer.state_dict(), ENHANCEMENT))
    rules = backbone_rules("clip", class_token=True, class_slot=True)
    vision.branches[0].load_state_dict(convert(clip.state_dict(), rules))
    return _infer(vision)


def build_alone(whose: str) -> Callable[[], list[Tensor]]:
    """The same of any weights, so that building needs no more memory than they."""
    if whose == "ours":
        return _infer(InfConfig().build(OUT_DIM).eval())
    projector = build_projector("mlp2x_gelu", DIM, OUT_DIM)
    encode = partial(_tokens, clip_l())
    return _infer(PeerVision(encode, PeerEnhancement(DIM, n=CROPS), projector, 336).eval())


def _infer(network: PeerVision | InfVision) -> Callable[[], list[Tensor]]:
    torch.manual_seed(1)
    image = torch.randn(1, 3, 1008, 1008)

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            if isinstance(network, InfVision):
                return network([image[0]], [network.geometry.layout((1008, 1008))])
            return [network(image)[0]]

    return infer


def _tokens(clip: CLIPVisionModel, views: Tensor) -> Tensor:
    """(B, 3, 336, 336) -> (B, 576, C)."""
    hidden: Tensor = clip(views, output_hidden_states=True).hidden_states[-2]
    return hidden[:, 1:]
