"""PIIP, arXiv 2501.07783: the configurations of section IV and of the release, and the baselines.

What a checkpoint file does not hold is here: which family a branch is, window sizes, the layers between two
interactions, the ratio of the views, head rules, statistics, as the paper and the configuration files of the
official repository say them. Branch 1 (the largest network, the smallest view) comes first in every list,
while names give the largest view first, as the paper does: `piip_<task>_<networks>_<sizes>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from stepwell.encoders.catalogue import ENCODERS, encoder_arguments
from stepwell.fuse.interaction import InteractionConfig
from stepwell.heads.dino import DinoConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.upernet import UperNetConfig
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.dino import dino_rules
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.llava import LANGUAGE_MODEL
from stepwell.keys.piip import BLOCKS, classifier_rules, detector_rules, features_rules, vision_rules
from stepwell.keys.rcnn import rcnn_rules
from stepwell.keys.upernet import UPERNET
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_heads import DetectionImages, DetectionSettings, SegmentationImages
from stepwell.models.piip import PiipConfig
from stepwell.models.published.classes import ADE20K, COCO
from stepwell.models.published.piip_settings import dense_branches, dense_settings, plain_branches
from stepwell.models.published.published import VICUNA_7B, VICUNA_13B, Published, Task
from stepwell.models.pyramid import BranchConfig
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["PIIP"]

REPOSITORY = "OpenGVLab/PIIP"
CLASSES: dict[Task, tuple[str, ...]] = {"detection": COCO, "segmentation": ADE20K, "classification": ()}
SPEEDUP = "the quick variant, which the release names without a file: no projections, norms or exact GELU"
IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # where branch 1 has others
FAST = InteractionConfig(project=False, norm=False)  # the variant without projections and norms
TSB = "deit3_b deit3_s deit_t"
SBL = "deit3_l deit3_b deit3_s"


def _tables(branches: Sequence[BranchConfig]) -> list[list[Rule]]:
    """The key table of every network."""
    tables = []
    for branch in branches:
        arguments = encoder_arguments(branch.encoder, branch.arguments)
        names = {key: arguments[key] for key in ("class_token", "class_slot", "depths") if key in arguments}
        naming, grid = BLOCKS[ENCODERS[branch.encoder].family], arguments.get("position_grid")
        tables.append(backbone_rules(naming, grid=grid, **names))
    return tables


def _plain(side: int, divisor: int = 224) -> DetectionImages:
    """A long side, and of the short one what an image of 1333x800 has."""
    return DetectionImages(long_limit=side, short_limit=side * 800 // 1333, size_divisor=divisor)


HEAD_RULES: dict[str, list[Rule]] = {"rcnn": rcnn_rules(), "dino": dino_rules(), "upernet": UPERNET}


def _dense_rules(settings: DenseSettings, *, head: DetectionSettings | UperNetConfig) -> list[Rule]:
    features = features_rules(
        _tables(settings.branches),
        len(settings.branches[0].interactions),
        merge_after=settings.merge_after,
        operations=settings.operations,
    )
    return detector_rules(features, HEAD_RULES[head.kind])


def _classifier_rules(settings: ClassifierSettings) -> list[Rule]:
    num_interactions, merged = len(settings.branches[0].interactions), settings.head == "merge"
    rules = classifier_rules(_tables(settings.branches), num_interactions, merged=merged)
    return [Prefix("", "pyramid.", rules)]


def _chat_rules(settings: PiipConfig) -> list[Rule]:
    num_interactions, norm = len(settings.branches[0].interactions), settings.projector.norm
    vision = vision_rules(_tables(settings.branches), num_interactions, norm=norm)
    return [Prefix("", "model.vision.", vision), *LANGUAGE_MODEL]


def _grids(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Of position tables that are stored at the size of every branch's own view."""
    return [(size // 16, size // 16) for size in sizes]


def _joined(sizes: Sequence[int], separator: str = "_") -> str:
    return separator.join(map(str, reversed(sizes)))


def _published(
    task: Literal["detection", "segmentation", "classification"],
    name: str,
    settings: DenseSettings | ClassifierSettings,
    file: str | None = None,
    quirk: str = "",
    *,
    head: DetectionSettings | UperNetConfig | None = None,
    images: DetectionImages | SegmentationImages | None = None,
) -> Published:
    """file: in the repository's folder of this task, without its ending."""
    return Published(
        name=name,
        task=task,
        settings=settings,
        rules=_classifier_rules if head is None else partial(_dense_rules, head=head),
        head=head,
        images=images,
        classes=CLASSES[task],
        num_classes=len(CLASSES[task]) or 1000,
        repository=REPOSITORY if file else None,
        file=f"{task}/{file}.pth" if file else None,
        quirk=quirk,
    )


def _deit_detectors() -> Iterator[Published]:
    for networks, encoders, windows, sizes in (
        ("tsb", TSB, 14, (448, 896, 1120)),
        ("tsb", TSB, 14, (448, 896, 1568)),
        ("tsb", TSB, 14, (672, 1120, 1568)),
        ("sbl", SBL, 28, (448, 672, 1120)),
        ("sbl", SBL, 28, (448, 896, 1344)),
        ("sbl", SBL, 28, (672, 896, 1568)),
        ("sbl", SBL, 28, (672, 1120, 1568)),
    ):
        name = f"{networks}_{_joined(sizes)}"
        settings = dense_settings(dense_branches(encoders, sizes, windows=windows))
        file = f"mask_rcnn_deit_{name}_fpn_1x_coco_bs16"
        images = _plain(sizes[-1])
        yield _published("detection", f"piip_det_{name}", settings, file, head=RcnnConfig(), images=images)
    for large in ((448, 672, 896, 1344), (448, 672, 1120, 1568), (448, 1120, 1568, 1792)):
        name = f"tsbl_{_joined(large)}"
        yield _published(
            "detection",
            f"piip_det_{name}_as_released_code",
            dense_settings(dense_branches(f"{SBL} deit3_s", large, windows=28)),
            f"mask_rcnn_deit_{name}_fpn_1x_coco_bs16",
            "branch 4 is built from the settings of branch 3: a second ViT-S",
            head=RcnnConfig(),
            images=_plain(large[-1]),
        )
        yield _published(
            "detection",
            f"piip_det_{name}_as_config",
            dense_settings(dense_branches(f"{SBL} deit_t", large, windows=28)),
            quirk="branch 4 is ViT-T, as the paper says; the released code does not build this",
            head=RcnnConfig(),
            images=_plain(large[-1]),
        )


def _pretrained_detectors() -> Iterator[Published]:
    """PIIP-SBL 1568/1120/672 from other pretrainings (Table V)."""
    steep: dict[str, Any] = {"drop_path": [0.4, 0.3, 0.2]}
    sizes = (672, 1120, 1568)
    own: dict[str, Any] = {"head": RcnnConfig(), "images": _plain(1568)}
    for pretraining, encoders, arguments in (
        ("augreg", "augreg_l_384 augreg_b_384 augreg_s_384", steep),
        ("mae", "mae_l mae_b deit3_s", {}),
        ("dinov2", "dinov2_l dinov2_b dinov2_s", steep),
        ("beit", "beitv2_l beitv2_b deit3_s", {}),
        ("uniperceiver", "uniperceiver_l uniperceiver_b deit3_s", {}),
    ):
        name = f"{pretraining}_sbl_1568_1120_672"
        settings = dense_settings(dense_branches(encoders, sizes, windows=28, **arguments))
        file = f"mask_rcnn_{name}_fpn_1x_coco_bs16"
        yield _published("detection", f"piip_det_{name}", settings, file, **own)
    augreg = "augreg_l_384 augreg_b_384 augreg_s_384"
    quick = dense_branches(augreg, sizes, windows=28, **steep, activation="gelu_tanh")
    yield _published(
        "detection",
        "piip_det_augreg_sbl_1568_1120_672_speedup",
        dense_settings(quick, interaction=FAST),
        quirk=SPEEDUP,
        **own,
    )


def _large_detectors() -> Iterator[Published]:
    """With InternViT-6B, and under DINO. The released ones attend globally; the paper used windows."""
    sizes = (672, 1120, 1792)
    sbl = dense_branches("deit3_l_384 deit3_b_384 deit3_s_384", sizes, windows=(24, 24, 0))
    h6b, h6b_dino = (dense_branches("internvit_6b mae_h", (small, 1024)) for small in (512, 768))
    quick: dict[str, Any] = {"activation": "gelu_tanh"}
    lh6b = dense_branches("internvit_6b mae_h deit3_l_384", (512, 1024, 1536), 4, **quick)
    h6b_quick = dense_branches("internvit_6b mae_h", (512, 1024), **quick)
    base = DetectionImages(size_divisor=64)
    large = DetectionImages(long_limit=1999, short_limit=1200, size_divisor=64)
    largest = DetectionImages(long_limit=2332, short_limit=1400, size_divisor=224)
    for name, settings, file, head, images in (
        (
            "dino_sbl_1792_1120_672",
            dense_settings(sbl, dino=True, halves=False),
            "dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms",
            DinoConfig(),
            largest,
        ),
        (
            "h6b_1024_512",
            dense_settings(h6b),
            "mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms",
            RcnnConfig(),
            base,
        ),
        (
            "h6b_1024_512_speedup",
            dense_settings(h6b_quick, interaction=FAST),
            None,
            RcnnConfig(),
            base,
        ),
        (
            "dino_h6b_1024_768",
            dense_settings(h6b_dino, dino=True),
            "dino_4scale_internvit_h6b_1024_768_fpn_1x_coco_bs32_ms",
            DinoConfig(),
            base,
        ),
        ("lh6b_1536_1024_512", dense_settings(lh6b, interaction=FAST), None, RcnnConfig(), large),
        (
            "dino_lh6b_1536_1024_512",
            dense_settings(lh6b, interaction=FAST, dino=True),
            None,
            DinoConfig(),
            large,
        ),
    ):
        quirk = SPEEDUP if name.endswith("speedup") else ""
        yield _published("detection", f"piip_det_{name}", settings, file, quirk, head=head, images=images)


def _convnext_detectors() -> Iterator[Published]:
    """Table II: ConvNeXt and ViT in every mixture, merged at four depths."""
    networks = {"ct": "convnext_t", "cs": "convnext_s", "cb": "convnext_b"}
    networks |= {"vt": "deit_t", "vs": "deit3_s", "vb": "deit3_b"}
    for mixture in ("ct_cs_cb", "ct_vs_vb", "ct_cs_vb", "ct_vs_cb", "vt_cs_vb", "vt_cs_cb", "vt_vs_cb"):
        encoders = " ".join(networks[network] for network in reversed(mixture.split("_")))
        settings = dense_settings(
            dense_branches(encoders, (448, 672, 1024), windows=14), merge="stages", halves=False
        )
        name, file = mixture, None
        if mixture == "ct_cs_cb":
            name, file = "convnext_tsb", "mask_rcnn_convnext-tsb_1024_672_448_regular-fpn"
        yield _published(
            "detection",
            f"piip_det_{name}_1024_672_448",
            settings,
            file,
            head=RcnnConfig(),
            images=DetectionImages(),
        )


def _baselines() -> Iterator[Published]:
    """One network on one image: Tables I, II and IV for detection, VIII for classification.

    ConvNeXt's twelve runs exchange nothing with anybody: they are where its maps of four strides leave.
    Its configuration normalises by halves, unlike the pyramids with ConvNeXt.
    """
    every_third: dict[str, Any] = {"windows": (14, 14, 0)}  # layer attends globally
    for name, encoder, interactions, arguments, file in (
        ("vitdet_b", "deit3_b", 0, every_third, "mask_rcnn_deit_vit_b_fpn_1x_coco_bs16"),
        ("vitdet_l", "deit3_l", 0, every_third, "mask_rcnn_deit_vit_l_fpn_1x_coco_bs16"),
        ("internvit_6b", "internvit_6b", 0, {}, "mask_rcnn_internvit_6b_fpn_1x_coco_bs16_ms"),
        ("convnext_b", "convnext_b", 12, {}, None),
    ):
        settings = dense_settings(dense_branches(encoder, [1024], interactions, **arguments), merge="none")
        images = DetectionImages(size_divisor=64) if name == "internvit_6b" else _plain(1024, 64)
        yield _published("detection", f"{name}_1024", settings, file, head=RcnnConfig(), images=images)
    for name, encoder, statistics in (("deit_b_224", "deit_b", {}), ("vit_l_224", "augreg_l", IMAGENET)):
        branches = plain_branches(encoder, [224], 0, class_token=True, class_slot=True, layer_scale=None)
        classifier = ClassifierSettings(branches=branches, head="cls", **statistics)
        yield _published("classification", name, classifier)


def _segmenters() -> Iterator[Published]:
    """Table VI, and the released ones, with InternViT-6B, whose FFN approximates GELU by tanh.

    Of three branches the crop is as large as branch 2's view, and branch 3's is enlarged from it.
    """
    for name, encoders, sizes in (("tsb", TSB, (336, 448, 896)), ("sbl", SBL, (336, 448, 1120))):
        yield _published(
            "segmentation",
            f"piip_seg_{name}_{_joined(sizes)}",
            dense_settings(
                dense_branches(encoders, sizes, windows=[0, 28, 28]), halves=False, image_branch=1
            ),
            quirk="no configuration was released: windows are inferred from the printed cost",
            head=UperNetConfig(),
            images=SegmentationImages(window=sizes[1], stride=sizes[1] * 2 // 3),
        )
    released: dict[str, Any] = {"drop_path": 0.4, "activation": "gelu_tanh"}
    training = "80k_ade20k_bs16_lr4e-5"
    alone = dense_branches("internvit_6b", [512], 0, position_grid=(32, 32), **released)
    settings = dense_settings(alone, merge="none", halves=False)
    own: dict[str, Any] = {
        "head": UperNetConfig(channels=1536, auxiliary_channels=1536),
        "images": SegmentationImages(),
    }
    file = f"upernet_internvit_6b_512_{training}"
    yield _published("segmentation", "internvit_6b_512", settings, file, **own)
    for small in (192, 256, 384, 512):
        branches = dense_branches(
            "internvit_6b mae_h", (small, 512), position_grid=_grids((small, 512)), **released
        )
        settings = dense_settings(branches, interaction=FAST, halves=False)
        file = f"upernet_internvit_h6b_{small}_512_{training}"
        yield _published("segmentation", f"piip_seg_h6b_512_{small}", settings, file, **own)


def _classifiers() -> Iterator[Published]:
    """Heads read the first patch token, as the released code does; drop path is constant over depth."""
    own: dict[str, Any] = {}
    tsb = ("tsb", "deit_b deit_s deit_t", [0.2, 0.05, 0.05], "deit1", 1.0, own)
    sbl = ("sbl", "augreg_l augreg_b augreg_s", [0.4, 0.2, 0.05], "augreg", None, IMAGENET)
    for (networks, encoders, drop_path, pretraining, layer_scale, statistics), sizes in (
        (tsb, (128, 192, 368)),
        (sbl, (96, 160, 320)),
        (sbl, (128, 192, 384)),
    ):
        branches = plain_branches(
            encoders,
            sizes,
            drop_path=drop_path,
            class_token=True,
            position_grid=_grids(sizes),
            layer_scale=layer_scale,
        )
        yield _published(
            "classification",
            f"piip_cls_{networks}_{_joined(sizes)}",
            ClassifierSettings(branches=branches, head="first_patch", **statistics),
            f"piip_3branch_{networks}_{_joined(sizes, '-')}_cls_token_{pretraining}",
            "the heads read the first patch token, not the class token",
        )
    sizes = (128, 256, 512)
    narrow = plain_branches(
        "vit_b vit_b vit_b",
        sizes,
        dim=[640, 320, 160],
        num_heads=[8, 4, 2],
        windows=[0, 0, 16],
        position_grid=_grids(sizes),
    )
    yield _published(  # PIIP-B, Table X, trained from scratch; the window of branch 3 is inferred
        "classification",
        "piip_cls_b_512_256_128",
        ClassifierSettings(branches=narrow, head="merge"),
    )


def _chats() -> Iterator[Published]:
    """PIIP-LLaVA. ImageNet statistics although one branch or both are CLIP's."""
    for release, encoders, sizes, interactions in (
        ("CLIP-BL_512-256_7B", "clip_l clip_b", (256, 512), 2),
        ("ConvNeXt-B_CLIP-L_640-224_7B", "clip_l convnext_b_clip", (224, 640), 2),
        ("CLIP-BL_512-448_7B", "clip_l_336 clip_b", (448, 512), 12),
        ("CLIP-BL_512-448_13B", "clip_l_336 clip_b", (448, 512), 12),
        ("ConvNeXt-B_CLIP-L_1024-336_7B", "clip_l_336 convnext_b_clip", (336, 1024), 12),
        ("ConvNeXt-B_CLIP-L_1024-336_13B", "clip_l_336 convnext_b_clip", (336, 1024), 24),
        ("ConvNeXt-L_CLIP-L_1024-336_7B", "clip_l_336 convnext_l_clip", (336, 1024), 12),
        ("ConvNeXt-L_CLIP-L_1024-336_13B", "clip_l_336 convnext_l_clip", (336, 1024), 24),
        ("Plus_ConvNeXt-L_CLIP-L_1024-336_7B", "clip_l_336 convnext_l_clip", (336, 1024), 12),
    ):
        joint = "-" if release.startswith("Plus") else "_"
        yield Published(
            name="piip_llava_" + release.lower().replace("-", "_"),
            task="chat",
            settings=PiipConfig(
                branches=plain_branches(encoders, sizes, interactions), framing="pad", **IMAGENET
            ),
            rules=_chat_rules,
            text_config=VICUNA_13B if release.endswith("13B") else VICUNA_7B,
            template="vicuna_v1",
            repository=f"OpenGVLab/PIIP-LLaVA{joint}{release}",
        )


PIIP: tuple[Published, ...] = (
    *_deit_detectors(),
    *_pretrained_detectors(),
    *_large_detectors(),
    *_convnext_detectors(),
    *_baselines(),
    *_segmenters(),
    *_classifiers(),
    *_chats(),
)
