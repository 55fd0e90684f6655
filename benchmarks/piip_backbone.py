"""PIIP against straightforward peers with the same weights: time, share of the machine's matrix rate, memory.

PIIP-TSB at 1120/896/448 as a detection backbone with its pyramid: 750 GFLOP of matrix products and
convolutions, 2 per multiply-accumulate. CLIP-L and ConvNeXt-B at 336/1024 as in PIIP-LLaVA, 336/768
in a training step. Batch 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import CLOSE, Command, Row, Worker, compare, matrix_rates
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
NAMES = {"detection": "PIIP-TSB 1120/896/448", "llava": "CLIP-L + ConvNeXt-B 336/1024"}
SIDES = {"detection": 1120, "llava": 1024}
TRAINING_SIDES = {"detection": 1120, "llava": 768}  # a step of the latter at 1024 takes 11 GiB
GFLOP = {"detection": 750}
DETECTION = PUBLISHED["piip_det_tsb_1120_896_448"]
LLAVA = PUBLISHED["piip_llava_convnext_b_clip_l_1024_336_7b"]


def rows() -> list[Row]:
    return [
        row
        for which, name in NAMES.items()
        for row in (
            (f"{name}, inference, fp32", partial(_inference, which, "float32", 1.4)),
            (f"{name}, inference, bf16", partial(_inference, which, "bfloat16", 1.2)),
            (_training_name(which), partial(_training, which)),
        )
    ]


def memory_rows() -> list[Row]:
    return [(f"{name}, fp32, peak memory", partial(_memory, which)) for which, name in NAMES.items()]


def inference(which: str, whose: str, dtype: str) -> Command:
    """What builds the network for a worker that times it."""
    return ("piip_backbone", "build_inference", which, whose, dtype)


def _inference(which: str, dtype: str, target: float) -> Iterator[str]:
    kind: torch.dtype = getattr(torch, dtype)
    name = f"{NAMES[which]}, inference, {'fp32' if dtype == 'float32' else 'bf16'}"
    before = max(matrix_rates(kind))
    ours, peer = inference(which, "ours", dtype), inference(which, "peer", dtype)
    row = compare(name, ours, peer, target=target, close=CLOSE[dtype], rounds=5)
    yield str(row)
    if which in GFLOP:
        rates = before, max(matrix_rates(kind))
        share = GFLOP[which] * 1e9 / row.ours / (sum(rates) / 2)
        shown = " and ".join(f"{rate / 1e9:.0f}" for rate in rates)
        what = f"its share of the better matrix rate, {shown} GFLOP/s before and after"
        yield f"| {what} | {share:.2f} | | | | | | |"


def _training(which: str) -> Iterator[str]:
    ours, peer = (("piip_backbone", "build_training", which, whose) for whose in ("ours", "peer"))
    yield str(compare(_training_name(which), ours, peer, target=1.2, close=None, rounds=3))


def _training_name(which: str) -> str:
    return f"{NAMES[which].replace(str(SIDES[which]), str(TRAINING_SIDES[which]))}, training step, fp32"


def _memory(which: str) -> Iterator[str]:
    """Of one inference, with random weights: taking over the peer's would hold both networks. Both processes
    import the same."""
    found = []
    for whose in ("ours", "peer"):
        with Worker(("piip_backbone", "build_inference", which, whose, "float32", "random")) as worker:
            found.append((*worker.ready(), worker.go()[1]))
    for what, of in (
        ("the whole process", lambda imports, built, peak: peak),
        ("weights and inference", lambda imports, built, peak: peak - imports),
        ("inference alone", lambda imports, built, peak: peak - built),
    ):
        ours, peer = (of(*peaks) for peaks in found)
        yield f"| {NAMES[which]}, {what} | {ours:.2f} | {peer:.2f} | {ours / peer:.2f} |"


def build_inference(
    which: str, whose: str, dtype: str, weights: str = "shared"
) -> Callable[[], list[Tensor]]:
    """For a worker: one forward pass, which returns the maps."""
    kind: torch.dtype = getattr(torch, dtype)
    network, run = build(which, whose, weights)
    network.to(kind)
    x = image(which).to(kind)

    def once() -> list[Tensor]:
        with torch.inference_mode():
            return run(x)

    return once


def build_training(which: str, whose: str) -> Callable[[], None]:
    """For a worker: one step of a backbone, which is forward, and backward from gradients that a head would
    hand it: a loss on maps of stride 4 would take a tenth of the step, the same for both. As an optimiser
    does, it gives the gradients of the step before back first, or they would lie beside the activations."""
    network, run = build(which, whose)
    network.train()
    x = image(which, TRAINING_SIDES)
    with torch.no_grad():
        grads = [torch.randn_like(out) / out.numel() for out in run(x)]

    def once() -> None:
        network.zero_grad()
        torch.autograd.backward(run(x), grads)

    return once


def image(which: str, sides: dict[str, int] = SIDES) -> Tensor:
    """The same noise in every process: (1, 3, side, side)."""
    return torch.randn(1, 3, sides[which], sides[which], generator=torch.Generator().manual_seed(1))


def build(which: str, whose: str, weights: str = "shared") -> tuple[nn.Module, Run]:
    """A network and what runs it. "shared": ours takes over the weights of the peer, which are the same in
    every process; "random": it is built alone."""
    torch.manual_seed(0)
    peer = None
    if whose == "peer" or weights == "shared":
        peer = detection_peer() if which == "detection" else llava_peer()
    if whose == "peer":
        return peer, peer
    if which == "detection":
        model = detection(peer)
        return model, partial(detect, model)
    tower = llava(peer)
    return tower, partial(see, tower)


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
    (final,) = model(image_pyramid(image, (336 / image.shape[-1], 1.0)))
    return model.maps(final)
