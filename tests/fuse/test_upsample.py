"""The inverse pyramid: stages against torch's own ops or a loop over the equations, each switch by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from stepwell.fuse.upsample import (
    BilinearStage,
    DeconvolutionStage,
    GuidedStage,
    InversePyramid,
    KernelConfig,
    UpsamplerConfig,
    build_upsampler,
)
from stepwell.layers.linear import Linear
from stepwell.ops.choose import prefer

PATHS = pytest.mark.parametrize("path", ["reference", "fast"])
PAPER = KernelConfig(distance="pixels", similarity="sigma", normalise="count", correction=False)


def tensors(size=(3, 4), *, batch=2, dim=5, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """A map and guidance of twice its size."""
    torch.manual_seed(0)
    x = torch.randn(batch, dim, *size, dtype=dtype)
    return x, torch.randn(batch, 3, 2 * size[0], 2 * size[1], dtype=dtype)


def stage(config: KernelConfig | None = None, **changes) -> GuidedStage:
    """In float64, with parameters that are not where they begin."""
    torch.manual_seed(1)
    module = GuidedStage(config or KernelConfig(radius=1, key_dim=4, **changes)).double().eval()
    with torch.no_grad():
        module.similarity.fill_(0.7)
        module.distance_sigma.fill_(1.3)
    return module


def mirrored(place: int, length: int) -> int:
    while not 0 <= place < length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


def by_equations(module: GuidedStage, x: Tensor, guidance: Tensor) -> Tensor:
    """LLaVA-UHD v2, equations 2, 8 and 9, a pixel and a neighbour at a time; without a correction."""
    c = module.config
    large = F.interpolate(x, guidance.shape[2:], mode="bicubic", align_corners=False)
    keys, out = module.keys(guidance), torch.zeros_like(large)
    height, width = guidance.shape[2:]
    steps = [(dy, dx) for dy in range(-c.radius, c.radius + 1) for dx in range(-c.radius, c.radius + 1)]
    unit = c.radius if c.distance == "relative" else 1
    sigma, similarity = module.distance_sigma.item(), module.similarity.item()
    scale = math.exp(similarity) if c.similarity == "temperature" else 1 / similarity**2
    for b, y, x_ in torch.cartesian_prod(*map(torch.arange, (len(x), height, width))).tolist():
        places = [(mirrored(y + dy, height), mirrored(x_ + dx, width)) for dy, dx in steps]
        logits = torch.stack([scale * (keys[b, :, y, x_] @ keys[b, :, i, j]) for i, j in places])
        near = torch.tensor([math.exp(-(dy**2 + dx**2) / unit**2 / (2 * sigma**2)) for dy, dx in steps])
        weights = logits.softmax(0) * near
        weights = weights / (weights.sum() if c.normalise == "sum" else len(steps))
        for weight, (i, j) in zip(weights, places, strict=True):
            out[b, :, y, x_] += weight * large[b, :, i, j]
    return out


@PATHS
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (1, 5), (2, 1)])
def test_the_papers_kernel_is_its_equations(path, size):
    x, guidance = tensors(size, batch=1)
    module = stage(PAPER)
    with prefer(path), torch.no_grad():
        torch.testing.assert_close(module(x, guidance), by_equations(module, x, guidance))


@PATHS
@pytest.mark.parametrize(
    "changes",
    [{"distance": "pixels"}, {"similarity": "sigma"}, {"normalise": "count"}, {"radius": 1}, {}],
    ids=str,
)
def test_each_switch_of_a_kernel_by_itself_is_as_the_equations_say(path, changes):
    module = stage(KernelConfig(**{"radius": 2, "key_dim": 4, "correction": False, **changes}))
    x, guidance = tensors((2, 3), batch=1)
    with prefer(path), torch.no_grad():
        torch.testing.assert_close(module(x, guidance), by_equations(module, x, guidance))


def test_a_correction_adds_a_tenth_of_what_its_layers_see_in_kernel_and_guidance():
    _, guidance = tensors()
    module, plain = stage(), stage(correction=False)
    plain.load_state_dict(module.state_dict(), strict=False)
    kernels = plain.kernels(guidance)
    first, _, _, last = module.correction
    hidden = F.gelu(F.conv2d(torch.cat([kernels, guidance], 1), first.weight, first.bias))
    expected = kernels + 0.1 * F.conv2d(hidden, last.weight, last.bias)
    torch.testing.assert_close(module.kernels(guidance), expected)
    assert plain.correction is None


def test_kernels_sum_to_one_and_are_flat_where_the_guidance_is():
    module = stage(correction=False)
    _, guidance = tensors()
    torch.testing.assert_close(module.kernels(guidance).sum(1), torch.ones(2, 6, 8, dtype=torch.float64))
    constant = stage(PAPER).similarities(torch.ones(1, 3, 6, 8, dtype=torch.float64))
    torch.testing.assert_close(constant, torch.full_like(constant, 1 / 49))


def test_a_kernel_that_sums_to_nothing_is_not_blown_up(monkeypatch):
    """All that is similar lies far away: the sum by which the kernel is divided is held at 1e-7."""
    module, (_, guidance) = stage(correction=False), tensors()
    alike = torch.full((2, 9, 6, 8), 1 / 8, dtype=torch.float64)
    alike[:, 4] = 0
    monkeypatch.setattr(module, "similarities", lambda guidance: alike)
    module.distance_sigma.data.fill_(0.1)
    expected = alike * module.distances()[:, None, None] / 1e-7
    torch.testing.assert_close(module.kernels(guidance), expected, rtol=1e-9, atol=0)


def test_a_temperature_is_held_within_its_limits():
    _, guidance = tensors()
    module = stage(correction=False)
    for value, limit in ((50.0, 1e4), (-50.0, 1e-4)):
        module.similarity.data.fill_(value)
        there = module.similarities(guidance)
        module.similarity.data.fill_(math.log(limit))
        torch.testing.assert_close(there, module.similarities(guidance))


def test_gradients_of_source_guidance_and_weights_are_the_same_on_both_paths():
    x, guidance = tensors((5, 6))
    module, results = stage(), {}
    for path in ("reference", "fast"):
        leaves = [x.clone().requires_grad_(), guidance.clone().requires_grad_()]
        with prefer(path):
            out = module(*leaves)
            results[path] = torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])
    torch.testing.assert_close(results["fast"], results["reference"], rtol=1e-9, atol=1e-9)


@PATHS
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 1)])
def test_maps_of_few_cells_are_enlarged(path, size):
    """The official code stops at maps of three pixels or fewer."""
    pyramid = build_upsampler(UpsamplerConfig(), 4, 2).eval()
    image = torch.randn(1, 3, 14 * size[0], 14 * size[1])
    with prefer(path), torch.no_grad():
        out = pyramid(torch.ones(1, 4, *size), image)
    assert out.shape == (1, 4, 4 * size[0], 4 * size[1])
    assert out.isfinite().all()


@PATHS
def test_an_image_of_a_batch_is_what_it_is_alone(path):
    pyramid = build_upsampler(UpsamplerConfig(), 6, 2).eval()
    x, image = torch.randn(3, 6, 5, 9), torch.randn(3, 3, 70, 126)
    with prefer(path), torch.no_grad():
        batch = pyramid(x, image)
        single = torch.cat([pyramid(x[i : i + 1], image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=1e-6, atol=1e-6)


@PATHS
def test_half_precision_stays_half_and_is_close(path):
    pyramid = build_upsampler(UpsamplerConfig(), 6, 2).eval()
    x, image = torch.randn(1, 6, 5, 9), torch.randn(1, 3, 70, 126)
    with prefer(path), torch.no_grad():
        exact = pyramid(x, image)
        half = pyramid.bfloat16()(x.bfloat16(), image.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_a_bilinear_stage_is_torchs_interpolation():
    x, guidance = tensors((3, 5))
    expected = F.interpolate(x, (6, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(BilinearStage()(x, guidance), expected)
    assert BilinearStage()(x.bfloat16(), guidance).dtype == torch.bfloat16


@PATHS
def test_a_deconvolution_stage_is_torchs_transposed_convolution(path):
    x, guidance = tensors((3, 5))
    module = DeconvolutionStage(5).double()
    with prefer(path):
        out = module(x, guidance)
    torch.testing.assert_close(out, nn.ConvTranspose2d.forward(module, x))


class _Halves(nn.Module):
    """A stage whose map is known: cells repeated and halved."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        self.seen = [x, guidance]
        return self.scale * x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def pyramid_of(count: int, corrections: str) -> InversePyramid:
    torch.manual_seed(0)
    return InversePyramid([_Halves() for _ in range(count)], 4, corrections=corrections).eval()


def corrected(pyramid: InversePyramid, i: int, x: Tensor) -> Tensor:
    linear = pyramid.corrections[i].linear
    return x + 0.1 * F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def test_every_stage_is_guided_by_the_whole_image_in_its_own_size():
    pyramid, image = pyramid_of(3, "last"), torch.randn(1, 3, 42, 70)
    pyramid(torch.ones(1, 4, 3, 5), image)
    for i, stage in enumerate(pyramid.stages):
        expected = F.adaptive_avg_pool2d(image, (3 * 2 ** (i + 1), 5 * 2 ** (i + 1)))
        torch.testing.assert_close(stage.seen[1], expected)


@pytest.mark.parametrize("corrections", ["last", "each", "none"])
def test_corrections_stand_where_they_are_asked_for(corrections):
    pyramid = pyramid_of(3, corrections)
    x, image = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 28, 42)
    levels, last = pyramid.levels(x, image), pyramid(x, image)
    maps, plain = [], x
    for i in range(3):
        plain = 0.5 * F.interpolate(plain, scale_factor=2, mode="nearest")
        maps.append(plain)
        if corrections == "each":
            plain = corrected(pyramid, i, plain)
    chain = F.interpolate(x, scale_factor=8, mode="nearest") / 8
    assert len(pyramid.corrections) == {"last": 1, "each": 4, "none": 0}[corrections]
    torch.testing.assert_close([level.map for level in levels], maps)
    expected = {
        "last": [*maps[:2], corrected(pyramid, -1, maps[2])] if corrections == "last" else [],
        "each": [corrected(pyramid, i, maps[i]) for i in range(3)] if corrections == "each" else [],
        "none": maps,
    }[corrections]
    torch.testing.assert_close([level.corrected() for level in levels], expected)
    torch.testing.assert_close(last, chain if corrections == "none" else corrected(pyramid, -1, chain))


@pytest.mark.parametrize("corrections", ["last", "each"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_stopped_gradient_reaches_the_own_stage_alone(corrections, stop_gradient):
    pyramid = pyramid_of(3, corrections)
    x = torch.randn(1, 4, 2, 3, requires_grad=True)
    levels = pyramid.levels(x, torch.randn(1, 3, 28, 42), stop_gradient=stop_gradient)
    levels[-1].corrected().sum().backward(retain_graph=True)
    reached = [stage.scale.grad is not None for stage in pyramid.stages]
    assert reached == ([False, False, True] if stop_gradient else [True] * 3)
    assert (x.grad is None) == stop_gradient
    levels[0].corrected().sum().backward()
    assert pyramid.stages[0].scale.grad is not None


@pytest.mark.parametrize(
    ("kind", "corrections", "stages", "count"),
    [
        ("guided", "code", 1, 1),
        ("guided", "code", 2, 1),
        ("guided", "code", 3, 4),
        ("guided", "code", 4, 1),
        ("guided", "code", 0, 0),
        ("guided", "none", 3, 0),
        ("guided", "each", 2, 3),
        ("guided", "last", 3, 1),
        ("bilinear", "code", 2, 0),
        ("deconvolution", "last", 3, 0),
    ],
)
def test_a_pyramid_is_built_as_its_config_says(kind, corrections, stages, count):
    pyramid = build_upsampler(UpsamplerConfig(kind=kind, corrections=corrections), 8, stages)
    types = {"guided": GuidedStage, "bilinear": BilinearStage, "deconvolution": DeconvolutionStage}
    assert [type(stage) for stage in pyramid.stages] == [types[kind]] * stages
    assert len(pyramid.corrections) == count
    if stages == 0:
        assert pyramid.levels(torch.zeros(1, 8, 2, 2), torch.zeros(1, 3, 28, 28)) == []
    elif kind != "guided":
        assert pyramid(torch.randn(1, 8, 2, 3), torch.randn(1, 3, 28, 42)).shape[2:] == (
            2 * 2**stages,
            3 * 2**stages,
        )


def test_dropout_rests_in_evaluation_and_works_in_training():
    config = UpsamplerConfig(kernel=KernelConfig(dropout=0.5), dropout=0.5)
    pyramid = build_upsampler(config, 8, 1)
    rates = [m.p for m in pyramid.modules() if isinstance(m, nn.Dropout2d)]
    assert rates == [0.5] * 3
    x, image = torch.randn(1, 8, 3, 4), torch.randn(1, 3, 42, 56)
    assert torch.equal(pyramid.eval()(x, image), pyramid(x, image))
    pyramid.train()
    assert not torch.equal(pyramid(x, image), pyramid(x, image))


@pytest.mark.parametrize(
    "settings", [{"radius": 0}, {"key_dim": 0}, {"dropout": 1.0}, {"distance": "cells"}, {"radios": 3}]
)
def test_settings_of_a_kernel_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        KernelConfig(**settings)


def test_a_correction_is_left_to_others_only_where_it_is_a_plain_layer():
    pyramid = build_upsampler(UpsamplerConfig(), 6, 2)
    x, image = torch.randn(1, 6, 4, 5), torch.randn(1, 3, 16, 20)
    assert pyramid.train().levels(x, image)[-1].correction is None  # it drops channels
    assert pyramid.eval().levels(x, image)[-1].correction is pyramid.corrections[0]

    class Adapted(Linear):
        pass

    adapted = Adapted(6, 6)
    adapted.load_state_dict(pyramid.corrections[0].linear.state_dict())
    expected = pyramid.levels(x, image)[-1].corrected()
    pyramid.corrections[0].linear = adapted
    level = pyramid.levels(x, image)[-1]
    assert level.correction is None
    torch.testing.assert_close(level.map, expected)


@pytest.mark.parametrize("where", ["", "linear", "dropout"])
def test_a_correction_that_is_heard_is_not_left_to_others(where):
    pyramid, heard = build_upsampler(UpsamplerConfig(), 6, 2).eval(), []
    x, image = torch.randn(1, 6, 4, 5), torch.randn(1, 3, 16, 20)
    expected = pyramid.levels(x, image)[-1].corrected()
    pyramid.corrections[0].get_submodule(where).register_forward_hook(lambda *_: heard.append(1))
    level = pyramid.levels(x, image)[-1]
    assert (level.correction, heard) == (None, [1])
    torch.testing.assert_close(level.map, expected)
