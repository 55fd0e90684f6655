"""Probabilities and attention of an answer against transformers, on both engines; boxes of the reader."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from systems_to_see import PIIP, PLAIN, SYSTEMS, Build, Built, Draw, Lighten

from stepwell.look.read_from import read_from, told
from stepwell.look.trace import Traced, ask_and_trace, trace
from stepwell.models.ask import Assistant
from stepwell.models.engine import padded
from stepwell.structures import TokenLayout, TokenRun
from stepwell.weights.light import load_to_ask

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "Which company?"


def test_probabilities_are_those_that_generate_scores(build: Build, draw: Draw) -> None:
    assistant, image = build(PIIP), draw(90, 60)
    answer, traced = ask_and_trace(assistant, image, QUESTION, max_new_tokens=6)
    features = assistant.encode(image)
    prompts = padded(assistant.engine, [assistant.prompt(QUESTION, [features.layout])], features.tokens)
    made = assistant.engine.generate(  # type: ignore[attr-defined]
        prompts, max_new_tokens=6, output_scores=True, return_dict_in_generate=True
    )
    assert traced.ids == tuple(made.sequences[0].tolist())
    expected = [float(scores[0].softmax(-1)[i]) for scores, i in zip(made.scores, traced.ids, strict=True)]
    torch.testing.assert_close(traced.probabilities, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert traced.confidence == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert answer == assistant.ask(image, QUESTION, max_new_tokens=6)
    assert "".join(traced.tokens).strip() == answer


def test_a_placeholder_is_no_answer_and_takes_no_probability(build: Build, draw: Draw) -> None:
    """Its row of the head is that of the first token of the answer, so both have the same score."""
    assistant, image = build(PIIP), draw(90, 60)
    _, before = ask_and_trace(assistant, image, QUESTION, max_new_tokens=1)
    head, placeholder = assistant.model.lm_head.weight, assistant.engine.image_token_id
    with torch.no_grad():
        head[placeholder] = head[before.ids[0]]
    _, after = ask_and_trace(assistant, image, QUESTION, max_new_tokens=1)
    assert after.ids == before.ids
    torch.testing.assert_close(after.probabilities, before.probabilities, atol=1e-3, rtol=1e-3)


def test_attention_is_what_transformers_gives_itself(build: Build, draw: Draw) -> None:
    """By its eager attention, which returns all weights."""
    assistant, image = build(PLAIN), draw(90, 60)
    features = assistant.encode(image)
    prompt, ids = assistant.prompt(QUESTION, [features.layout]), [70, 80, 90]
    found = {
        (layer, head): trace(assistant, [features], QUESTION, ids, heads="mean", layer=layer, head=head)
        for layer, head in ((None, None), (1, None), (None, 2), (0, 3))
    }
    model = assistant.model
    kept = model.config.text_config._attn_implementation
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        row = torch.tensor([[*prompt, *ids]])
        weights = model(
            inputs_embeds=model.model.embed(row, features.tokens), output_attentions=True
        ).attentions
    model.model.language_model.set_attn_implementation(kept)
    every = torch.stack([layer[0] for layer in weights])  # (layers, heads, L, L)
    visual = (row[0] == assistant.engine.image_token_id).nonzero()[:, 0]
    rows = every[:, :, len(prompt) - 1 : len(prompt) + 2][..., visual]
    for (layer, head), traced in found.items():
        layers = rows if layer is None else rows[layer : layer + 1]
        heads = layers if head is None else layers[:, head : head + 1]
        assert traced.attention is not None
        torch.testing.assert_close(traced.attention, heads.mean((0, 1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["piip", "uhd_v2"])
def test_both_engines_trace_alike(build: Build, draw: Draw, lightened: Lighten, kind: str) -> None:
    assistant, image = build(SYSTEMS[kind]), draw(90, 60)
    light = lightened(assistant)
    for options in ({}, {"layer": 1, "head": 3, "heads": "mean"}):
        ours, theirs = (
            ask_and_trace(one, image, QUESTION, max_new_tokens=5, **options)[1]  # type: ignore[arg-type]
            for one in (light, assistant)
        )
        assert (ours.ids, ours.tokens, ours.head) == (theirs.ids, theirs.tokens, theirs.head)
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.attention, theirs.attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SYSTEMS)
def test_of_every_system_an_answer_has_a_place(built: Built, draw: Draw, kind: str) -> None:
    image = draw(150, 80)
    _, traced = ask_and_trace(built(kind), image, QUESTION, max_new_tokens=3)
    source = read_from(traced)
    assert source is not None
    for left, top, right, bottom in (source.box, *filter(None, source.boxes)):
        assert 0 <= left < right <= 150 + 1e-3
        assert 0 <= top < bottom <= 80 + 1e-3
    where = told(traced, source)["where"]
    assert len(where["tokens"]) == len(traced.ids)


def test_a_region_and_several_images_are_traced_too(build: Build, draw: Draw) -> None:
    assistant = build(PIIP)
    region = (100, 100, 160, 140)
    _, traced = ask_and_trace(assistant, draw(300, 200), QUESTION, region=region, max_new_tokens=3)
    source, cut = read_from(traced), traced.layouts[0].cut
    assert source is not None
    assert cut is not None
    assert cut[0] - 1 <= source.box[0] < source.box[2] <= cut[2] + 1
    _, of_two = ask_and_trace(assistant, [draw(90, 60), draw(60, 90, 1)], QUESTION, max_new_tokens=3)
    assert of_two.attention is not None
    assert of_two.attention.shape[1] == sum(layout.num_visual for layout in of_two.layouts)


def test_the_image_that_most_is_taken_of_is_told() -> None:
    from stepwell.structures import TokenGrid

    layout = TokenLayout(
        image_size=(10, 20),
        inputs=(),
        views=(),
        runs=(TokenRun(count=2),),
        grids=(TokenGrid.over((0, 0, 20, 10), (1, 2)),),
    )
    attention = torch.tensor([[0.1, 0.0, 0.0, 0.6], [0.9, 0.9, 0.0, 0.0]])
    traced = Traced((5, 3), ("a", ""), torch.tensor([0.5, 1.0]), attention, None, (layout, layout))
    source = read_from(traced)
    assert source is not None
    assert (source.image, source.box) == (1, (10, 0, 20, 10))  # the token that ends an answer is left aside
    assert source.boxes == ((10, 0, 20, 10), None)
    assert told(traced, source)["where"]["head"] == "mean"
    assert read_from(traced._replace(attention=None)) is None


def test_what_is_not_there_is_refused(build: Build, draw: Draw) -> None:
    assistant, features = build(PLAIN), build(PLAIN).encode(draw(60, 60))
    for options, complaint in (
        ({"layer": 2}, "layer 2 of the language model's 2"),
        ({"head": 4}, "head 4 of the language model's 4"),
    ):
        with pytest.raises(ValueError, match=complaint):
            trace(assistant, [features], QUESTION, [70, 80], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one token at least"):
        trace(assistant, [features], QUESTION, [])


@pytest.fixture(scope="module")
def reader() -> Assistant:
    assistant: Assistant = load_to_ask(None, device="cpu")
    return assistant


@pytest.mark.slow
def test_the_shipped_reader_points_at_the_line_that_it_reads(reader: Assistant) -> None:
    """The first line of the drawn page: 20 to 345 pixels from the left, 42 to 60 from the top."""
    answer, traced = ask_and_trace(
        reader, EXAMPLES / "drawn_page.png", "Which company issued this receipt?", max_new_tokens=32
    )
    assert answer == "IP KAIYONG PHARMACY"
    source = read_from(traced)
    assert source is not None
    left, top, right, bottom = source.box
    assert 5 <= left < right <= 350  # cells are 11 pixels wide
    assert 30 <= top < bottom <= 72
    middles = [(box[0] + box[2]) / 2 for box in source.boxes if box is not None]
    rising = sum(a < b for a, b in pairwise(middles))
    assert rising >= 0.7 * (len(middles) - 1)  # character after character, to the right
