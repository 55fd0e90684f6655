"""The published configurations say what paper and official configuration files say."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from stepwell.encoders.catalogue import build_encoder
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.models.published.piip import PIIP
from stepwell.structures import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD


@cache
def depth(encoder: str) -> int:
    with torch.device("meta"):
        return build_encoder(encoder).spec.depth


@pytest.mark.parametrize("published", PIIP, ids=[published.name for published in PIIP])
def test_every_configuration_runs_all_layers_of_its_networks(published):
    for branch in published.settings.branches:
        assert not branch.interactions or branch.interactions[-1][1] == depth(branch.encoder) - 1
        assert published.name.rpartition("piip_")[2].count(str(branch.size)) >= 1
    sizes = [branch.size for branch in published.settings.branches]
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
        model = PUBLISHED[name].settings.build()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "dims", "finest"),
    [
        ("vitdet_b_1024", (768, 768, 768, 768), 4),
        ("vitdet_l_1024", (1024, 1024, 1024, 1024), 4),
        ("internvit_6b_1024", (3200, 3200, 3200, 3200), 4),
        ("convnext_b_1024", (128, 256, 512, 1024), 4),
        ("piip_seg_tsb_896_448_336", (768, 768, 768, 768), 2),  # branch 3 is enlarged from the image
        ("piip_det_dino_sbl_1792_1120_672", (1024, 1024, 1024), 8),
    ],
)
def test_dense_configurations_give_maps_at_doubling_strides(name, dims, finest):
    with torch.device("meta"):
        model = PUBLISHED[name].settings.build().eval()
        maps = model(torch.empty(1, 3, 448, 672))
    strides = [finest * 2**i for i in range(len(dims))]
    assert list(model.strides) == strides
    expected = [(1, dim, 448 // stride, 672 // stride) for dim, stride in zip(dims, strides, strict=True)]
    assert [tuple(x.shape) for x in maps] == expected


def test_the_convnext_baseline_drops_paths_as_convnext_does():
    published = PUBLISHED["convnext_b_1024"]
    assert published.settings.branches[0].arguments["drop_path"] == 0.4


@pytest.mark.parametrize(
    ("name", "halves"),
    [
        ("piip_det_tsb_1120_896_448", True),
        ("convnext_b_1024", True),
        ("piip_det_dino_sbl_1792_1120_672", False),
        ("piip_det_convnext_tsb_1024_672_448", False),
        ("piip_seg_h6b_512_192", False),
        ("internvit_6b_512", False),
        ("piip_cls_sbl_320_160_96", False),
        ("vit_l_224", False),
        ("deit_b_224", False),
        ("piip_cls_b_512_256_128", False),
    ],
)
def test_images_are_normalised_as_the_official_configurations_say(name, halves):
    """By ImageNet's statistics or by halves, whatever AugReg's networks were pretrained with."""
    expected = (HALF_MEAN, HALF_STD) if halves else (IMAGENET_MEAN, IMAGENET_STD)
    assert PUBLISHED[name].settings.statistics == expected


@pytest.mark.parametrize(
    ("name", "millions"), [("piip_cls_b_512_256_128", 100.93), ("deit_b_224", 86.57), ("vit_l_224", 304.33)]
)
def test_classifiers_have_the_parameters_of_the_paper_or_of_timm(name, millions):
    """PIIP-B's as counted for Table X; those of one network are timm's."""
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = published.settings.build(published.num_classes).eval()
        logits = model(
            torch.empty(1, 3, published.settings.branches[-1].size, published.settings.branches[-1].size)
        )
    assert logits.shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


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
        ("mask_rcnn_deit_vit_b_fpn_1x_coco_bs16.pth", "vitdet_b_1024"),
        (
            "OpenGVLab/PIIP:segmentation/upernet_internvit_h6b_192_512_80k_ade20k_bs16_lr4e-5.pth",
            "piip_seg_h6b_512_192",
        ),
        (
            "mask_rcnn_deit_tsbl_1568_1120_672_448_fpn_1x_coco_bs16",
            "piip_det_tsbl_1568_1120_672_448_as_released_code",
        ),
    ],
)
def test_a_configuration_is_found_by_its_released_name(alias, name):
    published = find_published(alias)
    assert published is not None
    assert published.name == name


@pytest.mark.parametrize("name", ["", "OpenGVLab/PIIP", "someone/else", "piip"])
def test_other_names_are_not_published(name):
    assert find_published(name) is None


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_every_configuration_has_a_key_table_and_what_its_task_needs(published):
    assert published.rules(published.settings)
    has_classes = published.task in ("classification", "detection", "segmentation")
    assert (published.num_classes is not None) == has_classes
    assert (published.head is not None) == (published.task in ("detection", "segmentation"))
    assert (published.images is not None) == (published.head is not None)
    assert len(published.classes) in (0, published.num_classes)
    assert (published.text_config is not None) == (published.task in ("chat", "part"))
    assert (published.template is not None) == (published.task == "chat")
    assert bool(published.parts) == (published.task == "part")


def test_released_names_are_told_apart():
    released = [published.released for published in PUBLISHED.values() if published.released]
    assert len(released) == len(set(released))
