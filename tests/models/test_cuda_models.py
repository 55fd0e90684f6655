"""Whole models on a GPU: pyramids, backbones, classifiers, and the shipped assistant that reads."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pyramids import make_pyramid, make_views
from test_device_map import PERCEPTION, VISIONS, equal_assistants, question, results, whole
from torch import Tensor

import stepwell
from stepwell.folders import SHIPPED
from stepwell.layers.drop_path import DropPath
from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.weights.light import load_to_ask

pytestmark = pytest.mark.cuda
__all__ = ["question", "whole"]  # fixtures
EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES: dict[str, dict[str, str]] = runpy.run_path(str(EXAMPLES / "demo.py"))["PAGES"]
ASKED = [(EXAMPLES / name, text) for name, questions in PAGES.items() for text in questions]


def distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, by the size of what is expected."""
    pairs = zip(ours, expected, strict=True)
    return max(float((a.float().cpu() - b.cpu()).norm() / b.norm().clamp(min=1e-6).cpu()) for a, b in pairs)


def gradients(model: Any, outputs: list[Tensor]) -> list[Tensor]:
    """Of all parameters that an output depends on: a head may leave the last class tokens unread."""
    model.zero_grad()
    torch.stack([x.float().square().mean() for x in outputs]).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) > 50
    return found


def off_the_grid(model: Any) -> Any:
    """Points start on the corners of cells, where the gradient of what is sampled there jumps."""
    for name, parameter in model.named_parameters():
        if name.endswith("attn.offsets.bias"):
            torch.nn.init.uniform_(parameter, -2.4, -2.1)
    return model


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block, whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_pyramid_gives_the_states_and_gradients_of_a_cpu(cuda):
    pyramid, views = make_pyramid(), make_views()

    def run(pyramid, views):
        tokens = [state.tokens for states in pyramid(views, after=[0]) for state in states]
        return [x.detach() for x in tokens], gradients(pyramid, tokens)

    expected = run(pyramid, views)
    ours = run(pyramid.to(cuda), [view.to(cuda) for view in views])
    assert distance(ours[0], expected[0]) < 1e-4
    assert distance(ours[1], expected[1]) < 1e-3


@pytest.mark.parametrize("name", PERCEPTION)
def test_maps_and_logits_are_those_of_a_cpu_and_near_them_in_bf16(name, cuda):
    model, image = off_the_grid(PERCEPTION[name]()), torch.randn(2, 3, 128, 128)
    outputs = results(model, image)
    expected, slopes = [x.detach() for x in outputs], gradients(model, outputs)
    model, image = model.to(cuda), image.to(cuda)
    outputs = results(model, image)
    assert distance([x.detach() for x in outputs], expected) < 1e-4
    assert distance(gradients(model, outputs), slopes) < 1e-2
    last = results(model, image.to(memory_format=torch.channels_last))
    assert distance([x.detach() for x in last], expected) < 1e-4
    with torch.autocast(cuda.type, torch.bfloat16):
        outputs = results(model, image)
    assert distance([x.detach() for x in outputs], expected) < 0.1
    assert all(slope.isfinite().all() for slope in gradients(model, outputs))


@pytest.mark.parametrize("name", PERCEPTION)
def test_checkpointed_models_learn_the_same(name, cuda):
    model, image = PERCEPTION[name]().to(cuda), torch.randn(2, 3, 128, 128, device=cuda)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    slopes = []
    for switch in ("gradient_checkpointing_disable", "gradient_checkpointing_enable"):
        getattr(model.train(), switch)()
        slopes.append(gradients(model, results(model, image)))
    assert distance(slopes[1], slopes[0]) < 1e-2


@pytest.mark.parametrize("name", VISIONS)
@pytest.mark.parametrize("learns", [False, True])
def test_a_vision_system_never_makes_the_host_wait(name, learns, cuda):
    system = VISIONS[name].build(32).to(cuda).train(learns)
    layouts = [system.geometry.layout(size) for size in ((90, 60), (60, 90), (90, 60))]
    inputs = [torch.randn(3, *layout.inputs[0], device=cuda) for layout in layouts]

    def run() -> None:
        with torch.set_grad_enabled(learns), torch.autocast(cuda.type, torch.bfloat16):
            tokens = system(inputs, layouts)
        if learns:
            torch.stack([x.float().square().sum() for x in tokens]).sum().backward()

    run()  # libraries start
    with no_waiting():
        run()


def test_waiting_is_noticed(cuda):
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device=cuda).sum().item()


@pytest.fixture(scope="module")
def reader() -> Assistant:
    """The shipped model on a CPU, whose answers its tests know."""
    return stepwell.load(device="cpu")


@pytest.fixture(scope="module")
def answers(reader: Assistant) -> list[str]:
    return [reader.ask(image, text) for image, text in ASKED]


@pytest.fixture
def reader_on_gpu(cuda: torch.device) -> Assistant:
    return stepwell.load(device=cuda)


def test_the_shipped_model_answers_as_on_a_cpu(reader_on_gpu, answers, cuda):
    assert reader_on_gpu.model.device == cuda
    assert [reader_on_gpu.ask(image, text) for image, text in ASKED] == answers
    assert reader_on_gpu.ask_many([([image], text) for image, text in ASKED]) == answers


def test_a_gpu_is_taken_where_there_is_one_also_without_transformers(answers, cuda):
    light = load_to_ask()
    assert light.encode(ASKED[0][0]).tokens.device.type == cuda.type
    assert [light.ask(image, text) for image, text in ASKED] == answers
    pieces: list[str] = []
    assert light.ask(*ASKED[0], stream=pieces.append) == answers[0] == "".join(pieces).strip()


def test_the_command_line_answers_on_a_gpu(answers, cuda):
    image, text = ASKED[0]
    command = [sys.executable, "-m", "stepwell", "ask", str(image), text, "--device", cuda.type]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert answers[0] in result.stdout


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near_and_answers(dtype, reader, cuda):
    model = stepwell.load(device=cuda, dtype=dtype)
    assert model.model.dtype == getattr(torch, dtype)
    image, _ = ASKED[0]
    assert distance([model.features(image).tokens], [reader.features(image).tokens]) < 0.1
    assert all(model.ask(image, text) for image, text in ASKED)


def test_features_of_a_gpu_are_those_of_a_cpu(reader, reader_on_gpu, cuda):
    ours, expected = (model.features(ASKED[0][0]) for model in (reader_on_gpu, reader))
    both = [[features.tokens, *(map.map for map in features.maps)] for features in (ours, expected)]
    assert all(tensor.device == cuda for tensor in both[0])
    assert distance(*both) < 1e-3


def test_questions_about_images_of_several_sizes_are_answered_as_alone(reader_on_gpu, draw):
    pairs = [
        ([draw(width, height, seed)], "How much is the total?")
        for seed, (width, height) in enumerate(((300, 500), (500, 300), (300, 500), (640, 200)))
    ]
    pairs += [([image], text) for image, text in ASKED]
    together = reader_on_gpu.ask_many(pairs, max_new_tokens=12, batch_size=3)
    assert together == [reader_on_gpu.ask(images, text, max_new_tokens=12) for images, text in pairs]


PLACES: dict[str, Any] = {
    "vision in host memory": {"model.vision": "cpu", "model.language_model": 0, "lm_head": 0},
    "language on disk": {"model.vision": 0, "model.language_model": "disk", "lm_head": "disk"},
    "all but the head away": {"model.vision": "disk", "model.language_model": "cpu", "lm_head": 0},
}


@pytest.mark.parametrize("places", PLACES)
def test_a_folder_loaded_by_a_map_answers_on_the_gpu_as_whole(places, whole, question, draw, cuda, tmp_path):
    whole.model.eval().save_pretrained(tmp_path / "model")
    placed = StepwellForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=PLACES[places], offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in placed.parameters())
    on_gpu = StepwellForConditionalGeneration.from_pretrained(tmp_path / "model").to(cuda)
    expected = Assistant(on_gpu, whole.processor)
    equal_assistants(
        placed, expected, {name: tensor.to(cuda) for name, tensor in question.items()}, draw(90, 60)
    )


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_shipped_model_answers_where_a_part_of_it_fits_the_gpu(share, reader, answers, cuda, tmp_path):
    size = sum(parameter.numel() * 4 for parameter in reader.model.parameters())
    placed = StepwellForConditionalGeneration.from_pretrained(
        SHIPPED,
        dtype="float32",
        device_map="auto",
        max_memory={0: int(share * size), "cpu": 10 * size},
        offload_folder=tmp_path,
    )
    assert "cpu" in placed.hf_device_map.values()
    assistant = Assistant(placed, reader.processor)
    assert [assistant.ask(image, text) for image, text in ASKED] == answers
