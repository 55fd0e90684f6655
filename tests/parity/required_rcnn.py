"""What records of two-stage detectors may ask for: the values of settings that our code has built in.

The keys are those of the golden files.
"""

from __future__ import annotations

from record import Required

__all__ = ["REQUIRED"]

CODER: Required = {"clip_border": (True,)}
FPN: Required = {
    "norm": (None,),
    "activation": (None,),
    "upsample": ("nearest_to_size",),
    "extra_level": ("subsample_stride2_of_last_output",),
}
BOX_LOSS: Required = {"type": ("l1", "smooth_l1", "giou")}
RPN: Required = {
    "num_convs": (1,),
    "activation": ("relu",),
    "coder": CODER,
    "loss_cls": {"type": ("binary_cross_entropy",)},
    "loss_bbox": BOX_LOSS,
}
ASSIGNER: Required = {"ignore_iof_thr": (-1,)}
SAMPLER: Required = {"choice": ("first", "random")}
RPN_TRAIN: Required = {
    "assigner": ASSIGNER,
    "sampler": {**SAMPLER, "add_gt_as_proposals": (False,)},
    "pos_weight": (-1,),
}
RCNN_TRAIN: Required = {"assigner": ASSIGNER, "sampler": SAMPLER, "pos_weight": (-1,)}
REGIONS: Required = {"pool_mode": ("avg",)}
BOX_HEAD: Required = {
    "type": ("shared_2fc",),
    "activation": ("relu",),
    "coder": CODER,
    "loss_cls": {"type": ("softmax_cross_entropy",)},
    "loss_bbox": BOX_LOSS,
}
MASK_HEAD: Required = {
    "upsample": ("deconv2x2",),
    "activation": ("relu",),
    "class_agnostic": (False,),
    "loss_mask": {"type": ("mask_binary_cross_entropy",)},
}
ROI_HEAD: Required = {
    "bbox_roi_extractor": REGIONS,
    "mask_roi_extractor": REGIONS,
    "bbox_head": BOX_HEAD,
    "mask_head": MASK_HEAD,
}
GIVEN: Required = {**RCNN_TRAIN, "sampler": {**SAMPLER, "add_gt_as_proposals": (True,)}}
DETECTOR: Required = {
    "fpn": FPN,
    "rpn": RPN,
    "rpn_train": RPN_TRAIN,
    "roi_head": ROI_HEAD,
    "rcnn_train": GIVEN,
}
REQUIRED: dict[str, Required] = {
    "det.anchors": {},
    "det.box_coder": {"coders": CODER},
    "det.fpn": FPN,
    "det.rpn": {"rpn": RPN, "rpn_train": RPN_TRAIN},
    "det.roi_extractor": {"roi_extractor": REGIONS},
    "det.bbox_head": {"bbox_head": BOX_HEAD, "train": RCNN_TRAIN},
    "det.mask_head": {"mask_head": MASK_HEAD, "train": RCNN_TRAIN},
    "det.mask_rcnn": {**DETECTOR, "roi_head": {**ROI_HEAD, "stages": (1,), "stage_loss_weights": (None,)}},
    "det.cascade": {"roi_head": ROI_HEAD, "rcnn_train": GIVEN},
    "det.cascade_mask_rcnn": DETECTOR,
}
"""By kind. A list holds objects of which each is looked at: coders, and stages of a cascade."""
