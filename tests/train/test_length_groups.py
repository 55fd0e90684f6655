"""Steps of samples that are alike: the order, the lengths it comes from, and a training that keeps to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from two_processes import run_in_two

from stepwell.data.conversations import Conversations
from stepwell.data.mixture import Mixture
from stepwell.data.resized import Resized
from stepwell.reader.tokenizer import build_reader_tokenizer
from stepwell.train.chat import ChatTask
from stepwell.train.length_groups import (
    even_chunks,
    length_groups,
    modality_groups,
    word_length,
    word_lengths,
)
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture, train
from stepwell.train.stage_trainer import StageTrainer

LENGTHS = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=60)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_chunks_are_dealt_to_the_shortest_that_is_not_full() -> None:
    """By hand: 9 | 7 | then 5 to the second, which is full at two; 1 to the first."""
    lengths = {3: 9, 0: 7, 2: 5, 1: 1}
    assert even_chunks([3, 0, 2, 1], [lengths[i] for i in range(4)], 2) == [[3, 1], [0, 2]]
    assert even_chunks([4, 3, 2, 1, 0], [1, 2, 3, 4, 5], 2) == [[4, 2, 0], [3, 1]]


@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_every_sample_is_drawn_once_and_steps_but_the_last_two_are_of_one_kind(
    lengths: list[int], batch: int, chunks: int, seed: int
) -> None:
    order = modality_groups(lengths, batch, chunks, seeded(seed))
    assert sorted(order) == list(range(len(lengths)))
    steps = [order[i : i + batch * chunks] for i in range(0, len(order), batch * chunks)]
    mixed = [i for i, step in enumerate(steps) if len({lengths[j] > 0 for j in step}) > 1]
    assert all(i >= len(steps) - 2 for i in mixed)
    assert order == modality_groups(lengths, batch, chunks, seeded(seed))


@given(st.lists(st.integers(1, 50), min_size=12, max_size=12))
def test_in_a_step_the_longest_come_first_and_batches_are_about_as_long(lengths: list[int]) -> None:
    order = length_groups(lengths, 3, 4, seeded())
    batches = [[lengths[i] for i in order[k : k + 3]] for k in range(0, 12, 3)]
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    assert sorted(batch[0] for batch in batches) == sorted(lengths)[-4:]


def test_texts_alone_are_dealt_by_their_lengths_and_officially_by_their_negative_ones() -> None:
    """All 8 samples are one step: the longest first is right, the shortest first is official."""
    lengths = [-10, -80, -20, -70, -30, -60, -40, -50]
    ours, official = (modality_groups(lengths, 2, 4, seeded(), official=way) for way in (False, True))
    assert [lengths[i] for i in ours[::2]] == [-80, -70, -60, -50]
    assert lengths[official[0]] == -10
    assert ours == modality_groups([-length for length in lengths], 2, 4, seeded())


def test_steps_of_either_kind_come_by_chance_and_the_last_ones_in_the_order_of_the_file() -> None:
    """10 with images and 10 without in steps of 4: two whole steps of each kind, and the two that are left of
    each in the order of the file.
    """
    lengths = [3, -3] * 10
    firsts = set()
    for seed in range(12):
        order = modality_groups(lengths, 2, 2, seeded(seed))
        firsts.add(tuple(lengths[order[i]] > 0 for i in (0, 4, 8, 12)))
        assert order[16:] == sorted(order[16:])
        assert [lengths[i] for i in order[16:]].count(3) == 2
    assert len(firsts) > 2


def test_another_seed_gives_another_order() -> None:
    lengths = [*range(1, 30), *range(-30, 0)]
    assert modality_groups(lengths, 2, 2, seeded(0)) != modality_groups(lengths, 2, 2, seeded(1))


def test_a_sample_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 2 has no length"):
        modality_groups([3, -4, 0], 1, 1, seeded())


# ---- lengths of what people have --------------------------------------------------------------------------


def entry(words: int, image: str | None = None) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": ("<image>\n" if image else "") + "what is this"},
        {"from": "gpt", "value": "word " * (words - 3 - bool(image))},
    ]
    return {"conversations": turns} | ({"image": image} if image else {})


def words_of(entry: dict[str, Any]) -> int:
    """As the official code counts."""
    count = sum(len(turn["value"].split()) for turn in entry["conversations"])
    return count if "image" in entry else -count


def test_lengths_are_words_and_no_image_is_opened() -> None:
    entries = [entry(9, "missing.jpg"), entry(12), entry(40, "none.png")]
    source = Conversations(entries)
    assert [word_length(source[i]) for i in range(3)] == list(map(words_of, entries)) == [9, -12, 40]


def test_lengths_of_a_mixture_are_those_of_what_it_draws() -> None:
    """Two sources, one of them resized, over more than an epoch; an entry that is none counts one word."""
    entries = [[entry(5 + i, "x.jpg") for i in range(4)], [entry(50 + i) for i in range(3)]]
    entries[0][2] = {"conversations": []}
    sources = [Conversations(entries[0]), Resized(Conversations(entries[1]), lambda size: size)]
    samples = Mixture(sources, [2, 1], length=30, prepare=word_length, seed=3)
    lengths, drawn = word_lengths(samples), [samples[i] for i in range(30)]
    for length, sample in zip(lengths, drawn, strict=True):
        assert length == (1 if sample.bad else sample.sample)
    assert {1, 5, 6, 8, -50, -51, -52} == set(lengths)


# ---- a training -------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two sources, of texts and of images with texts; two batches of two samples a step."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    for name, image, first in (("pictures", "a.png", 5), ("texts", None, 7)):
        entries = [entry(first + 2 * i, image) for i in range(9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    build_reader_tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {
        "task": "chat",
        "name": "grouped",
        "model": {
            "vision": {"kind": "plain", "encoder": "vit_nano", "size": 32, "arguments": {"depth": 2}},
            "text": {"model_type": "llama", **text},
            "tokenizer": str(tmp_path / "tokenizer"),
            "template": "chatml_direct",
        },
        "output": str(tmp_path / "runs"),
        "workers": 0,
        "bf16": False,
        "save_dtype": "float32",
        "stages": [
            {
                "name": "tune",
                "steps": 8,
                "batch": 2,
                "accumulate": 2,
                "sampling": "grouped",
                "data": [
                    {"kind": "conversations", "path": str(tmp_path / f"{name}.json")}
                    for name in ("pictures", "texts")
                ],
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "recipe.yaml"


def lengths_in_order(recipe: Path, batches: int) -> list[int]:
    settings = load_recipe(recipe)
    task = ChatTask(settings, settings.stages[0])
    samples = mixture(task, seed=settings.seed)
    order = task.order(samples, batches=batches, seed=settings.seed)
    assert order is not None
    return [word_lengths(samples)[i] for i in order]


WATCHED = """
import json, sys
from stepwell.train.run import train
from stepwell.train.stage_trainer import StageTrainer

out, recipe, *overrides = sys.argv[1:]
whole = StageTrainer.compute_loss


def told(self, model, inputs, *args, **kwargs):
    if model.training:
        shown = inputs.get("image_sizes")
        row = [self.state.global_step, len(inputs["input_ids"]), 0 if shown is None else len(shown)]
        with open(f"{out}.{self.args.process_index}", "a") as file:
            file.write(json.dumps(row) + chr(10))
    return whole(self, model, inputs, *args, **kwargs)


StageTrainer.compute_loss = told
train(recipe, overrides)
"""


def test_a_training_takes_them_in_that_order(recipe, monkeypatch, tmp_path):
    taken: list[int] = []
    whole = ChatTask.collate

    def told(self: ChatTask, samples: Any) -> Any:
        taken.extend(len(sample.row.ids) * (1 if sample.images else -1) for sample in samples)
        return whole(self, samples)

    monkeypatch.setattr(ChatTask, "collate", told)
    train(recipe)
    lengths = lengths_in_order(recipe, batches=2)
    assert [length > 0 for length in taken] == [length > 0 for length in lengths]
    texts = [(length, tokens) for length, tokens in zip(lengths, taken, strict=True) if length < 0]
    assert len({length for length, _ in texts}) == len(set(texts))  # as many tokens for as many words


def test_a_training_that_was_killed_goes_on_in_the_same_order(recipe, monkeypatch, tmp_path):
    through = train(recipe, ["save_steps=1", f"output={tmp_path}/through"])
    whole, left = StageTrainer.training_step, iter(range(7))

    def until_killed(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, ["save_steps=1", f"output={tmp_path}/killed"])
    resumed = train(recipe, ["save_steps=1", f"output={tmp_path}/killed"])
    one, other = (load_file(folder / "model.safetensors") for folder in (through, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    by_chance = train(recipe, ["stages.tune.sampling=random", f"output={tmp_path}/random"])
    other = load_file(by_chance / "model.safetensors")
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_take_a_step_of_one_kind(recipe, monkeypatch, tmp_path):
    """A step is four batches of two, two of either process; which hold images is as the order says."""
    run_in_two(WATCHED, tmp_path, str(tmp_path / "told"), str(recipe))
    monkeypatch.setenv("WORLD_SIZE", "2")
    lengths = lengths_in_order(recipe, batches=4)
    images = [sum(length > 0 for length in lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    for rank in range(2):
        told = [json.loads(line) for line in (tmp_path / f"told.{rank}").read_text().splitlines()]
        assert told == [[i // 2, 2, images[2 * i + rank]] for i in range(16)]


@pytest.mark.parametrize("sampling", ["grouped", "groupd"])
def test_a_reader_draws_by_chance_alone_and_slips_are_refused(sampling):
    with pytest.raises(ValueError, match=r"stages\.0\.sampling: Input should be 'random'"):
        load_recipe("reader_smoke", [f"stages.look.sampling={sampling}"])


def test_groups_are_of_one_epoch(recipe, tmp_path):
    settings = load_recipe(recipe, ["stages.tune.steps=null", "stages.tune.epochs=3"])
    task = ChatTask(settings, settings.stages[0])
    samples = mixture(task, seed=settings.seed)
    order = task.order(samples, batches=2, seed=settings.seed)
    assert order is not None
    assert sorted(order) == list(range(len(samples)))
    places = samples.places()
    for start in range(0, len(order) - samples.epoch + 1, samples.epoch):
        drawn = [places[i] for i in order[start : start + samples.epoch]]
        assert len(set(drawn)) == samples.epoch


def test_even_batches_are_not_made_anew(recipe: Path) -> None:
    weighed = [*(f"stages.tune.data.{number}.weight=1" for number in range(2)), "stages.tune.even=true"]
    with pytest.raises(ValueError, match="even batches would be made anew by sampling grouped: leave one"):
        load_recipe(recipe, weighed)
    load_recipe(recipe, [*weighed, "stages.tune.sampling=random"])
