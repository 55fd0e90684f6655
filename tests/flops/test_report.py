"""What `stepwell flops CONFIG` says: against figures recorded elsewhere, and against the model itself."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import ResNetConfig

from stepwell.flops.report import find_subject, report, report_as_json, report_as_table
from stepwell.folders import SHIPPED_DETECTOR
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.perception import PyramidBackboneConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig

BRANCHES = (
    BranchConfig(encoder="vit_t", size=64, interactions=((0, 1), (2, 3)), arguments={"depth": 4}),
    BranchConfig(encoder="vit_nano", size=128, interactions=((0, 1), (2, 3))),
)


def _assistant(vision):
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 50}
    return StepwellConfig(vision_config=vision, text_config=text)


def test_the_detection_backbone_costs_a_quarter_more_than_the_paper_prints():
    found = report(find_subject("piip_det_tsb_1568_1120_672"))
    assert found.gmacs == pytest.approx(571.9, abs=0.05)  # from an independent count of the official modules
    assert found.params / 1e6 == pytest.approx(175.04, abs=0.005)
    assert found.printed_gflops == pytest.approx(453.25, abs=0.005)  # Table I prints 453
    assert found.views == ((672, 672), (1120, 1120), (1568, 1568))
    assert found.tokens is None


def test_the_printed_figure_of_a_detector_is_its_classifiers():
    """Of 4x4 cells in windows of 3, AugReg's are filled up before the qkv layer, DeiT's behind it."""
    branches = [
        BranchConfig(encoder=encoder, size=64, arguments={"depth": 4, "windows": 3})
        for encoder in ("deit_s", "augreg_s")
    ]
    deit, augreg = (report(DenseSettings(branches=(branch,))) for branch in branches)
    assert deit.gmacs == augreg.gmacs
    padding = 4 * (6 * 6 - 4 * 4) * 3 * 384**2
    assert (augreg.printed_gflops - deit.printed_gflops) * 1e9 == pytest.approx(padding)
    assert report(DenseSettings(branches=BRANCHES, merge_branches=(0,))).printed_gflops is None
    assert report(DenseSettings(branches=BRANCHES[:1], merge="none")).printed_gflops is None


def test_a_detector_is_counted_at_the_size_asked_for():
    square, wide = (report(DenseSettings(branches=BRANCHES), size=size) for size in (None, (64, 192)))
    assert square.views == ((64, 64), (128, 128))
    assert wide.views == ((32, 96), (64, 192))
    cells = [part.macs for part in wide.parts][1] / [part.macs for part in square.parts][1]
    assert 0.6 < cells < 0.8  # 4 * 12 of 8 * 8 cells, and less attention
    assert wide.printed_gflops < square.printed_gflops


def test_llava_is_printed_with_all_layers_though_the_last_is_not_run():
    found = report(PlainConfig())
    assert found.printed_gflops == pytest.approx(190.96, abs=0.01)  # Table XI prints 191
    assert found.gmacs == pytest.approx(190.96 * 23 / 24, rel=0.002)
    assert found.tokens == 576


def test_adapters_and_the_sum_of_two_encoders_are_counted_with_them():
    """By hand, but for ConvNeXt-L, of which timm's card says 34.4 at 224 pixels."""
    found = report(LlavaHrConfig())
    parts = {part.name: part.macs for part in found.parts}
    tokens, dim, slow = 1024, 1024, 1536
    gate = 2 * dim * dim // 2 + dim // 2
    local = tokens * dim * (7 * 7 + 1) + tokens * dim * dim
    assert parts["adapters"] == 3 * (local + tokens * slow * (slow + dim) + gate)
    assert parts["merge"] == tokens * dim * (dim + slow)
    assert parts["projector"] is None
    norms = 2 * tokens * dim * (2 * 24 + 1)
    blocks = 24 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    assert parts["branches.0"] == tokens * dim * 3 * 14**2 + blocks + norms
    assert parts["branches.1"] / 1e9 == pytest.approx(34.4 * (1024 / 224) ** 2, rel=0.002)
    assert found.tokens == tokens


def test_an_assistant_reports_its_tokens_and_all_its_parameters():
    config = _assistant(PiipConfig(branches=BRANCHES, framing="aspect"))
    found = report(config, size=(300, 200))
    with torch.device("meta"):
        model = StepwellForConditionalGeneration(config)
    layout = model.model.vision.geometry.layout((300, 200))
    assert found.tokens == layout.num_visual
    assert found.views == tuple(view.size for view in layout.views)
    assert found.params == sum(p.numel() for p in model.parameters())
    names = [part.name for part in found.parts]
    assert names[:2] == ["branches.0", "branches.1"]
    assert set(names[2:]) == {"interactions", "projector", "language_model", "lm_head", "other"}
    assert [part.name for part in found.parts if part.macs is None] == names[3:]


def test_reading_more_tokens_costs_more():
    config = _assistant(PiipConfig(branches=BRANCHES, framing="aspect"))
    wide, square = (
        {part.name: part.flops for part in report(config, size=size).parts}
        for size in ((100, 400), (200, 200))
    )
    assert all(wide[name] < square[name] for name in ("branches.1", "projector", "language_model"))
    assert wide["lm_head"] == square["lm_head"]


def test_a_classifier_is_counted_with_its_head():
    names = [part.name for part in report(ClassifierSettings(branches=BRANCHES, head="merge")).parts]
    assert sorted(names) == ["branches.0", "branches.1", "head", "interactions", "merges", "other"]


def test_json_and_table_agree():
    found = report(DenseSettings(branches=BRANCHES))
    entry = json.loads(report_as_json(found))
    assert entry["paper_gflops"] == found.gmacs
    assert entry["printed_gflops"] == found.printed_gflops
    assert entry["true_gflops"] == pytest.approx(sum(part["true_gflops"] for part in entry["parts"]))
    assert entry["visual_tokens"] is None
    lines = {line.split()[0]: line.split() for line in report_as_table(found).splitlines() if line}
    assert lines["total"][1:] == [f"{found.gmacs:.2f}", f"{found.gflops:.2f}", f"{found.params / 1e6:.2f}"]
    assert lines["neck"][1] == "-"


@pytest.mark.parametrize(
    "config",
    [
        _assistant(PiipConfig(branches=BRANCHES)),
        PyramidBackboneConfig(pyramid=DenseSettings(branches=BRANCHES)),
    ],
    ids=["assistant", "backbone"],
)
def test_a_folder_is_found_by_its_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    subject = find_subject(str(tmp_path))
    if isinstance(config, StepwellConfig):
        assert subject.vision == config.vision
    else:
        assert subject == config.settings


def test_of_a_detector_and_a_segmenter_the_backbone_is_counted(tmp_path):
    settings = DenseSettings(branches=BRANCHES)
    for name, kind in (("detector", StepwellDetectorConfig), ("segmenter", StepwellSegmenterConfig)):
        kind(settings).save_pretrained(tmp_path / name)
        assert find_subject(str(tmp_path / name)) == settings
    StepwellDetectorConfig(ResNetConfig()).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="has a 'resnet' backbone; only pyramids of ours are counted"):
        find_subject(str(tmp_path / "foreign"))


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'nothing'"):
        find_subject("nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model, not one of ours"):
        find_subject(str(tmp_path))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="at least one pixel each way, got 0x5"):
        report(DenseSettings(branches=BRANCHES), size=(0, 5))


def test_shipped_models_are_known_by_their_names():
    assert report(find_subject("boards_tiny")) == report(find_subject(str(SHIPPED_DETECTOR)))
