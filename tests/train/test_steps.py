"""A training step is a module's forward: whatever its batches are cut into, it is the same step."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stepwell.language.labels import IGNORE
from stepwell.reader.task import ReaderTask
from stepwell.train.chat import ChatTask, language_loss
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture
from stepwell.train.stage_trainer import StageTrainer

SGD = "{name: sgd, lr: 0.5, weight_decay: 0.0}"
ONE_STEP = ["bf16=false", "stages.answer.steps=1", f"stages.answer.optimiser={SGD}", "workers=0"]


def trainer_of(folder, *overrides, stage=1, recipe="reader_smoke"):
    settings = load_recipe(recipe, [f"output={folder}", *overrides])
    task = ReaderTask(settings, settings.stages[stage])
    torch.manual_seed(0)
    return StageTrainer(task.build(), task, settings, mixture(task, seed=0), folder, seed=0)


def after_a_step(trainer):
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.fixture
def talk(tmp_path):
    """Data whose answers are of very different lengths, with images and without."""

    def entry(i, answer, image=True):
        question = {"from": "human", "value": f"{'<image>' if image else ''}What is it?"}
        entry = {"conversations": [question, {"from": "gpt", "value": answer}]}
        if image:
            Image.new("RGB", (64, 32 + 8 * i), (60 * i, 10, 200)).save(tmp_path / f"{i}.png")
        return entry | ({"image": f"{i}.png"} if image else {})

    answers = ("A", "A LONG ANSWER OF SOME WORDS", "NO", "A CAT ON A MAT")
    (tmp_path / "talk.json").write_text(json.dumps([entry(i, answer) for i, answer in enumerate(answers)]))
    (tmp_path / "text.json").write_text(json.dumps([entry(0, "FOUR", image=False)]))
    return lambda name: json.dumps([{"kind": "conversations", "path": str(tmp_path / f"{name}.json")}])


@pytest.mark.parametrize("averaging", ["tokens", "square"])
def test_accumulated_batches_are_the_step_of_one_large_batch(tmp_path, talk, averaging):
    data = ["stages.answer.losses={language: 1.0}", f"stages.answer.data={talk('talk')}"]
    data.append(f"stages.answer.averaging={averaging}")
    split = ["stages.answer.batch=1", "stages.answer.accumulate=4"]
    one = after_a_step(trainer_of(tmp_path / "one", *ONE_STEP, *data, "stages.answer.batch=4"))
    four = after_a_step(trainer_of(tmp_path / "four", *ONE_STEP, *data, *split))
    start = dict(trainer_of(tmp_path / "start", *ONE_STEP, *data).model.named_parameters())
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)
    for name, weights in one.items():
        torch.testing.assert_close(four[name], weights, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("averaging", ["tokens", "square"])
def test_losses_of_several_kinds_are_each_weighed_by_what_they_count(tmp_path, averaging):
    """Pages have unlike numbers of lines, and some lines have no pointers."""
    step = [*ONE_STEP, f"stages.answer.averaging={averaging}"]
    split = ["stages.answer.batch=1", "stages.answer.accumulate=3"]
    one = after_a_step(trainer_of(tmp_path / "one", *step, "stages.answer.batch=3"))
    three = after_a_step(trainer_of(tmp_path / "three", *step, *split))
    for name, weights in one.items():
        torch.testing.assert_close(three[name], weights, rtol=1e-3, atol=1e-5, msg=name)


def test_a_stage_weighs_its_samples_as_it_says(tmp_path, talk):
    """And a step is a mean over the weights of all its batches, whole numbers or not."""
    data = ["stages.answer.losses={language: 1.0}", f"stages.answer.data={talk('talk')}"]
    split = ["stages.answer.batch=2", "stages.answer.accumulate=2", "stages.answer.averaging=square"]
    trainer = trainer_of(tmp_path, *ONE_STEP, *data, *split)
    batches, counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    lengths = torch.cat([(batch["labels"] != IGNORE).sum(1) for batch in batches])
    assert counts["language"] == pytest.approx(float(lengths.sqrt().sum()))
    weights = torch.cat([batch["weights"].max(1).values for batch in batches])
    torch.testing.assert_close(weights, lengths**-0.5)


def test_a_stage_draws_evenly_where_it_says_so(tmp_path, talk):
    entries = [{**json.loads(talk(name))[0], "weight": weight} for name, weight in (("talk", 2), ("text", 1))]
    even = ["stages.answer.even=true", "stages.answer.batch=3", "stages.answer.steps=20"]
    trainer = trainer_of(tmp_path, *ONE_STEP, f"stages.answer.data={json.dumps(entries)}", *even)
    sources = [number for number, _ in trainer.train_dataset.places()]
    assert all(sorted(sources[i : i + 3]) == [0, 0, 1] for i in range(0, 60, 3))


@pytest.mark.parametrize("processes", [1, 3])
def test_a_process_weighs_its_share_so_that_the_mean_of_all_is_the_step(tmp_path, monkeypatch, processes):
    """Gradients are averaged over processes; each counts what all of them have."""
    trainer = trainer_of(tmp_path, *ONE_STEP, "stages.answer.losses={language: 2.0, frames: 0.5}")
    monkeypatch.setattr(type(trainer.args), "world_size", processes)
    trainer.current_gradient_accumulation_steps = 4
    batch = trainer.task.collate([trainer.train_dataset[0].sample])
    here, losses = trainer.task.counts(batch), trainer.model(**batch)
    counts = {name: torch.tensor(10 * int(count)) for name, count in here.items()}
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    torch.testing.assert_close(loss, 4 * processes * (2.0 * losses["language"] + 0.5 * losses["frames"]) / 10)


def test_losses_are_logged_as_means_over_what_they_count(tmp_path, talk):
    data = ["stages.answer.losses={language: 1.0}", f"stages.answer.data={talk('talk')}"]
    logged = []
    for split in (["stages.answer.batch=4"], ["stages.answer.batch=1", "stages.answer.accumulate=4"]):
        trainer = trainer_of(tmp_path / str(len(logged)), *ONE_STEP, *data, *split)
        trainer.train()
        logged.append(trainer.state.log_history[0])
        assert logged[-1]["loss_language"] == pytest.approx(logged[-1]["loss"], abs=2e-4)
    for name in ("loss", "loss_language"):
        assert logged[1][name] == pytest.approx(logged[0][name], abs=2e-4)


@pytest.mark.parametrize("parts", ["[projector]", "[vision]", "[vision, projector]", "[language]"])
@pytest.mark.parametrize("losses", ["{language: 1.0}", "{frames: 1.0}", "{pointer: 1.0}"])
def test_a_batch_without_an_image_is_trained_whatever_learns(tmp_path, talk, parts, losses):
    data = [f"stages.answer.data={talk('text')}", f"stages.answer.train={parts}"]
    rates = f"stages.answer.losses={losses}"
    trainer = trainer_of(tmp_path / "run", *ONE_STEP, *data, rates, "stages.answer.batch=1")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    after = after_a_step(trainer)
    moved = any(not torch.equal(before[name], after[name]) for name in after)
    assert moved == (parts == "[language]" and losses == "{language: 1.0}")
    assert all(weights.isfinite().all() for weights in after.values())


def test_a_mixed_batch_is_trained_by_a_chat_too(tmp_path, talk):
    settings = load_recipe("reader_smoke", ["bf16=false", "workers=0"])
    entries = [json.loads(talk(name))[0] for name in ("talk", "text")]
    fields = settings.stages[1].model_dump(include={"name", "train", "schedule"})
    model = settings.model.model_dump(exclude={"start_looking"}, exclude_unset=True, mode="json")
    tokenizer = ReaderTask(settings, settings.stages[1]).processor.tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = {
        "task": "chat",
        "name": "mixed",
        "bf16": False,
        "workers": 0,
        "output": str(tmp_path),
        "model": {**model, "tokenizer": str(tmp_path / "tokenizer")},
        "stages": [{**fields, "steps": 2, "batch": 2, "train": ["projector"], "data": entries}],
    }
    for data in (entries, entries[1:]):
        recipe["stages"][0]["data"] = data
        (tmp_path / "mixed.yaml").write_text(json.dumps(recipe))
        chat = load_recipe(tmp_path / "mixed.yaml")
        task = ChatTask(chat, chat.stages[0])
        trainer = StageTrainer(task.build(), task, chat, mixture(task, seed=0), tmp_path / "run", seed=0)
        assert all(weights.isfinite().all() for weights in after_a_step(trainer).values())


def test_every_tensor_of_a_batch_moves_with_it(tmp_path):
    trainer = trainer_of(tmp_path, "bf16=false")
    batch = trainer.task.collate([trainer.train_dataset[i].sample for i in range(2)])
    trainer.args = SimpleNamespace(device=torch.device("meta"))
    found = tensors(trainer._prepare_input(batch))
    assert len(found) > 12
    assert {tensor.device.type for tensor in found} == {"meta"}


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_holds_in_a_stage_without_a_language_loss(tmp_path, bf16):
    trainer = trainer_of(tmp_path, f"bf16={bf16}", "stages.look.steps=1", "workers=0", stage=0)
    kinds = set()
    linear = next(m for n, m in trainer.model.named_modules() if "vision" in n and isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    trainer.train()
    assert kinds == {torch.bfloat16 if bf16 else torch.float32}


def test_an_answer_of_no_tokens_costs_nothing(tmp_path):
    trainer = trainer_of(tmp_path, "bf16=false")
    batch = trainer.task.collate([trainer.train_dataset[0].sample])
    labels = torch.full_like(batch["labels"], IGNORE)
    inputs = {k: batch[k] for k in ("input_ids", "groups", "position_ids", "pixel_values", "image_sizes")}
    loss, _ = language_loss(super(type(trainer.model), trainer.model).forward, labels, **inputs)
    assert loss == 0


def test_eager_attention_looks_where_the_others_look(tmp_path):
    """A mask of true and false, which eager attention would add as ones and zeros."""
    trainer = trainer_of(tmp_path, "bf16=false", "stages.answer.losses={language: 1.0}")
    batch = trainer.task.collate([trainer.train_dataset[i].sample for i in range(2)])
    assert "attention_mask" not in batch  # as large as L x L, it is made where the model is
    assert batch["groups"].shape == batch["input_ids"].shape
    losses = []
    for kind in ("sdpa", "eager"):
        trainer.model.set_attn_implementation(kind)
        losses.append(trainer.model.eval()(**batch)["language"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
