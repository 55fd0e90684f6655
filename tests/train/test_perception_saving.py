"""What a finished training leaves: small on the disk, computed in full."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import recipe_of, write_data

import stepwell
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task


@pytest.mark.parametrize("task", ["detect", "segment", "classify"])
def test_a_model_stored_in_half_precision_is_computed_in_single(task, tmp_path):
    recipe = load_recipe(recipe_of(task, tmp_path, write_data(tmp_path / "data", task), save_dtype="float16"))
    trained = find_task(recipe.task)(recipe, recipe.stages[0])
    module = trained.build()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    trained.save(tmp_path / "weights.safetensors", tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    loaded = stepwell.load(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    before = dict(module.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-3, atol=1e-6)
