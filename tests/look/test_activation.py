"""A word against levels and visual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from systems_to_see import PIIP, SYSTEMS, Build, Built, Draw

from stepwell.look.activation import activations, similarity, word_ids
from stepwell.look.subject import subject

WITH_LEVELS = ("piip", "pyramid_shared", "uhd_v1", "uhd_v2", "dropped")


def test_a_token_that_is_the_word_is_alike_wholly() -> None:
    cells = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0]])
    torch.testing.assert_close(similarity(cells, torch.tensor([0.6, 0.8])), torch.tensor([1.0, -1, 0]))


@pytest.mark.parametrize("kind", SYSTEMS)
def test_visual_tokens_lie_on_their_grids(built: Built, draw: Draw, kind: str) -> None:
    assistant, image = built(kind), draw(150, 80)
    found = activations(subject(assistant, image), "total")
    features = assistant.encode(image)
    ids = assistant.engine.tokenizer("total", add_special_tokens=False)["input_ids"]
    embedding = assistant.model.get_input_embeddings().weight[ids].mean(0)
    of_tokens = [one for one in found if one.name == "visual tokens"]
    assert [one.box for one in of_tokens] == [grid.box for grid in features.layout.grids]
    for one, grid in zip(of_tokens, features.layout.grids, strict=True):
        for row, tokens in enumerate(grid.rows):
            for col, token in enumerate(tokens):
                value = one.map[row, col]
                if token < 0:
                    assert torch.isnan(value)
                else:
                    expected = torch.cosine_similarity(features.tokens[token], embedding, dim=0)
                    torch.testing.assert_close(value, expected.detach())
    levels = len(found) - len(of_tokens)
    assert levels == (
        len(features.maps) if kind in ("piip", "pyramid_shared", "uhd_v1", "uhd_v2", "dropped") else 0
    )


def test_branches_of_a_pyramid_are_compared_behind_their_stacks(build: Build, draw: Draw) -> None:
    assistant, image = build(PIIP), draw(90, 60)
    seen = subject(assistant, image)
    found = activations(seen, "a", question="a total")
    ids = word_ids(assistant.engine, "a", question="a total")
    embedding = assistant.model.get_input_embeddings().weight[ids].mean(0)
    for number, one in enumerate(assistant.encode(image).maps):
        with torch.no_grad():
            cells = seen.network.projector.stacks[number](one.map.flatten(1).T[None])[0]  # type: ignore
        expected = torch.cosine_similarity(cells, embedding[None], dim=1).view(one.map.shape[1:])
        torch.testing.assert_close(found[number].map, expected.detach(), atol=1e-5, rtol=1e-4)


def test_levels_of_slices_are_compared_behind_the_projection_of_each(build: Build, draw: Draw) -> None:
    assistant, image = build(SYSTEMS["uhd_v2"]), draw(150, 80)
    seen = subject(assistant, image)
    windows: Any = seen.network.projector
    for projection in windows.projections:
        torch.nn.init.normal_(projection.weight)  # each level its own
    found = activations(seen, "a")
    embedding = assistant.model.get_input_embeddings().weight[word_ids(assistant.engine, "a")].mean(0)
    maps = assistant.encode(image).maps
    assert len(maps) == 3 * len(seen.views)
    for number, one in enumerate(maps):
        with torch.no_grad():
            cells = windows.norm(windows.projections[number % 3](one.map.movedim(0, -1)))
        expected = torch.cosine_similarity(cells, embedding, dim=-1)
        torch.testing.assert_close(found[number].map, expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_word_is_found_where_it_stands_and_otherwise_refused(build: Build) -> None:
    engine = build(PIIP).engine
    tokenizer = engine.tokenizer
    ids = word_ids(engine, "total", question="How much is the total?")
    assert tokenizer.decode(ids).strip() == "total"
    assert len(ids) < len(tokenizer("How much is the total?")["input_ids"])
    with pytest.raises(ValueError, match="the question has no 'Total'"):
        word_ids(engine, "Total", question="How much is the total?")
    with pytest.raises(ValueError, match="the token is empty"):
        word_ids(engine, " ")
