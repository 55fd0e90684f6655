"""Visual tokens stand where the placeholders are; tests/parity/test_verify.py has the official splice."""

from __future__ import annotations

import pytest
import torch

from stepwell.language.splice import place_visual_tokens

IMAGE = 9
IDS = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, 3, 4, 5]])


def test_visual_tokens_fill_placeholders_in_reading_order() -> None:
    embeds, visual = torch.randn(2, 4, 3), torch.randn(3, 3)
    placed = place_visual_tokens(IDS, embeds, visual, IMAGE)
    assert torch.equal(placed[IDS == IMAGE], visual)
    assert torch.equal(placed[IDS != IMAGE], embeds[IDS != IMAGE])


def test_gradients_reach_visual_tokens_and_text_but_not_placeholders() -> None:
    embeds, visual = torch.randn(2, 4, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    place_visual_tokens(IDS, embeds, visual, IMAGE).sum().backward()
    assert visual.grad is not None
    assert embeds.grad is not None
    assert torch.equal(visual.grad, torch.ones(3, 3))
    assert torch.equal(embeds.grad[..., 0], (IDS != IMAGE).float())


def test_visual_tokens_take_the_dtype_of_the_text() -> None:
    placed = place_visual_tokens(IDS, torch.zeros(2, 4, 3, dtype=torch.bfloat16), torch.ones(3, 3), IMAGE)
    assert placed.dtype == torch.bfloat16
    assert placed[0, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [2, 4])
def test_numbers_that_differ_are_both_named(count: int) -> None:
    with pytest.raises(ValueError, match=f"3 image placeholder tokens, .* {count} visual tokens"):
        place_visual_tokens(IDS, torch.zeros(2, 4, 3), torch.ones(count, 3), IMAGE)


def test_placeholders_without_a_image_are_refused_and_text_alone_is_left_alone() -> None:
    embeds = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="3 image placeholder tokens, the images give 0 visual tokens"):
        place_visual_tokens(IDS, embeds, None, IMAGE)
    assert place_visual_tokens(torch.ones(2, 4, dtype=torch.long), embeds, None, IMAGE) is embeds


def test_the_splice_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(place_visual_tokens, fullgraph=True, backend="aot_eager")
    embeds, visual = torch.randn(2, 4, 3), torch.randn(3, 3)
    expected = place_visual_tokens(IDS, embeds, visual, IMAGE)
    assert torch.equal(compiled(IDS, embeds, visual, IMAGE), expected)
