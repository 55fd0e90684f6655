"""A straightforward Mask R-CNN behind four maps, the peer of the benchmark: torchvision's parts with the
official numbers, where its constructors take them.

Nothing is resized or normalised before it and no mask is pasted after it: the image comes prepared. What
torchvision does another way costs the same: rounded anchors, RoIAlign without the half-pixel shift, smooth L1
for L1, the background first instead of last. Samples of RoIAlign are adaptive, as in the official code.
Letters: B batch, C width of a map, n objects or detections of an image.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from stepwell.structures import Extent, FoundObjects, Objects

WIDTH = 256
STRIDES = (4, 8, 16, 32, 64)
OFFICIAL_NAMES = {  # patterns of torchvision's names -> the released ones
    r"fpn\.inner_blocks\.(\d)\.0": r"neck.lateral_convs.\1.conv",
    r"fpn\.layer_blocks\.(\d)\.0": r"neck.fpn_convs.\1.conv",
    r"rpn\.head\.conv\.0\.0": "rpn_head.rpn_conv",
    r"rpn\.head\.cls_logits": "rpn_head.rpn_cls",
    r"rpn\.head\.bbox_pred": "rpn_head.rpn_reg",
    r"roi_heads\.box_head\.fc6": "roi_head.bbox_head.shared_fcs.0",
    r"roi_heads\.box_head\.fc7": "roi_head.bbox_head.shared_fcs.1",
    r"roi_heads\.box_predictor\.cls_score": "roi_head.bbox_head.fc_cls",
    r"roi_heads\.box_predictor\.bbox_pred": "roi_head.bbox_head.fc_reg",
    r"roi_heads\.mask_head\.(\d)\.0": r"roi_head.mask_head.convs.\1.conv",
    r"roi_heads\.mask_predictor\.conv5_mask": "roi_head.mask_head.upsample",
    r"roi_heads\.mask_predictor\.mask_fcn_logits": "roi_head.mask_head.conv_logits",
}


class Pyramid(FeaturePyramidNetwork):
    """The network that torchvision calls a backbone, with the width it wants to know."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__(list(dims), WIDTH, LastLevelMaxPool())
        self.out_channels = WIDTH


class PeerMaskRcnn(nn.Module):
    """score_threshold: 0.05 is official. Weights that have learnt nothing give every class a score of about
    1/81; at 0 the second stage then has as much to sort and suppress as it ever can, and ends with 100
    detections, whatever the weights."""

    def __init__(self, dims: Sequence[int], num_classes: int = 80, *, score_threshold: float = 0.0) -> None:
        super().__init__()
        self.fpn = Pyramid(dims)
        names = ["0", "1", "2", "3"]
        parts = MaskRCNN(
            self.fpn,
            num_classes + 1,
            rpn_anchor_generator=AnchorGenerator(
                tuple((8 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES)
            ),
            rpn_pre_nms_top_n_train=2000,
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_train=1000,
            rpn_post_nms_top_n_test=1000,
            rpn_nms_thresh=0.7,
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=0),
            box_score_thresh=score_threshold,
            box_nms_thresh=0.5,
            box_detections_per_img=100,
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=0),
        )
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads

    def detect(self, maps: Sequence[Tensor], extents: Sequence[Extent]) -> list[FoundObjects]:
        """maps: (B, C, h, w), finest first; in evaluation mode."""
        features, images = self._features(maps), _images(extents)
        proposals, _ = self.rpn(images, features)
        found, _ = self.roi_heads(features, proposals, images.image_sizes)
        return [FoundObjects(x["boxes"], x["scores"], x["labels"] - 1, x["masks"][:, 0]) for x in found]

    def losses(
        self, maps: Sequence[Tensor], extents: Sequence[Extent], objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """In training mode."""
        features, images = self._features(maps), _images(extents)
        targets = [{"boxes": x.boxes, "labels": x.labels + 1, "masks": x.masks} for x in objects]
        proposals, first = self.rpn(images, features, targets)
        _, second = self.roi_heads(features, proposals, images.image_sizes, targets)
        return {**first, **second}

    def official_weights(self) -> dict[str, Tensor]:
        """Under the released names, the background last and without boxes and masks of its own."""
        weights = {}
        for name, weight in self.state_dict().items():
            part, kind = name.rsplit(".", 1)
            (official,) = (
                re.sub(pattern, to, part)
                for pattern, to in OFFICIAL_NAMES.items()
                if re.fullmatch(pattern, part)
            )
            match official.rsplit(".", 1)[-1]:
                case "fc_cls":
                    weight = weight.roll(-1, 0)
                case "fc_reg":
                    weight = weight[4:]
                case "conv_logits":
                    weight = weight[1:]
            weights[f"{official}.{kind}"] = weight
        return weights

    def _features(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The official heads compute in single precision whatever the backbone does."""
        return self.fpn(OrderedDict((str(i), x.float()) for i, x in enumerate(maps)))


def _images(extents: Sequence[Extent]) -> ImageList:
    """Of which torchvision asks the sizes alone."""
    height, width = (max(extent.padded[i] for extent in extents) for i in range(2))
    return ImageList(torch.empty(len(extents), 0, height, width), [extent.valid for extent in extents])
