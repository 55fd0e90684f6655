"""Rows of attention against torch's own: with values that are unit vectors its output is the rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepwell.look.attention_rows import Attended, SeeAttention


def unit_values(heads: int, keys: int) -> torch.Tensor:
    return torch.eye(keys).expand(1, heads, keys, keys)


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "added", "scale", "fewer keys", "wide mask"])
def test_rows_are_what_torch_takes_of_each_key(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 6, 8, generator=generator)
    key = torch.randn(1, 2 if case == "fewer keys" else 4, 6, 8, generator=generator)
    options: dict[str, object] = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.rand(1, 1, 6, 6, generator=generator) > 0.4},
        "added": {"attn_mask": torch.randn(4, 6, 6, generator=generator)},
        "wide mask": {"attn_mask": torch.tensor([True, True, False, True, True, False])[None]},
        "scale": {"scale": 2.0},
        "fewer keys": {"enable_gqa": True},
    }.get(case, {})  # type: ignore[assignment]
    if case == "mask":
        options["attn_mask"][..., 0] = True  # type: ignore[index]
    seen: list[Attended] = []
    with SeeAttention(seen.append):
        expected = F.scaled_dot_product_attention(
            query,
            key,
            unit_values(key.shape[1], 6),
            **options,  # type: ignore[arg-type]
        )
    rows = seen[0].rows([5, 2])
    torch.testing.assert_close(rows, expected[:, :, [5, 2]])
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 4, 2))


def test_half_precision_is_worked_out_in_single() -> None:
    query = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert Attended(query, query).rows([0]).dtype == torch.float32


def test_nothing_is_seen_outside_the_block_and_outputs_stay_as_they_are() -> None:
    query = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0))
    seen: list[Attended] = []
    with SeeAttention(seen.append):
        inside = F.scaled_dot_product_attention(query, query, query)
    outside = F.scaled_dot_product_attention(query, query, query)
    assert len(seen) == 1
    assert torch.equal(inside, outside)
