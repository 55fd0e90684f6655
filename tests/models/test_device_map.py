"""Weights by accelerate's maps: on disk, in host memory or on two GPUs, a model gives what it gives whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.windows import WindowConfig
from stepwell.models.ask import Assistant
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.detector import StepwellForObjectDetection
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.pyramid_shared import PyramidSharedConfig
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.models.uhd import UhdV2Config
from stepwell.models.vision import NEVER_CUT, VisionConfig

RANGES = ((0, 0), (1, 1))
CLIP = {"depth": 2, "class_token": True, "class_slot": True, "position": "table", "position_grid": [4, 4]}
BEIT = {"depth": 2, "dim": 32, "num_heads": 2, "position": "relative", "windows": 4, "layer_scale": 0.1}
CONVNEXT = {"dims": [16, 32], "depths": [1, 1], "strides": [4, 2], "layer_scale": 0.1}
INTERACTION = InteractionConfig(num_heads=2)


def branch(arguments: dict[str, Any], size: int = 64, encoder: str = "vit_nano") -> BranchConfig:
    return BranchConfig(encoder=encoder, size=size, interactions=RANGES, arguments=arguments)


CONV = BranchConfig(encoder="convnext_nano", size=128, interactions=((0, 0), (1, 2)), arguments=CONVNEXT)
MIXED = (branch(CLIP), branch(BEIT), CONV)  # a class token; tables and windows; convolutions
VISIONS: dict[str, VisionConfig] = {
    "plain": PlainConfig(encoder="vit_nano", size=64, arguments={**CLIP, "embed_norm": True}),
    "piip": PiipConfig(branches=MIXED, interaction=INTERACTION),
    "regular attention": PiipConfig(
        branches=(branch(CLIP), branch(BEIT)), interaction=InteractionConfig(num_heads=2, attention="regular")
    ),
    "uhd_v2": UhdV2Config(
        encoder="vit_nano", size=64, max_slices=4, windows=WindowConfig(grid=(2, 2)), arguments=CLIP
    ),
    "pyramid_shared": PyramidSharedConfig(encoder="vit_nano", sizes=(32, 64), arguments=CLIP),
    "llava_hr": LlavaHrConfig(
        fast="vit_nano",
        slow="convnext_nano",
        size=128,
        fast_least=96,
        adapters=1,
        fast_arguments={**CLIP, "class_token": False},
        slow_arguments=CONVNEXT,
    ),
}
MAPS = [
    {"model.vision": "disk", "model.language_model": "cpu", "lm_head": "cpu"},
    {"model.vision": "cpu", "model.language_model": "disk", "lm_head": "disk"},
    {"": "disk"},
]


def opened(model: PreTrainedModel) -> Any:
    """Gates that are shut would hide what an interaction does."""
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def backbone() -> Any:
    settings = DenseSettings(branches=MIXED, interaction=INTERACTION)
    return opened(PyramidBackbone(PyramidBackboneConfig(settings, out_features=["stage1", "stage4"])))


def classifier(head: str) -> Any:
    branches = (branch(CLIP), branch(CLIP, 128)) if head == "cls" else MIXED
    settings = ClassifierSettings(branches=branches, interaction=INTERACTION, head=head)
    return opened(PyramidForImageClassification(PyramidClassifierConfig(settings, num_labels=3)))


def detector(head: dict[str, Any]) -> Any:
    settings = DenseSettings(branches=MIXED[:2], interaction=INTERACTION)
    return opened(StepwellForObjectDetection(StepwellDetectorConfig(settings, head, num_labels=3)))


def segmenter() -> Any:
    settings = DenseSettings(branches=MIXED[:2], interaction=INTERACTION)
    head = {"channels": 8, "auxiliary_channels": 4, "pool_sizes": [1, 2]}
    return opened(StepwellForSemanticSegmentation(StepwellSegmenterConfig(settings, head, num_labels=3)))


DINO = {"kind": "dino", "dim": 32, "ffn_dim": 32, "num_queries": 10, "encoder_layers": 1, "decoder_layers": 2}
PERCEPTION: dict[str, Callable[[], Any]] = {
    "backbone": backbone,
    "first_patch": lambda: classifier("first_patch"),
    "cls": lambda: classifier("cls"),
    "merge": lambda: classifier("merge"),
    "rcnn": lambda: detector({"kind": "rcnn", "dim": 32}),
    "dino": lambda: detector(DINO),
    "upernet": segmenter,
}


def results(model: PreTrainedModel, image: torch.Tensor) -> list[torch.Tensor]:
    output = model(image)
    if hasattr(output, "feature_maps"):
        return list(output.feature_maps)
    return [output.scores, output.pred_boxes] if hasattr(output, "pred_boxes") else [output.logits]


@pytest.fixture(params=VISIONS)
def whole(request, build):
    return build(VISIONS[request.param])


@pytest.fixture
def question(whole, draw):
    message = [{"type": "image", "image": draw(90, 60)}, {"type": "text", "text": "What is it?"}]
    return whole.processor.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def equal_assistants(placed, whole, question, image):
    torch.testing.assert_close(placed(**question).logits, whole.model(**question).logits)
    greedily = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(**question, **greedily), whole.model.generate(**question, **greedily))
    both = [Assistant(model, whole.processor) for model in (placed, whole.model)]
    answers = [assistant.ask(image, "What is it?", max_new_tokens=4) for assistant in both]
    assert answers[0] == answers[1]
    features, expected = (assistant.features(image) for assistant in both)
    torch.testing.assert_close(features.tokens, expected.tokens)


@pytest.mark.parametrize("places", MAPS, ids=json.dumps)
def test_a_folder_loaded_by_a_map_answers_as_it_does_whole(whole, question, draw, places, tmp_path):
    whole.model.eval().save_pretrained(tmp_path / "model")
    placed = StepwellForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in placed.parameters())
    equal_assistants(placed, whole, question, draw(90, 60))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_weights_that_accelerate_fetches_for_every_layer_answer_alike(
    whole, question, draw, kind, build, tmp_path
):
    placed = build(whole.model.config.vision).model
    placed.load_state_dict(whole.model.state_dict())
    if kind == "cpu":
        cpu_offload(placed, execution_device="cpu")
    else:
        disk_offload(placed, tmp_path, execution_device="cpu")
    assert all(parameter.is_meta for parameter in placed.parameters())
    equal_assistants(placed, whole, question, draw(90, 60))


@pytest.mark.parametrize("name", PERCEPTION)
def test_perception_on_disk_gives_the_same(name, tmp_path):
    model = PERCEPTION[name]()
    model.save_pretrained(tmp_path / "model")
    placed = type(model).from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert all(parameter.is_meta for parameter in placed.parameters())
    image = torch.randn(2, 3, 128, 128)
    for ours, expected in zip(results(placed, image), results(model, image), strict=True):
        torch.testing.assert_close(ours, expected)


def units(network: nn.Module, prefix: str = "") -> Iterator[str]:
    """What "auto" puts on devices: layers that must not be cut, and what has no parts."""
    for name, parameter in network.named_parameters(prefix.rstrip("."), recurse=False):
        raise AssertionError(f"{name} {tuple(parameter.shape)} can be parted from the modules beside it")
    for name, module in network.named_children():
        if type(module).__name__ in NEVER_CUT or not list(module.children()):
            yield prefix + name
        else:
            yield from units(module, f"{prefix}{name}.")


def without_numbers(network: nn.Module, places: dict[str, str], mode: FakeTensorMode) -> nn.Module:
    """A copy on devices that need not be there: its parameters have shapes only."""
    imagined = deepcopy(network)
    for path, device in places.items():
        for module in imagined.get_submodule(path).modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    imagined_parameter = mode.from_tensor(parameter.detach()).to(device)
                    module._parameters[name] = nn.Parameter(imagined_parameter, requires_grad=False)
    return imagined


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by accelerate
@pytest.mark.parametrize(
    "name", ["plain", "piip", "pyramid_shared", "llava_hr", "backbone", "first_patch", "merge"]
)
def test_wherever_auto_cuts_no_operation_is_on_two_gpus(name):
    if name in VISIONS:
        network: Any = VISIONS[name].build(32).eval()
        layout = network.geometry.layout((128, 128))
        inputs = ([torch.zeros(3, *layout.inputs[0])], [layout])
    else:
        network, inputs = PERCEPTION[name](), (torch.zeros(1, 3, 128, 128),)
    parts = list(units(network))
    assert len(parts) > 1
    for turn in (1, 2, 4):  # any two parts that stand close are apart once
        places = {part: f"cuda:{i // turn % 2}" for i, part in enumerate(parts)}
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            imagined = without_numbers(network, places, mode)
            dispatch_model(imagined, places, main_device="cuda:0", force_hooks=True)(*inputs)


@pytest.mark.parametrize("kind", ["assistant", "backbone"])
def test_a_map_by_memory_keeps_layers_whole(kind, build):
    model = backbone() if kind == "backbone" else build(VISIONS["piip"]).model
    expected = {*NEVER_CUT, "LlamaDecoderLayer"} if kind == "assistant" else {*NEVER_CUT}
    assert expected <= model._no_split_modules
    whole = [n for n, module in model.named_modules() if type(module).__name__ in expected]
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        places = infer_auto_device_map(
            model,
            max_memory={"cpu": int(share * size), "disk": 10 * size},
            no_split_module_classes=model._no_split_modules,
        )
        assert not [name for name in places if any(name.startswith(f"{unit}.") for unit in whole)]
