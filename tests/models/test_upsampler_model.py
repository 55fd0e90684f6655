"""The folder of a trained up-sampler: what it holds, how it loads, and as a part of another model."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

import stepwell
from stepwell.folders import ModelError
from stepwell.fuse.upsample import KernelConfig, UpsamplerConfig, build_upsampler
from stepwell.keys.report import FitError
from stepwell.models.parts import load_parts
from stepwell.models.upsampler import StepwellUpsampler, StepwellUpsamplerConfig


def model(**settings: Any) -> StepwellUpsampler:
    torch.manual_seed(0)
    fields = {"encoder": "vit_nano", "dim": 16, "arguments": {"dim": 16}} | settings
    network = StepwellUpsampler(StepwellUpsamplerConfig(**fields))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


MAP, IMAGE = torch.randn(2, 16, 4, 6), torch.randn(2, 3, 32, 48)
KINDS = [
    UpsamplerConfig(),
    UpsamplerConfig(kind="deconvolution"),
    UpsamplerConfig(kernel=KernelConfig(radius=1, correction=False, distance="pixels"), corrections="none"),
]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=["code", "deconvolution", "paper"])
def test_a_folder_holds_the_tensors_of_a_pyramid_and_gives_its_maps(tmp_path, kind, levels):
    saved = model(upsampler=kind, levels=levels)
    saved.save_pretrained(tmp_path)
    pyramid = build_upsampler(kind, 16, levels).eval()
    pyramid.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = pyramid.levels(MAP, IMAGE)
    for loaded in (stepwell.load(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, StepwellUpsampler)
        found = loaded.levels(MAP, IMAGE)
        assert all(torch.equal(a.corrected(), b.corrected()) for a, b in zip(found, expected, strict=True))
        assert torch.equal(loaded(MAP, IMAGE), pyramid(MAP, IMAGE))
        assert loaded(MAP, IMAGE).shape == (2, 16, 4 * 2**levels, 6 * 2**levels)
        assert loaded.config.settings == kind


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_its_map_is_that_of_the_official_forward(levels):
    """Stage behind stage, and the last correction; of levels, each of three has one more, before the next."""
    network = model(levels=levels)
    stages, corrections = network.pyramid.stages, network.pyramid.corrections

    def enlarged(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3])
        out: torch.Tensor = stage(x, nn.functional.adaptive_avg_pool2d(IMAGE, size))
        return out

    def corrected(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * nn.functional.conv2d(x, linear.weight[:, :, None, None], linear.bias)

    x, y, found = MAP, MAP, network.levels(MAP, IMAGE)
    for i, stage in enumerate(stages):
        x, y = enlarged(stage, x), enlarged(stage, y)
        if levels == 3 or i == levels - 1:
            y = corrected(corrections[i if levels == 3 else 0].linear, y)
        torch.testing.assert_close(found[i].corrected(), y)
    torch.testing.assert_close(network(MAP, IMAGE), corrected(corrections[-1].linear, x))


def test_whoever_hears_the_pyramid_hears_both_calls():
    network, heard = model(), []
    network.pyramid.register_forward_hook(lambda *_: heard.append(1))
    network(MAP, IMAGE)
    network.levels(MAP, IMAGE)
    assert heard == [1, 1]


def test_a_map_of_another_width_is_one_line():
    with pytest.raises(ValueError, match="takes maps of 16 channels, got 8"):
        model()(MAP[:, :8], IMAGE)


def test_a_new_one_starts_as_a_pyramid_does():
    torch.manual_seed(1)
    network = StepwellUpsampler(StepwellUpsamplerConfig(dim=16))
    torch.manual_seed(1)
    pyramid = build_upsampler(UpsamplerConfig(), 16, 2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), pyramid.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"dim": 0}, "dim must be a whole number from 1 on, got 0"),
        ({"levels": "2"}, "levels must be a whole number from 1 on, got '2'"),
        ({"upsampler": {"kind": "jbu"}}, "upsampler: kind"),
        ({"upsampler": {"kernel": {"radius": 0}}}, "upsampler: kernel.radius"),
        ({"level": 2}, "level"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        StepwellUpsamplerConfig(**fields)


def test_loading_is_strict(tmp_path):
    model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first = next(iter(tensors))
    for changed, complaint in (
        ({name: t for name, t in tensors.items() if name != first}, "1 tensors are missing"),
        (tensors | {"stages.7.similarity": torch.zeros(())}, "have no place in this model"),
        (tensors | {first: torch.zeros(7)}, "are of another shape"),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=complaint):
            stepwell.load(tmp_path)


class WholeConfig(PreTrainedConfig):
    model_type = "whole_for_tests"


class Whole(PreTrainedModel):
    """A model with an up-sampler of maps 16 wide among its parts."""

    config_class = WholeConfig
    parts: ClassVar[dict[str, str]] = {"vision.upsampler": "vision.upsampler"}

    def __init__(self, levels: int = 2, dim: int = 16, **settings: Any) -> None:
        super().__init__(WholeConfig())
        self.vision = nn.ModuleDict({"upsampler": build_upsampler(UpsamplerConfig(**settings), dim, levels)})


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_part_starts_from_the_folder_or_from_its_file(tmp_path, file):
    trained = model()
    trained.save_pretrained(tmp_path)
    whole = Whole().eval()
    report = load_parts(whole, {"vision.upsampler": tmp_path / file})["vision.upsampler"]
    assert report.ok
    assert not report.dropped
    assert torch.equal(whole.vision["upsampler"](MAP, IMAGE), trained(MAP, IMAGE))


@pytest.mark.parametrize(
    ("whole", "complaint"),
    [
        ({"dim": 24}, "an up-sampler of dim 16 does not fit the model's of 24"),
        ({"levels": 1}, "an up-sampler of levels 2 does not fit the model's of 1"),
        (
            {"kernel": {"distance": "pixels"}},
            "of kernel.distance 'relative' does not fit the model's of 'pixels'",
        ),
        ({"kernel": {"similarity": "sigma"}}, "of kernel.similarity 'temperature'"),
        ({"kernel": {"normalise": "count"}}, "of kernel.normalise 'sum'"),
        ({"kernel": {"radius": 2}}, "of kernel.radius 3"),
    ],
)
def test_a_part_that_would_compute_something_else_is_one_line(tmp_path, whole, complaint):
    model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"parts\.vision\.upsampler: ") as caught:
        load_parts(Whole(**whole), {"vision.upsampler": tmp_path})
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_may_differ_in_what_is_dropped_while_it_trains(tmp_path):
    model().save_pretrained(tmp_path)
    assert load_parts(Whole(kernel={"dropout": 0.0}, dropout=0.5), {"vision.upsampler": tmp_path})


def test_a_part_without_the_tensors_is_refused(tmp_path):
    model().save_pretrained(tmp_path)
    with pytest.raises(FitError, match="expected 24, got 16"):
        load_parts(Whole(dim=24), {"vision.upsampler": tmp_path / "model.safetensors"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "stepwell_upsampler"
    with pytest.raises(FitError, match="missing"):
        load_parts(Whole(kind="deconvolution", levels=2), {"vision.upsampler": tmp_path})
