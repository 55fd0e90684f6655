"""LLaVA-UHD v2's whole vision against its views one by one through plain parts, with the same weights.

CLIP-L/14 up to its second to last layer, the 4x stack, window attention in front of Vicuna-7B, fp32. The peer
does what the released code does on a CPU, of transformers' CLIP (every view alone, its position table
resized), peer_upsample.py and peer_windows.py. An image of 1008x672 has seven views. In a training step of
stage 2's parts, encoder and projector learn and the stack is frozen; an image of 672x336 has three views: in
seven, the peer needs more memory than a bench should. A run of the peer takes minutes, so there is one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Row, compare
from peer_upsample import PeerPyramid
from peer_windows import PeerWindows
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import convert
from stepwell.models.uhd import UhdV2Config, UhdVision

NAME = "LLaVA-UHD v2's vision"
INFERENCE, TRAINING = "inference, seven views of 1008x672", "training step, three views of 672x336"
SIZES = {INFERENCE: (672, 1008), TRAINING: (336, 672)}  # (height, width)
OUT_DIM = 4096
SETTINGS = UhdV2Config(organised=False)  # peers give the tokens view after view


def rows() -> list[Row]:
    return [
        (f"{NAME}, {INFERENCE}", partial(_row, INFERENCE, 2.5)),
        (f"{NAME}, {TRAINING}", partial(_row, TRAINING, 1.8)),
    ]


def _row(what: str, target: float) -> Iterator[str]:
    commands = (("uhd", "build", whose, what) for whose in ("ours", "peer"))
    yield str(compare(f"{NAME}, {what}", *commands, target=target, rounds=1))


def build(whose: str, what: str) -> Callable[[], list[Tensor]]:
    """For a worker: the visual tokens of an image, or some gradients of a step."""
    torch.manual_seed(0)
    vision, clip = SETTINGS.build(OUT_DIM).eval(), clip_l()
    rules = backbone_rules("clip", class_token=True, class_slot=True)
    vision.branches[0].load_state_dict(convert(clip.state_dict(), rules))
    assert vision.upsampler is not None
    vision.upsampler.requires_grad_(False)
    layout = vision.geometry.layout(SIZES[what])
    views = [torch.randn(3, *view.size) for view in layout.views]
    grad = torch.randn(layout.num_visual, OUT_DIM)
    network: nn.Module = Peer(clip, vision).eval() if whose == "peer" else vision

    def run() -> Tensor:
        return network(views) if whose == "peer" else network(views, [layout])[0]

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            return [run()]

    def step() -> list[Tensor]:
        network.zero_grad()
        run().backward(grad)
        return [vision.projector.qkv.weight.grad, vision.projector.position.grad]

    return step if what == TRAINING else infer


class Peer(nn.Module):
    def __init__(self, clip: CLIPVisionModel, vision: UhdVision) -> None:
        super().__init__()
        self.clip = clip
        self.stack = PeerPyramid(1024, 2)
        assert vision.upsampler is not None
        self.stack.load_state_dict(vision.upsampler.state_dict())
        self.stack.requires_grad_(False)
        self.windows = PeerWindows(vision.projector)

    def forward(self, views: list[Tensor]) -> Tensor:
        return torch.cat([self._see(view[None])[0] for view in views])

    def _see(self, view: Tensor) -> Tensor:
        """(1, 3, h, w) -> (1, 144, D)."""
        grid = view.shape[2] // 14, view.shape[3] // 14
        hidden = self.clip(view, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
        map = hidden[:, 1:].transpose(1, 2).unflatten(2, grid)
        half, whole = self.stack.levels(map, view)
        return self.windows([map, half, whole])


def clip_l() -> CLIPVisionModel:
    """CLIP ViT-L/14 at 336 pixels, random weights."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval()
