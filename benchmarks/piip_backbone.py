"""PIIP against straightforward peers with the same weights: time, share of the machine's matrix rate, memory.

PIIP-TSB at 1120/896/448 as a detection backbone with its pyramid: 750 GFLOP of matrix products and
convolutions, 2 per multiply-accumulate. CLIP-L and ConvNeXt-B at 336/1024 as in PIIP-LLaVA. Batch 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import compare, matmul_rate, own_peak_gib, peak_gib
from peer_llava import PeerLlava
from peer_piip import PeerPiip
from torch import Tensor, nn

from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import convert
from stepwell.keys.piip import encoder_rules, features_rules
from stepwell.models.piip import PyramidEncoder, PyramidFeatures
from stepwell.models.published import PUBLISHED
from stepwell.models.vision import build_features, build_pyramid_encoder
from stepwell.views.pyramid import image_pyramid

Run = Callable[[Tensor], list[Tensor]]
GFLOP = 750  # of the detection backbone
DETECTION = PUBLISHED["piip_det_tsb_1120_896_448"]
LLAVA = PUBLISHED["piip_llava_convnext_b_clip_l_1024_336_7b"]


def detection_peer() -> PeerPiip:
    return PeerPiip((768, 384, 192), (12, 6, 3), (448, 896, 1120)).eval()


def detection(peer: PeerPiip | None = None) -> PyramidFeatures:
    """Our network; given a peer, with its weights taken over through the key tables."""
    settings = DETECTION.dense_settings()
    model = build_features(settings).eval()
    if peer is not None:
        rules = features_rules([backbone_rules("deit")] * 3, 12, operations=settings.operations)
        model.load_state_dict(convert(peer.state_dict(), rules))
    return model


def llava_peer() -> PeerLlava:
    return PeerLlava([list(branch.interactions) for branch in LLAVA.branches]).eval()


def llava(peer: PeerLlava) -> PyramidEncoder:
    model = build_pyramid_encoder(LLAVA.vision_config()).eval()
    clip = backbone_rules("clip", class_token=True, class_slot=True)
    rules = encoder_rules([clip, backbone_rules("convnext_timm", depths=(3, 3, 27, 3))], 12)
    weights = convert(peer.state_dict(), rules)
    model.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in weights.items()})
    return model


def detect(model: PyramidFeatures, image: Tensor) -> list[Tensor]:
    return list(model(image).values())


def see(model: PyramidEncoder, image: Tensor) -> list[Tensor]:
    (final,) = model(image_pyramid(image, (336 / 1024, 1.0)))
    return model.maps(final)


def run() -> Iterator[str]:
    peer = detection_peer()
    model = detection(peer)
    image = torch.randn(1, 3, 1120, 1120)
    yield from _inference("PIIP-TSB 1120/896/448", model, partial(detect, model), peer, image, GFLOP)
    mine, other = (peak_gib(__file__, which) for which in ("ours", "peer"))
    yield f"| PIIP-TSB, peak memory, inference, fp32, GiB | {mine:.2f} | {other:.2f} | {mine / other:.2f} |"
    ours, theirs = partial(detect, model.float().train()), peer.float().train()
    yield str(compare("PIIP-TSB, training step, fp32", _step(ours, image), _step(theirs, image), rounds=1))
    tower_peer = llava_peer()
    tower = llava(tower_peer)
    image = torch.randn(1, 3, 1024, 1024)
    yield from _inference("CLIP-L + ConvNeXt-B 336/1024", tower, partial(see, tower), tower_peer, image)


def _inference(
    name: str, model: nn.Module, ours: Run, peer: nn.Module, image: Tensor, gflop: float | None = None
) -> Iterator[str]:
    with torch.inference_mode():
        pairs = zip(ours(image), peer(image), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        yield f"| {name}, largest difference, relative | {worst:.1e} | | |"
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype), peer.to(dtype)
            x = image.to(dtype)
            row = compare(f"{name}, inference, {dtype}", partial(ours, x), partial(peer, x), rounds=2)
            yield str(row)
            if gflop is not None:
                rate = matmul_rate(dtype)
                share = gflop * 1e9 / row.ours / rate
                yield f"| share of the matrix rate, {rate / 1e9:.0f} GFLOP/s | {share:.2f} | | |"


def _step(network: Run, image: Tensor) -> Callable[[], None]:
    def once() -> None:
        sum(out.square().mean() for out in network(image)).backward()

    return once


if __name__ == "__main__":  # one inference in a process of its own, for its peak memory
    with torch.inference_mode():
        network: Run = partial(detect, detection()) if sys.argv[1] == "ours" else detection_peer()
        network(torch.randn(1, 3, 1120, 1120))
    print(own_peak_gib())
