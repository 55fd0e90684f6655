"""Golden files of segmentation and of images for detection: UperNet with its losses, windows, sizes, pixels.

Sizes are [height, width]; images of records are blue, green, red; statistics are of pixels in 0..255.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from record import Case, Record, Required, TableCheck, Unsupported, check_required
from stepwell.heads.sliding import class_map, slide
from stepwell.heads.upernet import UperNet, UperNetConfig
from stepwell.keys.engine import Prefix, Rename, plan
from stepwell.keys.upernet import UPERNET
from stepwell.ops.resize import resize_map
from stepwell.ops.sliding_windows import windows
from stepwell.structures import Size
from stepwell.views.resize import (
    boxes_in,
    pad_batch,
    padded_size,
    prepare_image,
    scale_factors,
    size_of_short_side,
    size_within,
)

__all__ = ["CASES"]

_LOSS: Required = {
    "type": ("softmax_cross_entropy",),
    "average_over": ("all pixels, ignored ones included",),
    "logits_resized_to_label": ("bilinear, corners not aligned",),
}
_HEAD: Required = {
    "norm": ("batchnorm",),
    "norm_eps": (1e-5,),
    "norm_momentum": (0.1,),
    "conv_bias": (False,),
    "activation": ("relu",),
    "align_corners": (False,),
    "resize": ("bilinear",),
    "loss": _LOSS,
}
_AUXILIARY: Required = {**_HEAD, "num_convs": (1,), "kernel_size": (3,), "concat_input": (False,)}
UPERNET_REQUIRED: Required = {
    "content": ("heads", "slide"),
    "mode": ("eval", "train"),
    "decode_head": {**_HEAD, "loss": {**_LOSS, "weight": (1.0,)}},
    "auxiliary_head": _AUXILIARY,
    "stub_backbone": {"kernel": ("equal to the stride, no padding",), "bias": (True,)},
    "test": {
        "mode": ("slide",),
        "average": ("logits",),
        "last_crop": ("moved back to end at the border",),
        "resize_to_original": ("bilinear, corners not aligned, before the softmax",),
    },
}
DETECTION_REQUIRED: Required = {
    "to_rgb": (True,),
    "keep_ratio": (True,),
    "resize": ("bilinear (OpenCV, 8 bit)",),
    "round": ("floor(side * scale + 0.5)",),
    "pad_value": (0,),
    "pad_after_normalisation": (True,),
    "pad_side": ("right and bottom",),
}
SEGMENTATION_REQUIRED: Required = {
    "to_rgb": (True,),
    "rule": (
        "short side to max(min(img_scale), crop), long side follows; no limit on the long side; then both "
        "limits again through the keep-ratio rule",
    ),
    "padding": (None,),
}


def _upernet(record: Record) -> dict[str, Tensor]:
    s = record.settings
    check_required(s, UPERNET_REQUIRED)
    return _heads(record) if s["content"] == "heads" else _slide(record)


def _build(s: dict[str, Any]) -> UperNet:
    decode, auxiliary = s["decode_head"], s["auxiliary_head"]
    count = len(decode["in_channels"])
    same = {key: (decode[key],) for key in ("num_classes", "dropout_ratio")}
    width = decode["in_channels"][auxiliary["in_index"]]
    loss = {"ignore_index": (decode["loss"]["ignore_index"],)}
    check_required(auxiliary, {**same, "in_channels": (width,), "loss": loss}, "auxiliary_head.")
    check_required(decode, {"in_index": (list(range(count)),)}, "decode_head.")
    config = UperNetConfig(
        channels=decode["channels"],
        pool_sizes=tuple(decode["pool_scales"]),
        auxiliary_channels=auxiliary["channels"],
        auxiliary_map=auxiliary["in_index"],
        auxiliary_weight=auxiliary["loss"]["weight"],
        dropout=decode["dropout_ratio"],
        ignored_label=decode["loss"]["ignore_index"],
    )
    return config.build(decode["in_channels"], [4 * 2**i for i in range(count)], decode["num_classes"])


def _heads(record: Record) -> dict[str, Tensor]:
    """Running statistics are read after one pass; the logits take a second one."""
    s = record.settings
    head = record.load_into(_build(s), UPERNET).train(s["mode"] == "train")
    maps = [record.inputs[f"f{i}"].requires_grad_() for i in range(len(s["decode_head"]["in_channels"]))]
    labels = record.inputs["label"]
    assert head.auxiliary is not None
    losses = head.losses(maps, labels)
    total = losses["segmentation"] + losses["auxiliary"]
    wanted = {name: head.get_parameter(_ours(name)) for name in s["grad_norm_order"]}
    gradients = torch.autograd.grad(total, [*maps, *wanted.values()])
    outputs = {
        "loss_decode": losses["segmentation"],
        "loss_auxiliary": losses["auxiliary"],
        "loss": total,
        "grad_norms": torch.stack([gradient.norm() for gradient in gradients[len(maps) :]]),
        **{f"grad_f{i}": gradient for i, gradient in enumerate(gradients[: len(maps)])},
    }
    if s["mode"] == "train":
        ours = head.state_dict()
        buffers = [name for name in record.params if "running" in name]
        outputs |= {f"buffer.{name}": ours[_ours(name)].clone() for name in buffers}
    with torch.no_grad():
        logits = {
            "decode": head(maps),
            "auxiliary": head.auxiliary(maps[s["auxiliary_head"]["in_index"]]),
        }
    for name, values in logits.items():
        outputs[f"{name}_logits"] = values
        outputs[f"accuracy_{name}"] = _accuracy(values, labels, s["decode_head"]["loss"]["ignore_index"])
    return outputs


def _ours(name: str) -> str:
    (ours,) = plan([name], UPERNET).targets
    return ours


def _accuracy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """(1,): the share, in percent, of the pixels with a class that is the one with the largest logit."""
    kept = labels != ignored
    right = class_map(logits, labels.shape[-2:])[kept] == labels[kept]
    return 100 * right.float().mean()[None]


class _StandIn(nn.Module):
    """A convolution per map in the place of a backbone, and the head behind them."""

    def __init__(self, channels: list[int], strides: list[int], head: UperNet) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(
            nn.Conv2d(3, c, k, stride=k) for c, k in zip(channels, strides, strict=True)
        )
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        return resize_map(self.head([conv(image) for conv in self.backbone]), image.shape[-2:])


def _slide(record: Record) -> dict[str, Tensor]:
    s = record.settings
    if s["mode"] != "eval":
        raise Unsupported(f"mode {s['mode']!r} of content 'slide': ours is 'eval'")
    check_required(s, {"img_shape": (list(record.inputs["image"].shape[-2:]),)})
    stub, test = s["stub_backbone"], s["test"]
    model = _StandIn(stub["channels"], stub["strides"], _build(s))
    backbone = Rename(r"(\d+\.(?:weight|bias))", r"\1")
    rules = [Prefix(r"backbone\.convs\.", "backbone.", [backbone]), Prefix("", "head.", UPERNET)]
    record.load_into(model, rules)
    image = record.inputs["image"]
    crop, stride = _size(test["crop_size"]), _size(test["stride"])
    with torch.no_grad():
        logits = slide(model, image, crop=crop, stride=stride)
        seen = windows((image.shape[-2], image.shape[-1]), crop, stride)
        first, last = (model(image[..., w.top : w.bottom, w.left : w.right]) for w in (seen[0], seen[-1]))
    at_original = resize_map(logits, s["ori_shape"])
    return {
        "logits": logits,
        "crop0_logits": first,
        "last_crop_logits": last,
        "logits_original_size": at_original,
        "probabilities": at_original.softmax(1),
        "prediction": class_map(logits, s["ori_shape"]),
        "num_crops": torch.tensor(len(seen)),
    }


def _size(pair: list[int]) -> Size:
    height, width = pair
    return height, width


def _detection(record: Record) -> dict[str, Tensor] | TableCheck:
    if record.table:
        return _detection_table(record)
    for i, pipeline in enumerate(record.settings["pipelines"]):
        check_required(pipeline, DETECTION_REQUIRED, f"pipelines.{i}.")
    content = {"sizes": _detection_sizes, "images": _detection_images}
    check_required(record.settings, {"content": tuple(content)})
    return content[record.settings["content"]](record)


def _detection_sizes(record: Record) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    sizes, boxes = record.inputs["sizes"].tolist(), record.inputs["boxes"]
    for i, pipeline in enumerate(record.settings["pipelines"]):
        rows = [
            _prepared(size, pipeline["img_scale"], pipeline["size_divisor"]) for size in map(_size, sizes)
        ]
        resized = [
            boxes_in(box, _size(size), row[0]) for box, size, row in zip(boxes, sizes, rows, strict=True)
        ]
        back = [
            boxes_in(box, row[0], _size(size)) for box, size, row in zip(resized, sizes, rows, strict=True)
        ]
        outputs |= {
            f"resized{i}": torch.tensor([row[0] for row in rows]),
            f"padded{i}": torch.tensor([row[1] for row in rows]),
            f"scale_factor{i}": torch.tensor([row[2] for row in rows]),
            f"boxes_resized{i}": torch.stack(resized),
            f"boxes_back{i}": torch.stack(back),
        }
    return outputs


def _prepared(size: Size, limits: list[int], divisor: int) -> tuple[Size, Size, tuple[float, ...]]:
    """Resized, padded, scale factor."""
    long, short = limits
    resized = size_within(size, (long, short))
    return resized, padded_size(resized, divisor), scale_factors(size, resized) * 2


def _detection_table(record: Record) -> TableCheck:
    differences = []
    for number, row in enumerate(record.table["rows"]):
        size = _size(row["original"])
        resized, padded, factors = _prepared(size, row["img_scale"], row["size_divisor"])
        boxes = boxes_in(torch.tensor(row["boxes"]), size, resized)
        pairs = [
            ("resized", torch.tensor(resized), 0.0),
            ("padded", torch.tensor(padded), 0.0),
            ("scale_factor", torch.tensor(factors), 1e-6),
            ("boxes_resized", boxes, 1e-2),
            ("boxes_back", boxes_in(boxes, resized, size), 1e-2),
        ]
        differences += [
            f"row {number}: {name}"
            for name, ours, allowed in pairs
            if not torch.allclose(ours.double(), torch.tensor(row[name]).double(), rtol=0, atol=allowed)
        ]
    return TableCheck(("sizes, scale factors, boxes",), differences=tuple(differences))


def _detection_images(record: Record) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for i, pipeline in enumerate(record.settings["pipelines"]):
        mean, std = _statistics(pipeline)
        for j in range(len(record.inputs)):
            image = record.inputs[f"image{j}"].flip(-1).permute(2, 0, 1)
            size = (image.shape[-2], image.shape[-1])
            resized, padded, factors = _prepared(size, pipeline["img_scale"], pipeline["size_divisor"])
            batch, _ = pad_batch([prepare_image(image, resized, mean, std)], pipeline["size_divisor"])
            outputs |= {
                f"tensor{i}_{j}": batch[0],
                f"resized{i}_{j}": torch.tensor(resized),
                f"padded{i}_{j}": torch.tensor(padded),
                f"scale_factor{i}_{j}": torch.tensor(factors),
            }
    return outputs


def _statistics(pipeline: dict[str, Any]) -> tuple[list[float], list[float]]:
    mean, std = ([value / 255 for value in pipeline[name]] for name in ("mean", "std"))
    return mean, std


def _segmentation(record: Record) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    sizes = [_size(size) for size in record.inputs["sizes"].tolist()]
    for i, pipeline in enumerate(record.settings["pipelines"]):
        check_required(pipeline, SEGMENTATION_REQUIRED, f"pipelines.{i}.")
        short = max(*pipeline["crop_size"][:1], min(pipeline["img_scale"]))
        resized = [size_of_short_side(size, short) for size in sizes]
        outputs[f"resized{i}"] = torch.tensor(resized)
        factors = [scale_factors(*pair) * 2 for pair in zip(sizes, resized, strict=True)]
        outputs[f"scale_factor{i}"] = torch.tensor(factors)
    return outputs


CASES: dict[str, Case] = {
    "det.preprocess": _detection,
    "seg.preprocess": _segmentation,
    "seg.upernet": _upernet,
}
