"""Principal components against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepwell.look.components import colours, principal_components


@pytest.mark.parametrize("channels", [5, 60])  # fewer and more than there are cells
def test_components_are_those_of_the_singular_values(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(channels, *size, generator=generator) for size in ((4, 5), (3, 2))]
    cells = np.concatenate([map.double().flatten(1).numpy() for map in maps], 1).T
    cells -= cells.mean(0)
    left, values, axes = np.linalg.svd(cells, full_matrices=False)
    found = principal_components(maps)
    np.testing.assert_allclose(found.shares, (values**2 / (values**2).sum())[:3], rtol=1e-5)
    expected = (left * values)[:, :3].T
    expected *= np.sign(axes[:3][np.arange(3), np.abs(axes[:3]).argmax(1)])[:, None]
    given = np.concatenate([part.flatten(1).numpy() for part in found.parts], 1)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
    assert [part.shape for part in found.parts] == [(3, 4, 5), (3, 3, 2)]


def test_components_that_are_not_there_are_black_and_colours_share_one_scale() -> None:
    maps = [torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0, 4.0]]])]
    first, second = colours(principal_components(maps))
    torch.testing.assert_close(first, torch.tensor([[[0.0, 0, 0], [0.25, 0, 0]]]))
    torch.testing.assert_close(second, torch.tensor([[[0.5, 0, 0], [1.0, 0, 0]]]))


def test_maps_of_unequal_width_are_refused() -> None:
    with pytest.raises(ValueError, match="of one width"):
        principal_components([torch.zeros(3, 2, 2), torch.zeros(4, 2, 2)])
