"""The published configurations say what paper and official configuration files say."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from stepwell.encoders.catalogue import build_encoder
from stepwell.models.published import PUBLISHED, find_published, layer_runs
from stepwell.models.vision import build_features


@pytest.mark.parametrize(
    ("depth", "count", "first_runs", "last_run"),
    [
        (12, 12, [(0, 0), (1, 1)], (11, 11)),
        (24, 12, [(0, 1), (2, 3)], (22, 23)),
        (48, 12, [(0, 3), (4, 7)], (44, 47)),
        (32, 12, [(0, 1), (2, 3), (4, 5), (6, 7), (8, 10)], (29, 31)),
        (39, 12, [(0, 2), (3, 6), (7, 10), (11, 13)], (35, 38)),
        (21, 12, [(0, 2), (3, 6), (7, 8), (9, 9)], (17, 20)),
        (39, 24, [(0, 1), (2, 2), (3, 4), (5, 6), (7, 9)], (37, 38)),
        (24, 24, [(0, 0)], (23, 23)),
        (12, 2, [(0, 5)], (6, 11)),
        (39, 2, [(0, 19)], (20, 38)),
        (48, 4, [(0, 11)], (36, 47)),
    ],
)
def test_layer_runs_are_those_of_the_official_configurations(depth, count, first_runs, last_run):
    runs = layer_runs(depth, count)
    assert len(runs) == count
    assert list(runs[: len(first_runs)]) == first_runs
    assert runs[-1] == last_run
    assert [first for first, _ in runs[1:]] == [last + 1 for _, last in runs[:-1]]


def test_runs_that_were_not_published_are_not_guessed():
    assert layer_runs(12, 0) == ()
    with pytest.raises(ValueError, match="12 layers do not fall into 5"):
        layer_runs(12, 5)


@cache
def depth(encoder: str) -> int:
    with torch.device("meta"):
        return build_encoder(encoder).spec.depth


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_every_configuration_runs_all_layers_of_its_networks(published):
    for branch in published.branches:
        assert branch.interactions[-1][1] == depth(branch.encoder) - 1
        assert published.name.rpartition("piip_")[2].count(str(branch.size)) >= 1
    sizes = [branch.size for branch in published.branches]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("piip_det_tsb_1568_1120_672", 175.04),
        ("piip_det_sbl_1568_1120_672", 547.81),
        ("piip_det_tsbl_1568_1120_672_448_as_config", 571.07),
        ("piip_det_tsbl_1568_1120_672_448_as_released_code", 593.22),
        ("piip_det_convnext_tsb_1024_672_448", 210.92),
        ("piip_det_ct_vs_vb_1024_672_448", 190.05),
        ("piip_det_h6b_1024_512", 7293.6),
    ],
)
def test_detectors_have_the_parameters_of_the_official_modules(name, millions):
    with torch.device("meta"):
        model = build_features(PUBLISHED[name].dense_settings())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("piip_det_tsb_1568_1120_672", "piip_det_tsb_1568_1120_672"),
        (
            "OpenGVLab/PIIP:detection/mask_rcnn_deit_tsb_1568_1120_672_fpn_1x_coco_bs16.pth",
            "piip_det_tsb_1568_1120_672",
        ),
        ("mask_rcnn_convnext-tsb_1024_672_448_regular-fpn.pth", "piip_det_convnext_tsb_1024_672_448"),
        (
            "OpenGVLab/PIIP-LLaVA_ConvNeXt-B_CLIP-L_1024-336_7B",
            "piip_llava_convnext_b_clip_l_1024_336_7b",
        ),
        ("PIIP-LLaVA_CLIP-BL_512-256_7B", "piip_llava_clip_bl_512_256_7b"),
        (
            "mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16",
            "piip_det_tsbl_1568_1120_672_448_as_released_code",
        ),
    ],
)
def test_a_configuration_is_found_by_its_released_name(alias, name):
    found = find_published(alias)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("name", ["", "OpenGVLab/PIIP", "someone/else", "piip"])
def test_other_names_are_not_published(name):
    assert find_published(name) is None


def test_released_names_are_told_apart():
    released = [published.released for published in PUBLISHED.values() if published.released]
    assert len(released) == len(set(released))
