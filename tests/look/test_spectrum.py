"""Spectra against numpy's transform and waves that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepwell.look.spectrum import LEAST, spectrum


def wave(rows: int, cols: int, down: int, across: int) -> torch.Tensor:
    """(rows, cols): a constant and a wave of so many periods each way."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return 1 + torch.cos(2 * torch.pi * (down * y / rows + across * x / cols)).double()


def test_amplitudes_are_those_of_numpy() -> None:
    map = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    logs = np.log(np.abs(np.fft.fft2(map.double().numpy())) + LEAST).mean(0)
    expected = np.fft.fftshift(logs - logs[0, 0])
    np.testing.assert_allclose(spectrum(map).amplitude, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "cols", "down", "across"), [(16, 16, 4, 0), (16, 32, 0, 12), (24, 16, 6, 4)]
)
def test_a_wave_peaks_at_its_frequency(rows: int, cols: int, down: int, across: int) -> None:
    found = spectrum(wave(rows, cols, down, across))
    amplitude = found.amplitude.clone()
    assert amplitude[rows // 2, cols // 2] == 0
    amplitude[rows // 2, cols // 2] = -torch.inf
    peak = divmod(int(amplitude.argmax()), cols)
    assert {peak} <= {
        (rows // 2 + down, cols // 2 + across),
        (rows // 2 - down, cols // 2 - across),
    }


def test_rings_are_means_of_what_lies_in_them_and_leave_the_corners_out() -> None:
    found = spectrum(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert found.frequencies.tolist() == [0.0, 0.25, 0.5]
    # Frequencies of rows and columns: -0.5, -0.25, 0, 0.25; in the last ring radii from 0.375 to 0.625.
    side = np.array([-0.5, -0.25, 0.0, 0.25])
    radius = np.hypot(side[:, None], side)
    for frequency, mean in zip(found.frequencies.tolist(), found.radial.tolist(), strict=True):
        inside = np.abs(radius - frequency) < 0.125
        assert mean == pytest.approx(float(found.amplitude.numpy()[inside].mean()), abs=1e-5)


def test_what_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one map \(C, H, W\), got \(1, 2, 3, 4\)"):
        spectrum(torch.zeros(1, 2, 3, 4))
