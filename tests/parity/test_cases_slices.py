"""Slices, their encoder and the order of their tokens equal the recorded official ones, on both paths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import cases_slices
from record import Record, Unsupported, read_record
from verify import verify

GOLDEN = Path(__file__).parent / "uhd"
RECORDED = [GOLDEN / name for name in ("slicing.json", "token_order.safetensors", "token_splice.safetensors")]


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_official_numbers_come_back(file, path):
    verdict = verify(read_record(file), [path])
    assert (verdict.status, verdict.reason) == ("ok", "")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 2, "max9", "overview"), [14, 14]),
        (("rows", 2, "max9", "grid"), [1, 1]),
        (("rows", 2, "max6", "refine"), None),
        (("rows", 2, "max7", "boxes", 1, 2), 0),
        (("rows", 2, "max7", "separators", 0), 7),
        (("rows", 2, "max7", "tokens_organised"), 1),
        (("rows", 2, "max7", "tokens_per_slice_separators"), 1),
        (("rows", 2, "max7", "thumbnail"), [14, 14]),
        (("rows", 2, "keep_ratio_1024", 0), 1),
        (("never_split_max7", 30, "overview", 1), 1),
        (("scale384_max7", 30, "boxes"), []),
        (("resize_as_grid_6x336", 30, "resized", 0), 1),
    ],
)
def test_everything_in_a_table_of_sizes_is_compared(place, value):
    record = read_record(GOLDEN / "slicing.json")
    *parents, key = place
    part = record.table
    for parent in parents:
        part = part[parent]
    part[key] = value
    verdict = verify(record, ["reference"])
    assert verdict.status == "FAILED"
    assert place[0] in verdict.reason
    assert "more" not in verdict.reason


def test_a_list_without_settings_is_left_out_by_name():
    record = read_record(GOLDEN / "slicing.json")
    record.table["circles"] = [{"size": [1, 1]}]
    assert verify(record).reason.endswith("; not yet circles")


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("slicing.json", "size_order", "height_width"),
        ("token_order.safetensors", "organised_before_overview", "comma"),
        ("token_order.safetensors", "organised_row_separator", 29892),
        ("token_splice.safetensors", "overview_position", "first"),
        ("token_splice.safetensors", "visual_label", 0),
        ("token_splice.safetensors", "embedding.text", [0, 0, "id", 0]),
    ],
)
def test_settings_that_are_not_ours_are_named(file, path, value):
    record = read_record(GOLDEN / file)
    *parents, key = path.split(".")
    settings = record.settings
    for parent in parents:
        settings = settings[parent]
    assert key in settings
    settings[key] = value
    with pytest.raises(Unsupported, match=rf"^{path} "):
        cases_slices.CASES[record.kind](record)


def test_separators_that_do_not_follow_from_the_grid_are_unsupported():
    record = read_record(GOLDEN / "token_order.safetensors")
    record.settings["cases"][1]["separators"] = [13, 13]
    with pytest.raises(Unsupported, match=r"separators \[13, 13\] of a grid \[2, 1\]"):
        cases_slices.CASES[record.kind](record)


def test_the_splice_takes_several_images_a_row_and_an_end_within_an_image():
    """The first row with its image twice, of which the second is cut off after four tokens."""
    record = read_record(GOLDEN / "token_splice.safetensors")
    (case, *_) = record.settings["cases"]
    ids = record.inputs["input_ids0"][:1]
    at = int((ids[0] == -200).nonzero())
    twice = torch.cat([ids[0, :at], ids[0, at : at + 1], ids[0, at:]])[None]
    image = int(record.outputs["attention_mask0"][0].sum()) - (ids.shape[1] - 1)
    length = at + image + 4
    record.settings["cases"] = [
        case | {"grids": [[2, 1]] * 2, "separators": [[29892, 13]] * 2, "max_length": length}
    ]
    record.inputs.clear()
    record.inputs.update(
        input_ids0=twice, labels0=torch.zeros_like(twice), attention_mask0=torch.ones_like(twice)
    )
    ours = cases_slices.CASES[record.kind](record)
    once = record.outputs["embeds0"][0, : at + image]
    second = once[at : at + 4] + torch.tensor([0, 0, 0, 1])
    assert torch.equal(ours["embeds0"][0], torch.cat([once, second]))
    assert ours["labels0"][0].tolist() == [0] * at + [-100] * (image + 4), "an image has no label"


def settings_of_clip(config: CLIPVisionConfig) -> dict[str, object]:
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size".split()
    side = config.image_size // config.patch_size
    return {name: getattr(config, name) for name in names} | {
        "activation": config.hidden_act,
        "norm_eps": config.layer_norm_eps,
        "qk_norm": False,
        "qkv_bias": True,
        "patch_bias": False,
        "pos_embed_grid": [side, side],
        "pos_embed_resize": "bicubic",
        "pos_embed_resize_antialias": False,
    }


@pytest.mark.parametrize(("select_layer", "state"), [(-2, 2), (-1, 3), (1, 1), (0, 0), (3, 3)])
def test_views_of_unequal_shape_are_encoded_as_transformers_clip_encodes_each_alone(select_layer, state):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    clip = CLIPVisionModel(config).eval()
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    views = [torch.randn(3, 14 * rows, 14 * cols) for rows, cols in ((4, 4), (2, 7), (1, 1), (2, 7))]
    outputs = {}
    for i, view in enumerate(views):
        with torch.no_grad():
            theirs = clip(view[None], output_hidden_states=True, interpolate_pos_encoding=True)
        outputs[f"embedded{i}"] = theirs.hidden_states[0][0]
        outputs[f"features{i}"] = theirs.hidden_states[state][0, 1:]
        outputs[f"last_hidden{i}"] = theirs.hidden_states[-1][0]
        outputs[f"pooled{i}"] = theirs.pooler_output[0]
    outputs["pooled"] = torch.stack([outputs.pop(f"pooled{i}") for i in range(len(views))])
    record = Record(
        path=Path("a"),
        system="uhd",
        kind="uhd.clip_vision",
        case="a",
        version="",
        settings=settings_of_clip(config) | {"num_views": len(views), "select_layer": select_layer},
        tolerance={"rtol": 1e-5, "atol": 1e-5},
        params={name: parameter.detach() for name, parameter in clip.named_parameters()},
        inputs={f"image{i}": view for i, view in enumerate(views)},
        outputs=outputs,
    )
    verdict = verify(record)
    assert (verdict.status, verdict.reason) == ("ok", "")
    with pytest.raises(Unsupported, match="pooled 'mean'"):
        cases_slices.CASES[record.kind](replace(record, settings={"pooled": "mean"}))


def test_pixels_are_compared_in_grey_levels():
    """2 rows of 1 slice; each expected pixel is Pillow's."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (61, 30, 3), dtype=np.uint8))
    whole, overview = (
        image.resize(size, Image.Resampling.BICUBIC)
        for size in ((28, 56), (14, 28))  # Pillow's (width, height)
    )
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    crop = (np.asarray(overview)[:5, :9] / 255 - mean) / std
    outputs = {
        "overview_u8_0": torch.from_numpy(np.array(overview)),
        "slice_u8_0_0": torch.from_numpy(np.array(whole)[:28]),
        "overview_norm_crop0": torch.from_numpy(crop).permute(2, 0, 1).float(),
    }
    record = Record(
        path=Path("a"),
        system="uhd",
        kind="uhd.preprocess",
        case="a",
        version="",
        settings={
            "scale_resolution": 28,
            "patch_size": 14,
            "max_slice_nums": 2,
            "never_split": False,
            "image_mean": mean,
            "image_std": std,
            "norm_crop_hw": [5, 9],
            "cases": [{"index": 0, "grid": [1, 2]}],
        },
        tolerance={"rtol": 0, "atol": {name: 0 if "u8" in name else 1e-6 for name in outputs}},
        inputs={"image0": torch.from_numpy(np.array(image))},
        outputs=outputs,
    )
    verdict = verify(record)
    assert (verdict.status, verdict.reason) == ("ok", "")
    outputs["slice_u8_0_0"][3, 4, 1] ^= 1
    assert verify(record).reason == "reference path: output slice_u8_0_0"
    outputs["slice_u8_0_0"][3, 4, 1] ^= 1
    outputs["overview_norm_crop0"][2, 0, 0] += 1e-3
    assert verify(record).reason == "reference path: output overview_norm_crop0"
    record.settings["cases"][0]["grid"] = [2, 1]
    assert "a grid of (2, 1), recorded [2, 1] columns and rows" in verify(record).reason


def test_the_recorded_table_holds_every_list_that_its_settings_name():
    table = json.loads((GOLDEN / "slicing.json").read_text(encoding="utf-8"))
    assert all(len(table[name]) >= 50 for name in table["settings"]["lists"])
