"""What Trainer is told of a recipe's stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stepwell.train import arguments
from stepwell.train.arguments import training_arguments
from stepwell.train.recipe import load_recipe


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
