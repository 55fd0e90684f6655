"""Stage 0 of LLaVA-UHD equals the recorded official steps, on both paths, through the key tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cases_multiview
from record import Unsupported, read_record
from stepwell.fuse.upsample import UpsamplerConfig, build_upsampler
from stepwell.keys.engine import plan
from stepwell.keys.uhd import multiview_rules, upsampler_checkpoint_rules
from verify import verify

FOLDER = Path(__file__).parent / "uhd"
RECORDED = [
    FOLDER / f"{name}.safetensors"
    for name in ("downsampler", "losses_and_jitter", "vdim_pretrain_step", "vdim_pretrain_step_plain")
]


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert verdict.status == "ok", verdict.reason


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("downsampler", "logit_dropout.rescale", True),
        ("downsampler", "blur.sigma", 2.0),
        ("downsampler", "simple.kernel", "softmax"),
        ("losses_and_jitter", "uncertainty.clamp_min", 0.01),
        ("losses_and_jitter", "jitter_border", "zeros"),
        ("vdim_pretrain_step", "uncertainty_head.offset", 0.0),
        ("vdim_pretrain_step", "crf.alpha", 0.2),
        ("vdim_pretrain_step", "upsampler.shared_stages", True),
        ("vdim_pretrain_step", "loss_divided_by", "one"),
        ("vdim_pretrain_step_plain", "entropy_weight", 0.1),
    ],
)
def test_settings_that_are_not_ours_are_unsupported(file, path, value):
    record = read_record(FOLDER / f"{file}.safetensors")
    *parents, last = path.split(".")
    place = record.settings
    for name in parents:
        place = place[name]
    assert last in place
    place[last] = value
    with pytest.raises(Unsupported, match=last):
        cases_multiview.CASES[record.kind](record)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("stage1_detached_before_stage2", False),
        ("crf_weight", 0.01),
        ("tv_weight", 0.5),
        ("max_pad", 4),
    ],
)
def test_a_setting_of_a_step_shows_in_its_numbers(name, change):
    record = read_record(FOLDER / "vdim_pretrain_step_plain.safetensors")
    record.settings[name] = change
    assert verify(record, ["reference"]).status == "FAILED"


def published_names():
    """Of the released stage-0 checkpoint: its stack, down-samplers, heads and what it logged."""
    stage = {
        **dict.fromkeys(("range_temp", "sigma_spatial"), ()),
        "range_proj.0.weight": (32, 3, 1, 1),
        "range_proj.0.bias": (32,),
        "range_proj.3.weight": (32, 32, 1, 1),
        "range_proj.3.bias": (32,),
        "fixup_proj.0.weight": (49, 52, 1, 1),
        "fixup_proj.0.bias": (49,),
        "fixup_proj.3.weight": (49, 49, 1, 1),
        "fixup_proj.3.bias": (49,),
    }
    names = {f"upsampler.up{i}.{name}": shape for i in (1, 2) for name, shape in stage.items()}
    names |= {"upsampler.fixup_proj.1.weight": (16, 16, 1, 1), "upsampler.fixup_proj.1.bias": (16,)}
    for suffix in ("", "_2x"):
        names |= {f"downsampler{suffix}.{name}": (14, 14) for name in ("w", "b")}
        names |= {f"downsampler{suffix}.attention_net.1.weight": (1, 16)}
        names |= {f"downsampler{suffix}.attention_net.1.bias": (1,)}
        names |= {f"scale_net{suffix}.net.weight": (1, 16, 1, 1), f"scale_net{suffix}.net.bias": (1,)}
    names |= {"linear_acc": (), "linear_iou": ()}
    return names | {"model.vision_tower.vision_model.embeddings.class_embedding": (16,)}


def test_every_tensor_of_the_released_checkpoint_is_taken_or_dropped_for_a_reason():
    names = published_names()
    renaming = plan(names, upsampler_checkpoint_rules(2))
    assert not renaming.unknown
    ours = build_upsampler(UpsamplerConfig(), 16, 2).state_dict()
    made = {
        name: target.make(lambda source: torch.empty(names[source]))
        for name, target in renaming.targets.items()
    }
    assert {name: tensor.shape for name, tensor in made.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }
    assert len(renaming.dropped) == len(names) - len(ours)
    trained = plan(names, multiview_rules(2))
    assert trained.targets["downsamplers.0.scale"].sources == ("downsampler_2x.w",)
    assert trained.targets["uncertainty.1.conv.bias"].sources == ("scale_net.net.bias",)
    assert sorted(trained.dropped) == ["linear_acc", "linear_iou", next(n for n in names if "class_emb" in n)]


@pytest.mark.parametrize("rules", [upsampler_checkpoint_rules, multiview_rules])
def test_a_tensor_that_nobody_knows_is_no_part_of_such_a_checkpoint(rules):
    names = ["upsampler.up3.range_temp", "downsampler_2x", "scale_net_best.net.weight", "model_2.weight"]
    assert sorted(plan(names, rules(2)).unknown) == sorted(names)
