"""Which frequencies a map holds: its Fourier amplitude, and the mean of that over circles.

PIIP, arXiv 2501.07783, figure 9: branches on small views carry low frequencies, those on large views high
ones. Amplitudes are logarithms, relative to that of frequency zero. Letters: C width, (H, W) a grid, K rings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spectrum", "spectrum"]

LEAST = 1e-6
"""Added to amplitudes, so that one of zero has a logarithm."""


class Spectrum(NamedTuple):
    """Of one map."""

    amplitude: Tensor  # (H, W): logarithms; 0 at frequency zero, at row H // 2 and column W // 2
    frequencies: Tensor  # (K,): of rings, from 0 to 0.5 cycles for a cell (pi, the finest there is)
    radial: Tensor  # (K,): means of `amplitude` over rings; NaN where no frequency lies in one


def spectrum(map: Tensor) -> Spectrum:
    """map (C, H, W), or (H, W). The logarithm of each channel's amplitude, mean over channels.

    A ring holds the frequencies that are nearest to its own; those past 0.5 cycles, in the corners, are in
    none. Raises ValueError for anything but one map.
    """
    if map.ndim not in (2, 3) or not map.numel():
        raise ValueError(f"a spectrum is of one map (C, H, W), got {tuple(map.shape)}")
    values = map.detach().double().cpu()
    channels = values[None] if values.ndim == 2 else values
    logs = (torch.fft.fft2(channels).abs() + LEAST).log().mean(0)
    amplitude = torch.fft.fftshift(logs - logs[0, 0])
    down, across = (torch.fft.fftshift(torch.fft.fftfreq(n, dtype=torch.float64)) for n in amplitude.shape)
    count = max(min(amplitude.shape) // 2, 1) + 1
    frequencies = torch.linspace(0, 0.5, count, dtype=torch.float64)
    ring = ((down[:, None] ** 2 + across**2).sqrt() * 2 * (count - 1)).round().long()
    is_in = ring < count
    sums, numbers = (
        torch.zeros(count, dtype=torch.float64).index_add_(0, ring[is_in], x[is_in])
        for x in (amplitude, torch.ones_like(amplitude))
    )
    return Spectrum(amplitude.float(), frequencies.float(), (sums / numbers).float())
