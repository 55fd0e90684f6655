"""Adapters on parts of every kind of assistant, from Python."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText
from visions import VISIONS

from stepwell.models.adapters import add_adapters, lora_config, merge_adapters
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor

peft = pytest.importorskip("peft")
BOTH = ("language", "vision")


@pytest.fixture(scope="module", params=sorted(VISIONS))
def saved(build, request, tmp_path_factory):
    """The folder of an assistant of each kind."""
    folder = tmp_path_factory.mktemp("model")
    assistant = build(VISIONS[request.param])
    assistant.model.save_pretrained(folder)
    assistant.processor.save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def trained(model, inputs):
    """Every number that learns is another one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()(**inputs).logits


def test_adapters_and_whole_parts_are_saved_reloaded_and_merged(saved, draw, tmp_path):
    base = loaded(saved)
    processor = StepwellProcessor.from_pretrained(saved)
    inputs = processor(images=draw(90, 60), text="<image> what?", return_tensors="pt")
    plain = base(**inputs).logits.detach()
    tuned = peft.get_peft_model(base, lora_config(base, BOTH, rank=2, alpha=4))
    learning = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    whole = {name for name in learning if "lora_" not in name}
    assert all(".projector." in name for name in whole)
    assert any(".projector." in name for name in whole) or not any(
        "projector" in name for name, _ in base.named_parameters()
    )
    expected = trained(tuned, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(saved), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    merged = again.merge_and_unload()
    assert type(merged) is StepwellForConditionalGeneration
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged")(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapters_in_place_are_merged_into_the_same_names(saved, draw):
    model = loaded(saved)
    names = set(model.state_dict())
    inputs = StepwellProcessor.from_pretrained(saved)(
        images=draw(90, 60), text="<image>?", return_tensors="pt"
    )
    add_adapters(model, lora_config(model, BOTH, rank=2))
    assert any(".lora_A." in name for name in model.state_dict())
    expected = trained(model, inputs)
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", [("language",), ("vision",), BOTH], ids="+".join)
def test_adapters_go_on_the_parts_that_are_named(assistant, parts):
    model = copy.deepcopy(assistant.model)
    tuned = peft.get_peft_model(model, lora_config(model, parts, rank=2))
    learning = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    for part, place in {"language": "language_model", "vision": ".branches."}.items():
        assert any(place in name for name in learning) == (part in parts)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"parts": ("projector",)}, "on language, vision or both, got projector"),
        ({"parts": ()}, "on language, vision or both, got nothing"),
        ({"whole": ("head",)}, "no part 'head'; it has "),
    ],
)
def test_parts_that_there_are_not_are_refused_in_a_line(assistant, arguments, complaint):
    with pytest.raises(ValueError, match=rf"^[^\n]*{complaint}[^\n]*$"):
        lora_config(assistant.model, **arguments)
