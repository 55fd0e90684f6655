"""TRL and PEFT take an assistant's folder by its name, and train it as they train transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from stepwell.fuse.downsample import AttentionDownsampler
from stepwell.fuse.merge import linear_stacks
from stepwell.fuse.windows import WindowConfig
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.plain import PlainConfig
from stepwell.models.processor import StepwellProcessor
from stepwell.models.uhd import UhdV2Config
from stepwell.models.upsampler import StepwellUpsampler, StepwellUpsamplerConfig

PLAIN = PlainConfig(encoder="vit_nano", size=32)
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 1,
    "logging_steps": 1,
}
ANSWERS = ["A CAT", "A DOG HERE"]


@pytest.fixture
def folder(build, tmp_path):
    assistant = build(PLAIN)
    assistant.model.save_pretrained(tmp_path / "model")
    assistant.processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def loss_by_hand(folder, chats, images, labels_of):
    model, processor = (
        kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, StepwellProcessor)
    )
    losses = []
    for messages, image in zip(chats, images, strict=True):
        tokens = processor.label(messages, [image] if image else [])
        inputs = {"input_ids": torch.tensor([tokens.input_ids])}
        inputs |= {} if image is None else processor(images=image)
        logits = model.train(False)(**inputs).logits[0, :-1]
        wanted = torch.tensor(labels_of(tokens)[1:])
        losses.append(F.cross_entropy(logits, wanted, reduction="none")[wanted != -100])
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("shows", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("answers_only", [True, False], ids=["answers", "all"])
def test_trl_fine_tunes_a_folder(folder, draw, tmp_path, shows, answers_only):
    trl = pytest.importorskip("trl")
    if shows and answers_only and transformers.__version__.startswith("5.17."):
        pytest.skip("TRL wants transformers 5.18 for that")
    images = [draw(90, 60, 1), draw(40, 80, 2)] if shows else [None, None]
    part = [{"type": "image"}] if shows else []
    chats = [
        [
            {"role": "user", "content": [*part, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        for answer in ANSWERS
    ]
    rows = [
        {"messages": chat} | ({"images": [image]} if shows else {})
        for chat, image in zip(chats, images, strict=True)
    ]
    trainer = trl.SFTTrainer(
        model=folder,
        args=trl.SFTConfig(str(tmp_path / "out"), assistant_only_loss=answers_only, max_length=None, **QUIET),
        train_dataset=pytest.importorskip("datasets").Dataset.from_list(rows),
    )
    assert type(trainer.model) is StepwellForConditionalGeneration
    assert type(trainer.processing_class) is StepwellProcessor
    loss = trainer.train().training_loss

    def labels_of(tokens):
        return tokens.labels if answers_only else tokens.input_ids

    assert loss == pytest.approx(
        loss_by_hand(folder, chats, images, labels_of), rel=0.02
    )  # messages drop out
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    moved = {
        name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert any("language_model" in name for name in moved)
    assert any("vision" in name for name in moved) == shows


@pytest.mark.parametrize("shows", [True, False], ids=["images", "text"])
def test_trl_prefers_answers_of_a_folder(folder, draw, tmp_path, shows):
    trl = pytest.importorskip("trl")
    say = {role: lambda text, role=role: [{"role": role, "content": text}] for role in ("user", "assistant")}
    rows = [
        {"prompt": say["user"]("What?"), "chosen": say["assistant"](a), "rejected": say["assistant"]("NO")}
        | ({"images": [draw(90, 60)]} if shows else {})
        for a in ANSWERS
    ]
    trainer = trl.DPOTrainer(
        model=folder,
        args=trl.DPOConfig(
            str(tmp_path / "out"), max_length=None, learning_rate=1e-2, **{**QUIET, "max_steps": 2}
        ),
        train_dataset=pytest.importorskip("datasets").Dataset.from_list(rows),
    )
    assert type(trainer.processing_class) is StepwellProcessor
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-3)  # the model is its own reference
    assert second < first


def test_adapters_are_saved_reloaded_and_merged(folder, draw, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = (
        kind.from_pretrained(folder) for kind in (AutoModelForImageTextToText, StepwellProcessor)
    )
    inputs = processor(images=draw(90, 60), text="<image> what?", return_tensors="pt")
    plain = model(**inputs).logits.detach()
    config = peft.LoraConfig(target_modules=r".*language_model\..*(q_proj|v_proj)", r=2)
    tuned = peft.get_peft_model(model, config)
    tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    learning = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora_" in name and "language_model" in name for name in learning)
    torch.optim.SGD(tuned.parameters(), lr=10.0).step()
    tuned.save_pretrained(tmp_path / "adapter")
    expected = tuned.eval()(**inputs).logits
    assert not torch.allclose(expected, plain, atol=1e-4)
    base = AutoModelForImageTextToText.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    merged = again.merge_and_unload()
    assert type(merged) is StepwellForConditionalGeneration
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(TypeError, match="lables"):
        tuned(**inputs, lables=inputs["input_ids"])
    assert tuned.generate(**inputs, max_new_tokens=2).shape[0] == 1


def uhd_vision():
    """A vision system, and what it is called with."""
    settings = UhdV2Config(
        arguments={"dim": 32, "depth": 2, "num_heads": 2, "patch": 8, "position_grid": [6, 6]},
        size=48,
        windows=WindowConfig(grid=(3, 3)),
    )
    vision = settings.build(64)
    layout = vision.geometry.layout((48, 48))
    return vision, ([torch.randn(3, *size) for size in layout.inputs], [layout])


def upsampler(levels):
    """Maps become as wide as they have channels: an axis that is taken for another one is no error."""
    model = StepwellUpsampler(StepwellUpsamplerConfig(dim=32, levels=levels))
    side = 32 // 2**levels
    return model, (torch.randn(1, 32, side, side), torch.randn(1, 3, 64, 64))


ADAPTED = {
    "uhd": uhd_vision,
    "upsampler 2x": lambda: upsampler(1),
    "upsampler 4x": lambda: upsampler(2),
    "upsampler 8x": lambda: upsampler(3),
    "stack of a merge": lambda: (linear_stacks([32, 16], num_groups=4)[1], (torch.randn(1, 16, 16, 16),)),
    "down-sampler": lambda: (AttentionDownsampler(16, 4), (torch.randn(1, 16, 16, 16), (4, 4))),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_of_every_linear_layer_is_its_own_merged_model(name):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network, inputs = ADAPTED[name]()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)

    def run(model):
        out = model.eval()(*inputs)
        return out[0] if isinstance(out, list) else out

    with torch.no_grad():
        plain = run(network)
        tuned = peft.get_peft_model(network, config)
        adapted = run(tuned)
        torch.testing.assert_close(run(tuned.merge_and_unload()), adapted, rtol=1e-3, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
