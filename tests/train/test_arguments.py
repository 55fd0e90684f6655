"""What Trainer is told of a recipe's stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stepwell.train import arguments
from stepwell.train.arguments import training_arguments
from stepwell.train.recipe import Schedule, load_recipe


@pytest.mark.parametrize(
    ("settings", "steps", "between"),
    [
        (["epochs=30"], 30 * 250, 250),
        (["epochs=30"], 30 * 20, 100),
        (["epochs=0.5"], 300, 600),
        (["epochs=30", "validate_steps=7"], 30 * 250, 7),
        (["epochs=null", "steps=3000"], 3000, 500),
    ],
)
def test_a_stage_is_validated_after_every_epoch_unless_it_says_otherwise(tmp_path, settings, steps, between):
    recipe = load_recipe("detect", [f"stages.learn.{setting}" for setting in settings])
    told = training_arguments(recipe, recipe.stages[0], tmp_path, steps=steps, seed=0)
    assert (told.eval_strategy, told.eval_steps) == ("steps", between)


@pytest.mark.parametrize(
    ("field", "complaint"),
    [
        ("label_smoothing_factor: 0.5", "label_smoothing_factor: 0.5 has no effect"),
        ("num_train_epochs: 7", "num_train_epochs: 7 is the stage's own field epochs"),
        ("per_device_eval_batch_size: 7", "per_device_eval_batch_size: 7 is the stage's own field batch"),
        ("train_sampling_strategy: group_by_length", "is the stage's own field sampling"),
        ("save_strategy: epoch", "save_strategy: epoch counts epochs in another way; give steps"),
    ],
)
def test_fields_that_would_do_nothing_are_refused(tmp_path, field, complaint):
    recipe = load_recipe("detect", [f"stages.learn.trainer={{{field}}}"])
    with pytest.raises(ValueError, match=complaint):
        training_arguments(recipe, recipe.stages[0], tmp_path, steps=10, seed=0)


def test_strategies_by_steps_are_taken(tmp_path):
    recipe = load_recipe("detect", ["stages.learn.trainer={save_strategy: steps}"])
    assert training_arguments(recipe, recipe.stages[0], tmp_path, steps=10, seed=0).save_strategy == "steps"


@pytest.mark.parametrize(
    ("steps", "setting", "warmup"), [(10, None, 1), (200, None, 20), (9000, None, 50), (10, 30, 30)]
)
def test_a_short_stage_is_not_all_warm_up(tmp_path, steps, setting, warmup):
    overrides = [] if setting is None else [f"stages.answer.schedule.warmup_steps={setting}"]
    recipe = load_recipe("reader_smoke", overrides)
    stage = recipe.stages[1]
    if setting is None:
        stage = stage.model_copy(update={"schedule": Schedule()})
    assert training_arguments(recipe, stage, tmp_path, steps=steps, seed=0).warmup_steps == warmup


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_parts_by_deepspeed_are_refused(tmp_path, monkeypatch, stage):
    def told(**_):
        return SimpleNamespace(hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: stage == 3))

    monkeypatch.setattr(arguments, "TrainingArguments", told)
    recipe = load_recipe("detect")
    if stage == 2:
        training_arguments(recipe, recipe.stages[0], tmp_path, steps=1, seed=0)
        return
    with pytest.raises(ValueError, match=r"stages\.learn\.trainer\.deepspeed: .* set its stage to 2, or"):
        training_arguments(recipe, recipe.stages[0], tmp_path, steps=1, seed=0)
