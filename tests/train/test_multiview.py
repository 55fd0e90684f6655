"""Views, losses and where their gradients go; equality with the official step is in tests/parity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.transforms import functional as TF

from stepwell.fuse.downsample import AttentionDownsampler, KernelDownsampler
from stepwell.fuse.upsample import UpsamplerConfig, build_upsampler
from stepwell.train.multiview import (
    Draws,
    Jitter,
    MultiviewTraining,
    UncertaintyHead,
    draw_jitter,
    entropy,
    jitter,
    project,
    sampled_crf,
    total_variation,
)

STILL = Jitter(0, 1.0, 0, 0, False)
ALL = ("reconstruction", "crf", "total_variation")


def training(levels=2, supervised=None, *, dim=6, kernel=False, uncertainty=True, **settings):
    """A small training, without dropout in the stack, with a convolution of stride 8 for an encoder."""
    torch.manual_seed(0)
    supervised = supervised or levels
    config = UpsamplerConfig(kernel={"dropout": 0.0}, dropout=0.0)
    downs = [KernelDownsampler(8) if kernel else AttentionDownsampler(dim, 8) for _ in range(supervised)]
    settings = {"losses": ("reconstruction",), "max_pad": 4, "crf_samples": 50} | settings
    return MultiviewTraining(
        nn.Conv2d(3, dim, 8, stride=8),
        build_upsampler(config, dim, levels),
        downs,
        [UncertaintyHead(dim) for _ in downs] if uncertainty else [],
        **settings,
    )


IMAGE = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("flip", [False, True])
def test_a_view_without_zoom_is_a_padded_cut(flip):
    x = torch.randn(2, 3, 9, 12)
    expected = TF.crop(TF.pad(x, [4], padding_mode="reflect"), 3, 7, 9, 12)
    expected = TF.hflip(expected) if flip else expected
    assert torch.equal(jitter(x, Jitter(4, 1.0, 3, 7, flip)), expected)


def test_a_zoomed_view_shows_a_part_enlarged():
    ramp = torch.arange(16.0).expand(1, 1, 10, 16)
    x = jitter(ramp, Jitter(0, 2.0, 4, 6, False))
    assert x.shape == ramp.shape
    torch.testing.assert_close(x[0, 0, 0], (torch.arange(6, 22) + 0.5) / 2 - 0.5)


def test_views_are_drawn_from_all_that_there_is_room_for():
    torch.manual_seed(0)
    views = [draw_jitter((20, 30), max_pad=3, max_zoom=1.5) for _ in range(2000)]
    for axis, length in (("row", 20), ("column", 30)):
        unzoomed = [getattr(view, axis) for view in views if view.zoom == 1]
        assert set(unzoomed) == set(range(7))
        assert all(getattr(view, axis) + length <= int((length + 6) * view.zoom) for view in views)
    zooms = [view.zoom for view in views if view.zoom > 1]
    assert 0.45 < len(zooms) / 2000 < 0.55
    assert 1 < min(zooms) < 1.01 < 1.49 < max(zooms) < 1.5
    assert 0.45 < sum(view.flip for view in views) / 2000 < 0.55
    assert all(jitter(torch.zeros(1, 1, 20, 30), view).shape == (1, 1, 20, 30) for view in views[:20])


def test_views_come_again_with_torchs_seed():
    def drawn():
        torch.manual_seed(3)
        return [draw_jitter((8, 8), max_pad=2, max_zoom=2) for _ in range(5)]

    assert drawn() == drawn()


def test_a_projection_has_columns_of_length_one():
    x, projection = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 5)
    out = project(x, projection)
    for image in range(2):
        for column in range(5):
            direction = projection[image, :, column] / projection[image, :, column].norm()
            torch.testing.assert_close(out[image, column], (x[image] * direction[:, None, None]).sum(0))
    assert project(x, None) is x


def test_the_crf_sums_over_pairs_of_pixels():
    image, x = (torch.randn(2, n, 5, 8, dtype=torch.float64) for n in (3, 4))
    positions = torch.tensor([[0, 4, 2, 2], [7, 0, 3, 3]])
    settings = {"place": 0.3, "colour": 0.7, "near": 0.2, "weights": (2.0, 5.0), "shift": 0.4}
    total = 0.0
    for b in range(2):
        for r, c in positions.T.tolist():
            for s, d in positions.T.tolist():
                apart = ((r - s) / 5) ** 2 + ((c - d) / 8) ** 2
                unlike = float((image[b, :, r, c] - image[b, :, s, d]).square().sum())
                alike = 2 * math.exp(-apart / 0.6 - unlike / 1.4) + 5 * math.exp(-apart / 0.4) - 0.4
                total += alike * float((x[b, :, r, c] - x[b, :, s, d]).square().sum())
    assert float(sampled_crf(image, x, positions, **settings)) == pytest.approx(total / (2 * 4 * 4))


def test_total_variation_of_a_step_and_entropy_of_equal_weights():
    x = torch.zeros(1, 1, 4, 6)
    x[..., 3:] = 2.0
    assert float(total_variation(x)) == pytest.approx(4 * 4 / 24)
    assert float(total_variation(x.transpose(-1, -2))) == pytest.approx(4 * 4 / 24)
    assert float(entropy(torch.full((2, 1, 3, 3), 1 / 9))) == pytest.approx(math.log(9))
    certain = torch.zeros(1, 1, 3, 3)
    certain[0, 0, 1, 1] = 1
    assert float(entropy(certain)) == 0


def test_a_new_head_is_nearly_the_same_everywhere():
    torch.manual_seed(0)
    plain = nn.Conv2d(400, 1, 1)
    head = UncertaintyHead(400)
    assert float(head.conv.weight.detach().std() / plain.weight.detach().std()) == pytest.approx(0.1, rel=0.2)
    nn.init.constant_(head.conv.weight, -10.0)
    assert float(head(torch.ones(1, 400, 1, 1))) == pytest.approx(1e-4)


def gradients(module, losses):
    module.zero_grad()
    sum(losses.values()).backward()
    return {
        stage: sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)
        for stage, part in enumerate(module.upsampler.stages)
    }


def test_with_a_loss_at_every_level_the_last_one_teaches_the_last_stage_alone():
    module = training(3)
    assert all(share > 0 for share in gradients(module, module(IMAGE)).values())
    terms = module.terms
    module.terms = lambda *arguments, **named: terms(*arguments, **named)[-1:]
    first, second, last = gradients(module, module(IMAGE)).values()
    assert first == second == 0 < last
    module.stop_gradient = False
    assert all(share > 0 for share in gradients(module, module(IMAGE)).values())


def test_with_a_loss_at_the_last_level_it_teaches_all_stages():
    module = training(3, 1, stop_gradient=False)
    torch.manual_seed(1)
    draws = [module.draw(IMAGE, module.encoder(IMAGE), is_first=True)]
    losses = module(IMAGE, draws)
    assert all(share > 0 for share in gradients(module, losses).values())
    assert len(module.downsamplers) == len(module.uncertainty) == 1
    maps = [level.corrected() for level in module.upsampler.levels(module.encoder(IMAGE), IMAGE)]
    (terms,) = module.terms(IMAGE, maps[-1:], draws[0], is_first=True)
    torch.testing.assert_close(losses["reconstruction"], terms["reconstruction"])


def test_reconstruction_is_a_mean_of_views_and_the_others_are_of_the_first():
    module = training(losses=ALL)
    torch.manual_seed(2)
    map = module.encoder(IMAGE)
    first = module.draw(IMAGE, map, is_first=True)
    second = module.draw(IMAGE, map, is_first=False)
    assert len(first.positions) == 2
    assert not second.positions
    module.eval()
    both, one, other = (module(IMAGE, draws) for draws in ([first, second], [first], [second]))
    expected = (one["reconstruction"] + other["reconstruction"]) / 2
    torch.testing.assert_close(both["reconstruction"], expected)
    assert both["crf"] == one["crf"]
    assert both["total_variation"] == one["total_variation"]


def test_only_the_named_losses_are_computed_and_by_default_views_are_drawn():
    for losses in ((name,) for name in ALL):
        assert tuple(training(losses=losses)(IMAGE)) == losses
    kernel = training(losses=("entropy",), kernel=True)
    assert float(kernel(IMAGE)["entropy"]) == pytest.approx(-4 * math.log(64))  # 2 levels, 2 views
    module = training(views=3, losses=("crf",))
    seen = []
    module.terms = lambda image, maps, view, is_first: seen.append((view, is_first)) or []
    module(IMAGE)
    assert [is_first for _, is_first in seen] == [True, False, False]
    assert [len(view.positions) for view, _ in seen] == [2, 0, 0]
    assert len({view.jitter for view, _ in seen}) == 3


@pytest.mark.parametrize(("form", "best"), [("code", lambda e: e), ("paper", lambda e: math.sqrt(2) * e)])
def test_the_form_of_uncertainty_says_which_scale_is_best_for_an_error(form, best):
    module = training(1, uncertainty_form=form).eval()
    head = module.uncertainty[0]
    nn.init.zeros_(head.conv.weight)
    view = Draws(STILL, None, [None], [])
    plain = training(1, uncertainty=False).eval()
    plain.load_state_dict(module.state_dict(), strict=False)
    error = math.sqrt(float(plain(IMAGE, [view])["reconstruction"]))

    def loss(scale):
        nn.init.constant_(head.conv.bias, math.log(scale) - 0.1)
        return float(module(IMAGE, [view])["reconstruction"])

    least = loss(best(error))
    assert least < loss(best(error) * 1.1)
    assert least < loss(best(error) / 1.1)
    halves = {"code": 1.0, "paper": 0.5}[form]
    assert loss(1.0) == pytest.approx(error**2 / 2)
    assert loss(2.0) == pytest.approx(error**2 / 8 + halves * math.log(2))


def test_all_channels_are_compared_without_a_projection_and_few_with_one():
    module = training(1, uncertainty=False).eval()
    whole = module(IMAGE, [Draws(STILL, None, [None], [])])["reconstruction"]
    turned = torch.linalg.qr(torch.randn(6, 6))[0].expand(2, 6, 6)
    same = module(IMAGE, [Draws(STILL, turned, [None], [])])["reconstruction"]
    torch.testing.assert_close(same, whole)
    module.random_projection = 4
    assert module.draw(IMAGE, module.encoder(IMAGE), is_first=True).projection.shape == (2, 6, 4)
    assert training().draw(IMAGE, module.encoder(IMAGE), is_first=True).projection is None


def test_evaluation_is_the_same_every_time_and_leaves_the_generator_alone():
    module = training(losses=ALL, random_projection=3).eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = module(IMAGE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = module(IMAGE)
    assert first.keys() == again.keys() == {*ALL, "error_1x", "error_2x", "error_4x"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    module.train()
    assert module(IMAGE)["reconstruction"] != module(IMAGE)["reconstruction"]


def test_errors_are_shares_of_what_the_encoder_sees():
    module = training(1).eval()
    flat = torch.ones(2, 3, 32, 48)
    view = Draws(Jitter(4, 1.0, 1, 2, True), None, [None], [])
    seen = module.encoder(flat)
    errors = module.errors(flat, [seen, 3 * seen.repeat_interleave(2, -1).repeat_interleave(2, -2)], view)
    assert float(errors["error_1x"]) == pytest.approx(0, abs=1e-9)
    assert float(errors["error_2x"]) == pytest.approx(4, rel=1e-4)


def test_the_encoder_is_frozen_and_never_in_training_mode():
    module = training().train()
    assert module.training
    assert module.downsamplers[0].training
    assert not module.encoder.training
    sum(module(IMAGE).values()).backward()
    assert all(parameter.grad is None for parameter in module.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in module.encoder.parameters())
