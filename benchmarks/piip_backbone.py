"""PIIP against straightforward peers with the same weights: time, share of the machine's matrix rate, memory.

PIIP-TSB at 1120/896/448 as a detection backbone with its pyramid: 750 GFLOP of matrix products and
convolutions, 2 per multiply-accumulate. CLIP-L and ConvNeXt-B at 336/1024 as in PIIP-LLaVA. Batch 1.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import compare, matmul_rate, own_peak_gib
from peer_llava import PeerLlava
from peer_piip import PeerPiip
from torch import Tensor, nn

from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import convert
from stepwell.keys.piip import encoder_rules, features_rules
from stepwell.models.dense import PyramidFeatures
from stepwell.models.published.papers import PUBLISHED
from stepwell.models.pyramid import PyramidEncoder, build_pyramid
from stepwell.views.pyramid import image_pyramid

Run = Callable[[Tensor], list[Tensor]]
GFLOP = 750  # of the detection backbone
DETECTION = PUBLISHED["piip_det_tsb_1120_896_448"]
LLAVA = PUBLISHED["piip_llava_convnext_b_clip_l_1024_336_7b"]


def detection_peer() -> PeerPiip:
    return PeerPiip((768, 384, 192), (12, 6, 3), (448, 896, 1120)).eval()


def detection(peer: PeerPiip | None = None) -> PyramidFeatures:
    """Our network; given a peer, with its weights taken over through the key tables."""
    settings = DETECTION.settings
    model = settings.build().eval()
    if peer is not None:
        rules = features_rules([backbone_rules("deit")] * 3, 12, operations=settings.operations)
        model.load_state_dict(convert(peer.state_dict(), rules))
    return model


def llava_peer() -> PeerLlava:
    return PeerLlava([list(branch.interactions) for branch in LLAVA.settings.branches]).eval()


def llava(peer: PeerLlava | None = None) -> PyramidEncoder:
    model = build_pyramid(LLAVA.settings.branches, LLAVA.settings.interaction).eval()
    if peer is None:
        return model
    clip = backbone_rules("clip", class_token=True, class_slot=True)
    rules = encoder_rules([clip, backbone_rules("convnext_timm", depths=(3, 3, 27, 3))], 12)
    weights = convert(peer.state_dict(), rules)
    model.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in weights.items()})
    return model


def detect(model: PyramidFeatures, image: Tensor) -> list[Tensor]:
    return list(model(image))


def see(model: PyramidEncoder, image: Tensor) -> list[Tensor]:
    (final,) = model(image_pyramid(image, (336 / 1024, 1.0)))
    return model.maps(final)


def run() -> Iterator[str]:
    peer = detection_peer()
    model = detection(peer)
    image = torch.randn(1, 3, 1120, 1120)
    yield from _inference("PIIP-TSB 1120/896/448", model, partial(detect, model), peer, image, GFLOP)
    yield from _memory("PIIP-TSB 1120/896/448", "detection")
    yield _training("PIIP-TSB 1120/896/448", model, partial(detect, model), peer, image)
    tower_peer = llava_peer()
    tower = llava(tower_peer)
    image = torch.randn(1, 3, 1024, 1024)
    yield from _inference("CLIP-L + ConvNeXt-B 336/1024", tower, partial(see, tower), tower_peer, image)
    yield from _memory("CLIP-L + ConvNeXt-B 336/1024", "llava")
    yield _training("CLIP-L + ConvNeXt-B 336/1024", tower, partial(see, tower), tower_peer, image)


def _inference(
    name: str, model: nn.Module, ours: Run, peer: nn.Module, image: Tensor, gflop: float | None = None
) -> Iterator[str]:
    with torch.inference_mode():
        pairs = zip(ours(image), peer(image), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        yield f"| {name}, largest difference, relative | {worst:.1e} | | |"
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype), peer.to(dtype)
            x, rates = image.to(dtype), [matmul_rate(dtype)]
            row = compare(f"{name}, inference, {dtype}", partial(ours, x), partial(peer, x), rounds=5)
            yield str(row)
            if gflop is not None:
                rates.append(matmul_rate(dtype))
                share = gflop * 1e9 / row.ours / (sum(rates) / 2)
                shown = " and ".join(f"{rate / 1e9:.0f}" for rate in rates)
                yield f"| share of the matrix rate, {shown} GFLOP/s before and after | {share:.2f} | | |"


def _memory(name: str, which: str) -> Iterator[str]:
    """Each in a process of its own; both import the same."""
    found = [_peaks(which, whose) for whose in ("ours", "peer")]
    for what, of in (
        ("the whole process", lambda imports, built, peak: peak),
        ("weights and inference", lambda imports, built, peak: peak - imports),
        ("inference alone", lambda imports, built, peak: peak - built),
    ):
        ours, theirs = (of(*peaks) for peaks in found)
        yield f"| {name}, fp32, peak GiB of {what} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |"


def _peaks(which: str, whose: str) -> list[float]:
    command = [sys.executable, __file__, which, whose]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(number) for number in output.split()]


def _training(name: str, model: nn.Module, ours: Run, peer: nn.Module, image: Tensor) -> str:
    """One step: forward, the mean square of all maps, backward."""
    model.float().train(), peer.float().train()
    return str(compare(f"{name}, training step, fp32", _step(ours, image), _step(peer, image), rounds=2))


def _step(network: Run, image: Tensor) -> Callable[[], None]:
    def once() -> None:
        sum(out.square().mean() for out in network(image)).backward()

    return once


def _measure_memory(which: str, whose: str) -> None:
    """Prints the peak memory of this process after importing, after building and after one inference."""
    imports = own_peak_gib()
    model: nn.Module
    if which == "detection":
        model, side = detection_peer() if whose == "peer" else detection(), 1120
        network: Run = model if whose == "peer" else partial(detect, model)
    else:
        model, side = llava_peer() if whose == "peer" else llava(), 1024
        network = model if whose == "peer" else partial(see, model)
    built = own_peak_gib()
    with torch.inference_mode():
        network(torch.randn(1, 3, side, side))
    print(imports, built, own_peak_gib())


if __name__ == "__main__":
    _measure_memory(*sys.argv[1:])
