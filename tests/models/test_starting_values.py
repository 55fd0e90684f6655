"""A tensor that a folder does not bring begins as it does in a new model, and never as what lay in memory."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, LlamaConfig

from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig

FEW = InteractionConfig(num_heads=2)


def branches(encoder, interactions, **arguments):
    return tuple(
        BranchConfig(encoder=encoder, size=size, interactions=interactions, arguments=arguments)
        for size in (64, 128)
    )


VITS = branches("vit_nano", ((0, 1), (2, 3)), layer_scale=0.1)
BEITS = branches("vit_nano", ((0, 1), (2, 3)), position="relative", windows=4)
CLIPS = branches(
    "vit_nano", ((0, 1), (2, 3)), position="table", position_grid=[4, 4], class_token=True, class_slot=True
)
NEXTS = branches("convnext_nano", ((0, 1), (2, 4)), dims=[8, 16, 32], depths=[1, 1, 1], strides=[4, 2, 2])
TEXT = LlamaConfig(
    vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)


def assistant(vision):
    return StepwellForConditionalGeneration(StepwellConfig(vision, TEXT, image_token_id=19))


MODELS = {
    "vit": lambda: PyramidBackbone(
        PyramidBackboneConfig(pyramid=DenseSettings(branches=VITS, interaction=FEW))
    ),
    "beit": lambda: PyramidBackbone(
        PyramidBackboneConfig(pyramid=DenseSettings(branches=BEITS, interaction=FEW))
    ),
    "heads": lambda: PyramidForImageClassification(
        PyramidClassifierConfig(pyramid=ClassifierSettings(branches=CLIPS, interaction=FEW), num_labels=5)
    ),
    "merged head": lambda: PyramidForImageClassification(
        PyramidClassifierConfig(
            pyramid=ClassifierSettings(branches=VITS, interaction=FEW, head="merge"), num_labels=5
        )
    ),
    "piip": lambda: assistant(PiipConfig(branches=NEXTS, interaction=FEW)),
    "plain": lambda: assistant(PlainConfig(encoder="vit_nano", size=64, select_layer=-1)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parity", [0, 1])
def test_what_is_missing_begins_as_in_a_new_model(tmp_path, name, parity):
    new = MODELS[name]()
    new.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    brought = {key: torch.full_like(tensor, 7.0) for key, tensor in load_file(file).items()}
    missing = [key for i, key in enumerate(brought) if i % 2 == parity and "language_model" not in key]
    save_file({k: t for k, t in brought.items() if k not in missing}, file, metadata={"format": "pt"})
    used = [torch.full((64, 64), float("nan")) for _ in range(500)]
    del used  # memory that was used before, as in any program
    loaded, info = type(new).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing)
    assert len(missing) > 10
    expected = new.state_dict()
    for key, tensor in loaded.state_dict().items():
        if key not in missing:
            assert tensor.eq(7.0).all(), key
        elif expected[key].std(correction=0) == 0:
            torch.testing.assert_close(tensor, expected[key], msg=key)
        else:
            ours, theirs = (float(x.std()) for x in (tensor, expected[key]))
            assert abs(math.log(ours / theirs)) < 6 / math.sqrt(tensor.numel()) + 0.1, (key, ours, theirs)


def test_offsets_that_were_not_brought_look_in_every_direction(tmp_path):
    new = MODELS["vit"]()
    new.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("attn.offsets.bias"))
    expected = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    torch.testing.assert_close(type(new).from_pretrained(tmp_path).state_dict()[name], expected)


@pytest.mark.parametrize("name", ["heads", "merged head"])
def test_a_head_of_another_number_of_classes_starts_anew(tmp_path, name):
    MODELS[name]().save_pretrained(tmp_path)
    used = [torch.full((64, 7), float("nan")) for _ in range(500)]
    del used
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    head = torch.cat([p.flatten() for n, p in model.named_parameters() if "classifier" in n])
    assert head.isfinite().all()
    assert 0 < head.std() < 1
    assert model(torch.randn(1, 3, 128, 128)).logits.shape == (1, 7)


def test_a_new_model_is_not_given_its_values_twice(monkeypatch):
    from stepwell.models import starting_values

    asked = []
    for module in ("perception", "assistant"):
        monkeypatch.setattr(f"stepwell.models.{module}.reset", lambda part: asked.append(part))
    assert starting_values.reset is not None
    for build in MODELS.values():
        build()
    assert not [part for part in asked if list(part.parameters(recurse=False))]
