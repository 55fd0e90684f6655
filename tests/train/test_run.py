"""A recipe from start to finish, in seconds."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.train.collate import Collator
from stepwell.train.groups import part_of
from stepwell.reader.line_head import LineHead
from stepwell.train.recipe import Auxiliary, Optimiser, load_recipe
from stepwell.train.run import StageTrainer, stage_losses, train
from stepwell.train.stages import build_model, build_optimiser, build_sources, rate_at, resized


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, train("reader_smoke", [f"output={folder}", "bf16=false"])


def test_a_trained_folder_answers(finished):
    _, folder = finished
    model = StepwellForConditionalGeneration.from_pretrained(folder)
    assistant = Assistant(model, StepwellProcessor.from_pretrained(folder))
    assert model.dtype == torch.float32
    assert isinstance(assistant.ask(Image.new("RGB", (90, 60)), "What?", max_new_tokens=3), str)


def test_training_only_heads_stay_out_of_the_model(finished):
    runs, folder = finished
    assert not any("line_head" in name for name in load_file(folder / "model.safetensors"))
    assert any(
        "line_head" in name for name in load_file(runs / "reader_smoke/1_look/finished/model.safetensors")
    )


def test_a_stage_trains_its_parts_only(finished):
    runs, _ = finished
    fresh = build_model(load_recipe("reader_smoke").model)[0].state_dict()
    first, second = (
        load_file(runs / f"reader_smoke/{name}/finished/model.safetensors") for name in ("1_look", "2_answer")
    )
    assert all(first[name].shape == fresh[name].shape for name in fresh if name in first)
    changed = {part_of(name).split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"vision", "projector", "language", "line_head"}


def test_finished_stages_are_taken_up_again(finished):
    runs, folder = finished
    before = load_file(folder / "model.safetensors")
    steps = (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns
    train("reader_smoke", [f"output={runs}", "bf16=false"])
    after = load_file(folder / "model.safetensors")
    assert (runs / "reader_smoke/2_answer/finished/model.safetensors").stat().st_mtime_ns == steps
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = ["bf16=false", "save_steps=1", "stages.look.steps=3", "stages.answer.steps=1"]
    through = train("reader_smoke", [*settings, f"output={tmp_path}/through"])
    steps = iter(range(2))
    whole = StageTrainer.training_step

    def until_killed(self, *args, **kwargs):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    assert (tmp_path / "killed/reader_smoke/1_look/checkpoint-2").is_dir()
    resumed = train("reader_smoke", [*settings, f"output={tmp_path}/killed"])
    one, other = (load_file(folder / "model.safetensors") for folder in (through, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_loss_of_a_stage_sends_gradients_to_the_encoders():
    recipe = load_recipe("reader_smoke")
    model, processor = build_model(recipe.model)
    model.add_module("line_head", LineHead(32))
    stage = recipe.stages[1]
    source = build_sources(stage, seed=0)
    batch = Collator(processor, max_length=4096, frame_step=4.0)([source[0], source[1]])
    losses = stage_losses(model, batch, stage)
    assert set(losses) == {"language", "frames", "pointer"}
    kernel = next(p for n, p in model.named_parameters() if "branches.1" in n and p.ndim == 4)
    for loss in losses.values():
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert kernel.grad.abs().sum() > 0


def without_auxiliaries(stage):
    return stage.model_copy(update={"auxiliary": Auxiliary()})


def test_the_language_loss_is_the_models_own():
    recipe = load_recipe("reader_smoke")
    model, processor = build_model(recipe.model)
    source = build_sources(recipe.stages[1], seed=0)
    batch = Collator(processor, max_length=4096)([source[0], source[1]])
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "image_sizes")
    own = model(**{name: batch[name] for name in names}).loss
    losses = stage_losses(model, batch, without_auxiliaries(recipe.stages[1]))
    torch.testing.assert_close(losses, {"language": own})


def test_questions_apart_are_learned_as_if_they_were_asked_alone():
    recipe = load_recipe("reader_smoke")
    model, processor = build_model(recipe.model)
    stage = without_auxiliaries(recipe.stages[1])
    sample = build_sources(stage, seed=0)[1]
    assert len(sample.turns) > 2
    apart = stage_losses(model, Collator(processor, max_length=4096, turns="apart")([sample]), stage)[
        "language"
    ]
    alone = []
    for turn in sample.turns:
        question = "<image>\n" + turn.question.removeprefix("<image>\n")
        single = replace(sample, turns=(replace(turn, question=question),))
        batch = Collator(processor, max_length=4096)([single])
        alone += [stage_losses(model, batch, stage)["language"]] * (len(turn.answer) + 1)
    torch.testing.assert_close(apart, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


def test_the_rate_rises_stays_and_falls():
    optimiser = Optimiser(warmup_steps=9, decay_share=0.5)
    rates = [rate_at(step, optimiser, 100) for step in (0, 4, 9, 49, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_the_optimiser_follows_the_rate():
    model = torch.nn.Linear(2, 2)
    optimiser, schedule = build_optimiser(model, Optimiser(lr=0.5, warmup_steps=1, decay_share=0.0), steps=10)
    assert {group["lr"] for group in optimiser.param_groups} == {0.25}
    optimiser.step()
    schedule.step()
    assert {group["lr"] for group in optimiser.param_groups} == {0.5}


def test_other_sizes_are_refused_where_their_number_is_wrong():
    vision = load_recipe("reader_smoke").model.vision
    assert [branch.size for branch in resized(vision, [64, 128]).branches] == [64, 128]
    assert resized(vision, None) == vision
    with pytest.raises(ValueError, match="2 views, got \\[64\\]"):
        resized(vision, [64])


def test_data_that_is_not_there_stops_a_run_before_it_starts(tmp_path):
    missing = '{"kind": "conversations", "path": "nowhere.json"}'
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        train("reader_smoke", [f"output={tmp_path}", f"stages.answer.data=[{missing}]"])
    assert not list(tmp_path.iterdir())


def test_a_missing_accelerate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[train\]'"):
        train("reader_smoke")
