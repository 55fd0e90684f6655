"""Down-samplers: windows, weights and what is drawn; equality with the official ones is in tests/parity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur

from stepwell.fuse.downsample import (
    LOGIT_DROPOUT,
    AttentionDownsampler,
    DownsamplerConfig,
    KernelDownsampler,
    blur,
    build_downsampler,
)


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("size", [(12, 17), (3, 9)])
def test_the_blur_is_torchvisions(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(blur(x), gaussian_blur(x, [5, 5], [1.0, 1.0]))


def test_scores_of_nothing_give_the_mean_of_each_window() -> None:
    down = AttentionDownsampler(3, 4, blur=False).eval()
    for parameter in down.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(down(x, (3, 5)), F.avg_pool2d(x, 4))


@pytest.mark.parametrize("blurred", [False, True])
@pytest.mark.parametrize(
    ("size", "side", "grid", "stride"),
    [((15, 23), 4, (4, 6), 3), ((21, 12), 3, (10, 5), 2), ((16, 32), 5, (3, 6), 5), ((9, 9), 4, (1, 1), 5)],
)
def test_every_cell_is_what_its_window_alone_gives(
    size: tuple[int, int], side: int, grid: tuple[int, int], stride: int, blurred: bool
) -> None:
    down = drawn(AttentionDownsampler(5, side, blur=blurred))
    x = torch.randn(2, 5, *size)
    smooth = gaussian_blur(x, [5, 5], [1.0, 1.0]) if blurred else x
    out = down(x, grid)
    assert out.shape == (2, 5, *grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            window = smooth[:, :, row * stride :, column * stride :][:, :, :side, :side].flatten(2)
            logits = F.linear(window.transpose(1, 2), down.linear.weight, down.linear.bias)[..., 0]
            weights = (logits * down.scale.flatten() + down.shift.flatten()).softmax(-1)
            torch.testing.assert_close(out[:, :, row, column], (window @ weights[..., None])[..., 0])


def test_a_map_may_be_projected_first_where_its_scores_were_taken_before() -> None:
    down, projection = drawn(AttentionDownsampler(6, 4)), torch.randn(2, 6)
    x = torch.randn(1, 6, 16, 12)
    first = down.pool(torch.einsum("bchw,vc->bvhw", x, projection), down.scores(x), (4, 3))
    torch.testing.assert_close(first, torch.einsum("bchw,vc->bvhw", down(x, (4, 3)), projection))


def test_cells_that_are_not_kept_weigh_by_place_alone() -> None:
    down = drawn(AttentionDownsampler(3, 4, blur=False))
    x, kept = torch.randn(1, 3, 8, 8), torch.tensor([[[True, False], [True, True]]])
    out, whole = down(x, (2, 2), kept), down(x, (2, 2))
    by_place = down.shift.flatten().softmax(0).view(4, 4)
    torch.testing.assert_close(out[0, :, 0, 1], (x[0, :, :4, 4:] * by_place).sum((1, 2)))
    torch.testing.assert_close(out[:, :, :, 0], whole[:, :, :, 0])
    assert not torch.allclose(out[0, :, 0, 1], whole[0, :, 0, 1])


def test_in_training_some_cells_and_some_of_the_map_do_not_count() -> None:
    down = drawn(AttentionDownsampler(3, 2, blur=False, dropout=0.0))
    x = torch.randn(1, 3, 80, 80)
    assert torch.equal(down(x, (40, 40)), down(x, (40, 40)))
    down.train()
    dropped = (down(x, (40, 40)) != down.eval()(x, (40, 40))).any(1).float().mean()
    assert abs(float(dropped) - LOGIT_DROPOUT) < 0.05
    down.dropout.p = 0.5
    scores = down.train().scores(torch.ones(1, 3, 30, 30))
    assert len(scores.unique()) > 2
    assert len(down.eval().scores(torch.ones(1, 3, 30, 30)).unique()) == 1


def test_one_kernel_is_a_strided_convolution() -> None:
    down = drawn(KernelDownsampler(4))
    x = torch.randn(2, 3, 13, 16)
    assert float(down.kernel().sum()) == pytest.approx(1)
    expected = F.conv2d(x.flatten(0, 1)[:, None], down.weights.abs()[None, None], stride=3)
    expected = expected[..., :4, :5].view(2, 3, 4, 5) / down.weights.abs().sum()
    torch.testing.assert_close(down(x, (4, 5)), expected)
    assert down.scores(x).shape == (2, 0, 13, 16)


@pytest.mark.parametrize(
    ("size", "grid"), [((3, 9), (1, 2)), ((3, 9), (1, 1)), ((8, 8), (7, 2)), ((8, 5), (2, 3))]
)
def test_windows_without_room_are_refused(size: tuple[int, int], grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{grid[0]}x{grid[1]} windows of 4x4 .* {size[0]}x{size[1]}"):
        KernelDownsampler(4)(torch.zeros(1, 1, *size), grid)


def test_settings_build_what_they_say() -> None:
    assert build_downsampler(DownsamplerConfig(), 8, 14).kernel_size == 14
    built = build_downsampler(DownsamplerConfig(kernel=7, blur=False, dropout=0.4), 8, 14)
    assert isinstance(built, AttentionDownsampler)
    assert (built.kernel_size, built.blur, built.dropout.p) == (7, False, 0.4)
    assert isinstance(build_downsampler(DownsamplerConfig(kind="kernel"), 8, 14), KernelDownsampler)
    new = build_downsampler(DownsamplerConfig(), 8, 14)
    assert abs(float(new.scale.mean()) - 1) < 0.01 > abs(float(new.shift.mean()))
    assert 0.005 < float(new.scale.std()) < 0.015
