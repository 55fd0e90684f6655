"""What settings of golden files of two-stage detectors are in ours."""

from __future__ import annotations

from typing import Any

from record import Unsupported, check_required
from stepwell.heads.anchors import AnchorConfig
from stepwell.heads.assign import Assignment, Sampling
from stepwell.heads.box_coder import BoxCoder
from stepwell.heads.box_head import BoxHeadConfig, Selection
from stepwell.heads.box_loss import BoxLoss
from stepwell.heads.cascade import CascadeConfig, StageConfig
from stepwell.heads.mask_head import MaskHeadConfig
from stepwell.heads.rpn import ProposalConfig, RpnConfig
from stepwell.heads.two_stage import RegionConfig

__all__ = [
    "Settings",
    "anchor_config",
    "assignment",
    "box_head_config",
    "box_loss",
    "cascade_config",
    "check_mask_size",
    "coder_of",
    "mask_head_config",
    "num_classes_of",
    "proposal_config",
    "region_config",
    "rpn_config",
    "sampling",
    "selection",
    "shared",
    "stages",
]

Settings = dict[str, Any]


def anchor_config(s: Settings) -> AnchorConfig:
    return AnchorConfig(scales=s["scales"], ratios=s["ratios"], offset=s["center_offset"])


def coder_of(s: Settings) -> BoxCoder:
    return BoxCoder(means=s["means"], stds=s["stds"], smallest_ratio=s["wh_ratio_clip"])


def box_loss(s: Settings) -> BoxLoss:
    return BoxLoss(measure=s["type"], weight=s["weight"], **({"beta": s["beta"]} if "beta" in s else {}))


def assignment(s: Settings) -> Assignment:
    return Assignment(
        positive=s["pos_iou_thr"],
        negative=s["neg_iou_thr"],
        smallest=s["min_pos_iou"],
        low_quality=s["match_low_quality"],
    )


def sampling(s: Settings) -> Sampling:
    most = None if s["neg_pos_ub"] < 0 else s["neg_pos_ub"]
    return Sampling(num=s["num"], positive=s["pos_fraction"], most_negatives=most, choice=s["choice"])


def proposal_config(s: Settings) -> ProposalConfig:
    return ProposalConfig(
        per_level=s["nms_pre"], iou=s["nms_iou"], num=s["max_per_img"], smallest=s["min_bbox_size"]
    )


def selection(s: Settings) -> Selection:
    return Selection(above=s["score_thr"], iou=s["nms_iou"], num=s["max_per_img"])


def rpn_config(s: Settings, train: Settings, training: Settings, testing: Settings) -> RpnConfig:
    return RpnConfig(
        dim=s["feat_channels"],
        anchors=anchor_config(s["anchors"]),
        coder=coder_of(s["coder"]),
        assignment=assignment(train["assigner"]),
        sampling=sampling(train["sampler"]),
        border=None if train["allowed_border"] < 0 else train["allowed_border"],
        training=proposal_config(training),
        testing=proposal_config(testing),
        box_loss=box_loss(s["loss_bbox"]),
        objectness_weight=s["loss_cls"]["weight"],
    )


def box_head_config(s: Settings) -> BoxHeadConfig:
    return BoxHeadConfig(
        dim=s["fc_out_channels"],
        per_class=not s["reg_class_agnostic"],
        coder=coder_of(s["coder"]),
        box_loss=box_loss(s["loss_bbox"]),
        class_weight=s["loss_cls"]["weight"],
    )


def mask_head_config(s: Settings) -> MaskHeadConfig:
    return MaskHeadConfig(
        num_convs=s["num_convs"],
        dim=s["conv_out_channels"],
        kernel_size=s["kernel_size"],
        weight=s["loss_mask"]["weight"],
    )


def region_config(s: Settings) -> RegionConfig:
    boxes, masks = s["bbox_roi_extractor"], s["mask_roi_extractor"]
    alike = {key: (value,) for key, value in boxes.items() if key != "output_size"}
    check_required(masks, alike, "mask_roi_extractor.")
    return RegionConfig(
        box_side=boxes["output_size"],
        mask_side=masks["output_size"],
        finest=boxes["finest_scale"],
        samples=boxes["sampling_ratio"],
        aligned=boxes["aligned"],
    )


def shared(s: Settings) -> dict[str, Any]:
    """Settings of any two-stage detector; those of neck and RPN are left out where a record has none."""
    roi = s["roi_head"]
    shared: dict[str, Any] = {
        "dim": roi["bbox_roi_extractor"]["channels"],
        "regions": region_config(roi),
        "mask": mask_head_config(roi["mask_head"]),
        "selection": selection(s["rcnn_test"]),
    }
    if "rpn" in s:
        rpn = rpn_config(s["rpn"], s["rpn_train"], s["train_proposals"], s["test_proposals"])
        num_extra = s["fpn"]["num_outs"] - len(s["fpn"]["in_channels"])
        strides = roi["bbox_roi_extractor"]["strides"]
        if s["rpn"]["anchors"]["strides"] != [
            *strides,
            *(strides[-1] * 2 ** (k + 1) for k in range(num_extra)),
        ]:
            raise Unsupported(
                f"anchors of strides {s['rpn']['anchors']['strides']} with regions of {strides}"
            )
        shared |= {"rpn": rpn, "num_extra": num_extra}
    return shared


def check_mask_size(train: Settings, regions: RegionConfig) -> None:
    check_required(train, {"mask_size": (2 * regions.mask_side,)}, "rcnn_train.")


def stages(s: Settings) -> tuple[StageConfig, ...]:
    roi, train = s["roi_head"], s["rcnn_train"]
    return tuple(
        StageConfig(
            box=box_head_config(box),
            assignment=assignment(own["assigner"]),
            sampling=sampling(own["sampler"]),
            weight=weight,
        )
        for box, own, weight in zip(roi["bbox_head"], train, roi["stage_loss_weights"], strict=True)
    )


def cascade_config(s: Settings) -> CascadeConfig:
    config = CascadeConfig(**shared(s), stages=stages(s))
    for own in s["rcnn_train"]:
        check_mask_size(own, config.regions)
    if s["roi_head"]["stages"] != len(config.stages):
        raise Unsupported(f"roi_head.stages {s['roi_head']['stages']} of {len(config.stages)} box heads")
    return config


def num_classes_of(s: Settings) -> int:
    (num,) = {head["num_classes"] for head in s["roi_head"]["bbox_head"]}
    return int(num)
