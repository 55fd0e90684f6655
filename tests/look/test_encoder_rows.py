"""Rows of an encoder's self-attention against the softmax of queries and keys worked out from its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from systems_to_see import PIIP, PLAIN, SYSTEMS, Build, Built, Draw

from stepwell.look.encoder_rows import cell_at, encoder_rows
from stepwell.look.subject import Subject, holds, subject
from stepwell.models.plain import PlainConfig
from stepwell.structures import View


def inputs_of(network: Any, subject: Subject) -> list[torch.Tensor]:
    """What goes into the attention of a layer in one pass."""
    seen: list[torch.Tensor] = []
    handle = network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    subject.look()
    handle.remove()
    return seen


def rows_by_hand(attention: Any, tokens: torch.Tensor, index: int) -> torch.Tensor:
    """(N, C) -> (h, N)."""
    with torch.no_grad():
        q, k, _ = attention.qkv(tokens).chunk(3, -1)
        q, k = (x.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for x in (q, k))
    return torch.softmax(q[:, index] @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1).diagonal().T


@pytest.mark.parametrize("layer", [0, 1, None])
def test_rows_of_both_branches_are_the_softmax_of_their_queries_and_keys(
    build: Build, draw: Draw, layer: int | None
) -> None:
    seen = subject(build(PIIP), draw(90, 60))
    found = encoder_rows(seen, (30.0, 45.0), layer=layer)
    assert [row.view for row in found] == list(seen.views)
    for encoder, row in zip(seen.encoders, found, strict=True):
        assert row.layer == (1 if layer is None else layer)
        grid = row.row.shape[1:]
        assert row.cell == (int(45 / 60 * grid[0]), int(30 / 90 * grid[1]))
        attention = encoder.blocks[row.layer].attn  # type: ignore[attr-defined]
        (tokens,) = inputs_of(attention, seen)
        expected = rows_by_hand(attention, tokens[0], row.cell[0] * grid[1] + row.cell[1])
        torch.testing.assert_close(row.row.flatten(1), expected)
        torch.testing.assert_close(row.row.sum((1, 2)), torch.ones(len(row.row)))


def test_a_class_token_takes_its_share_and_has_no_cell(build: Build, draw: Draw) -> None:
    seen = subject(build(replace(PLAIN, arguments={"class_token": True})), draw(64, 64))
    (row,) = encoder_rows(seen, (40.0, 20.0))
    attention = seen.encoders[0].blocks[row.layer].attn  # type: ignore[attr-defined]
    (tokens,) = inputs_of(attention, seen)
    expected = rows_by_hand(attention, tokens[0], 1 + 1 * 4 + 2)
    torch.testing.assert_close(row.row.flatten(1), expected[:, 1:])
    assert (row.row.sum((1, 2)) < 1).all()


def test_networks_of_timm_are_looked_into_alike(build: Build, draw: Draw) -> None:
    pytest.importorskip("timm")
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    timm = PlainConfig(encoder="timm:vit_tiny_patch16_224", size=64, framing="pad", arguments=small)
    seen = subject(build(timm), draw(64, 64))
    (row,) = encoder_rows(seen, (40.0, 20.0))
    assert row.layer == 0  # the second to last hidden state is read, and no layer behind it runs
    attention = seen.encoders[0].network.blocks[0].attn  # type: ignore[attr-defined]
    (tokens,) = inputs_of(attention, seen)
    torch.testing.assert_close(row.row.flatten(1), rows_by_hand(attention, tokens[0], 1 + 1 * 4 + 2)[:, 1:])


def test_windowed_rows_stay_in_their_window(build: Build, draw: Draw) -> None:
    """Windows of 3 x 3 over 4 x 4 cells: the second of each row of windows is cut off."""
    seen = subject(build(replace(PLAIN, arguments={"windows": 3})), draw(64, 64))
    (row,) = encoder_rows(seen, (60.0, 20.0), layer=0)
    assert row.cell == (1, 3)
    attention = seen.encoders[0].blocks[0].attn  # type: ignore[attr-defined]
    (tokens,) = inputs_of(attention, seen)
    padded = torch.zeros(6, 6, tokens.shape[-1])
    padded[:4, :4] = tokens[0].unflatten(0, (4, 4))
    expected = rows_by_hand(attention, padded[:3, 3:].flatten(0, 1), 3).unflatten(1, (3, 3))
    torch.testing.assert_close(row.row[:, :3, 3], expected[:, :, 0])
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[:3, 3] = True
    assert (row.row[:, ~inside] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in SYSTEMS if kind != "dropped"])
def test_every_view_that_shows_the_point_has_its_own_row(built: Built, draw: Draw, kind: str) -> None:
    """Each view through the encoder by itself, where none hears of another, gives the row that it had among
    all.
    """
    seen, point = subject(built(kind), draw(150, 80)), (100.0, 30.0)
    found = encoder_rows(seen, point)
    transformers = [
        i
        for one, order in zip(seen.encoders, seen.order, strict=True)
        for i in order
        if hasattr(one, "blocks")
    ]
    shown = [seen.views[i] for i in sorted(transformers) if holds(seen.views[i], point)]
    assert [row.view for row in found] == shown
    for row in found:
        torch.testing.assert_close(row.row.sum((1, 2)), torch.ones(len(row.row)), atol=1e-3, rtol=0)
    if kind in ("piip", "llava_hr"):
        return
    (encoder,) = seen.encoders
    numbers = [i for i in sorted(transformers) if holds(seen.views[i], point)]
    for number, row in zip(numbers, found, strict=True):
        tokens: list[torch.Tensor] = []
        attention = encoder.blocks[row.layer].attn  # type: ignore[attr-defined]
        handle = attention.register_forward_pre_hook(lambda _, args, to=tokens: to.append(args[0]))
        with torch.no_grad():
            encoder.run(encoder.stem(seen.tensors[number][None]), 0, row.layer)
        handle.remove()
        index = row.cell[0] * row.row.shape[2] + row.cell[1]
        in_front = tokens[0].shape[1] - row.row[0].numel()
        expected = rows_by_hand(attention, tokens[0][0], in_front + index)[:, in_front:]
        torch.testing.assert_close(row.row.flatten(1), expected, atol=1e-5, rtol=1e-4)


def test_a_point_on_the_far_edge_is_in_the_last_cell() -> None:
    view = View(name="one", size=(32, 64), box=(0, 0, 64, 32), grid=(2, 4))
    assert cell_at(view, (64.0, 32.0), view.grid) == (1, 3)
    assert cell_at(view, (0.0, 0.0), view.grid) == (0, 0)


def test_hooks_are_gone_afterwards(build: Build, draw: Draw) -> None:
    seen = subject(build(PIIP), draw(90, 60))
    encoder_rows(seen, (30.0, 45.0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in seen.network.modules())


def test_a_layer_that_is_not_there_is_refused(build: Build, draw: Draw) -> None:
    with pytest.raises(ValueError, match="layer 7 is none that a vision transformer of the model runs"):
        encoder_rows(subject(build(PIIP), draw(90, 60)), (30.0, 45.0), layer=7)
