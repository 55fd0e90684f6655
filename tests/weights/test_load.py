"""Loading: what does not fit is one line, never a random number."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepwell
from stepwell.folders import HubError, ModelError
from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.dense import ClassifierSettings
from stepwell.models.perception import PyramidClassifierConfig, PyramidForImageClassification
from stepwell.models.published.papers import find_published
from stepwell.models.pyramid import BranchConfig
from stepwell.weights import load as module
from stepwell.weights.load import load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of ours with a tiny classifier."""
    branch = BranchConfig(encoder="vit_nano", size=32, interactions=((0, 1), (2, 3)), arguments={"dim": 16})
    settings = ClassifierSettings(branches=(branch, branch), interaction=InteractionConfig(num_heads=2))
    folder = tmp_path_factory.mktemp("whole")
    config = PyramidClassifierConfig(pyramid=settings, num_labels=3)
    PyramidForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refusal(error, *arguments, **keywords) -> str:
    with pytest.raises(error) as caught:
        load(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (ValueError, OSError))
    return str(caught.value)


def change(folder, change_state):
    state = load_file(folder / "model.safetensors")
    change_state(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_loads_with_every_tensor_of_its_file(folder):
    model = load(folder)
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    ours = model.state_dict()
    assert sorted(ours) == sorted(stored)
    assert all(torch.equal(ours[name].cpu(), tensor) for name, tensor in stored.items())


def test_dtype_is_the_stored_one_or_the_one_asked_for(folder):
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16).dtype == torch.float16
    assert "choose from float32" in refusal(ModelError, folder, dtype="fp8")


def test_a_device_that_is_not_there(folder):
    assert "cannot be used" in refusal(ModelError, folder, device="cuda:97")
    assert "cannot be used" in refusal(ModelError, folder, device="toaster")


@pytest.mark.parametrize(
    ("change_state", "words"),
    [
        (lambda state: state.pop("pyramid.head.norms.0.weight"), "1 tensors are missing"),
        (lambda state: state.update(extra=torch.ones(1)), "1 tensors have no place"),
        (
            lambda state: state.update({"pyramid.head.norms.0.weight": torch.ones(5)}),
            "1 tensors are of another shape",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change_state, words):
    change(folder, change_state)
    message = refusal(ModelError, folder)
    assert words in message
    assert "extra" in message or "pyramid.head.norms.0.weight" in message


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut short" in refusal(ValueError, folder)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(ModelError, folder)
    assert "no weights" in message
    assert "pytorch_model.bin is a pickle" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "no config.json"),
        ("not json", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"model_type": "llava"}', "stepwell convert"),
        ('{"model_type": "stepwell_classifier", "pyramid": {"branchs": []}}', "branchs"),
        ('{"model_type": "stepwell_classifier", "colour": "red"}', "colour"),
    ],
)
def test_folders_that_hold_no_model_of_ours(folder, config, words):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert words in refusal(ModelError, folder)


def test_a_file_is_not_a_folder(folder):
    assert "convert it" in refusal(ModelError, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["nonsense", "./nowhere", "a/b/c", "https://example.org/x", ""])
def test_unknown_models(name):
    assert "unknown model" in refusal(ModelError, name)


@pytest.mark.parametrize(
    "name",
    [
        "OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B",
        "OpenGVLab/PIIP:detection/mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16.pth",
        "someone/model",
    ],
)
def test_hub_names_offline_say_so_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    message = refusal(HubError, name)
    assert name.partition(":")[0] in message
    assert "the hub cannot be reached" in message
    assert time.monotonic() - started < 10


def test_a_configuration_that_was_never_released():
    assert "not released" in refusal(ModelError, "piip_det_ct_vs_vb_1024_672_448")


def test_a_release_is_downloaded_and_converted_once(tmp_path, monkeypatch, whole):
    """With a stand-in for the hub and for the conversion."""
    calls = []

    def download(repository, patterns, *, revision, advice):
        calls.append((repository, tuple(patterns)))
        (tmp_path / "hub" / file).parent.mkdir(parents=True)
        (tmp_path / "hub" / file).touch()
        return tmp_path / "hub"

    def convert(source, out, *, as_):
        calls.append((source, as_))
        shutil.copytree(whole, out)

    monkeypatch.setattr(module, "download", download)
    monkeypatch.setattr(module, "convert", convert)
    monkeypatch.setattr(module, "cache_folder", lambda name: tmp_path / "cache" / name)
    file = "classification/piip_3branch_tsb_368-192-128_cls_token_deit1.pth"
    for _ in range(2):
        assert isinstance(load(f"OpenGVLab/PIIP:{file}"), PyramidForImageClassification)
    assert calls == [
        ("OpenGVLab/PIIP", (file,)),
        (tmp_path / "hub" / file, "piip_cls_tsb_368_192_128"),
    ]


@pytest.mark.parametrize(
    "file",
    [
        "classification/piip_3branch_tsb_368-192-128_cls_token_deit1.pth",
        "detection/mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16.pth",
    ],
)
def test_offline_advice_for_a_release_names_its_file_and_the_conversion(file, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refusal(HubError, f"OpenGVLab/PIIP:{file}")
    assert f"download {file} from OpenGVLab/PIIP elsewhere" in message
    assert f"stepwell convert {file} OUT --as {find_published(file.rpartition('/')[2]).name}" in message


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("OpenGVLab/PIIP:classification/piip_3branch_tsb_368-192-128_cls_token_deit1.pth", {}),
        ("OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B", {}),
        ("OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B", {"config.json": "{}"}),
        ("OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B", {"model.safetensors": ""}),
        (
            "OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B",
            {
                "config.json": "{}",
                "pytorch_model.bin.index.json": '{"weight_map": {"a": "1.bin", "b": "2.bin"}}',
                "1.bin": "",
            },
        ),
    ],
)
def test_a_release_that_is_only_partly_cached_is_refused(name, present, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cache_folder", lambda name: tmp_path / "cache" / name)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path, text in present.items():
        (snapshot / path).write_text(text)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    message = refusal(HubError, name)
    assert "did not arrive" in message
    assert "stepwell convert" in message


def test_an_installation_without_a_shipped_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    assert "no shipped model" in refusal(ModelError)


def test_load_is_the_public_name():
    assert stepwell.load is load


def test_the_classifier_keeps_its_settings(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["pyramid"]["interaction"]["num_heads"] == 2
    assert load(folder).config.num_labels == 3
