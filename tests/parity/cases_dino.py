"""Golden files of DINO: its neck, its denoising, its matching, and all of it in test and in training.

Assignments are recorded as 0 for none and the object's number plus 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases_rcnn import extents_of, maps_of, objects_of
from record import Case, Record, Required, check_required
from stepwell.heads.channel_mapper import ChannelMapper
from stepwell.heads.dino import EPS, Dino, DinoConfig
from stepwell.heads.dino_denoising import DenoisingConfig, Draws, hidden_queries, spoil
from stepwell.heads.dino_matching import MatchConfig, SetLossConfig, Targets, assign, costs, set_losses
from stepwell.keys.dino import DINO, NECK
from stepwell.keys.engine import plan
from stepwell.structures import Size

__all__ = ["CASES"]

Settings = dict[str, Any]
GROUPS = "dynamic: max(1, floor(num_dn_queries / largest number of objects in a picture))"
TURN = (6.283185307179586,)
NECK_REQUIRED: Required = {
    "norm": ("groupnorm",),
    "norm_eps": (1e-5,),
    "conv_bias": (False,),
    "activation": (None,),
    "extra_level": ("3x3 convolution with stride 2 on the last input map, then the norm",),
}
DENOISING_REQUIRED: Required = {"groups": (GROUPS,), "inverse_sigmoid_eps": (EPS,)}
MATCHER_REQUIRED: Required = {
    "cls_cost": {"type": ("focal",), "eps": (1e-12,)},
    "box_cost": {
        "type": ("l1",),
        "target_format": ("cxcywh, normalised by the picture without padding",),
    },
    "iou_cost": {"type": ("giou",), "boxes": ("xyxy in pixels",)},
}
HEAD_REQUIRED: Required = {
    "activation": ("relu",),
    "norm": ("layernorm, after each part",),
    "deform_attention": {"value_masked_by_padding": (True,)},
    "positional_encoding": {
        "normalize": (True,),
        "scale": TURN,
        "eps": (1e-6,),
        "offset": (0.0,),
        "order": ("y, x",),
        "level_embedding_added": (True,),
    },
    "decoder_box_encoding": {
        "scale": TURN,
        "order": ("y, x, w, h",),
        "mlp": ("two linears with relu, input 2 * embed_dims",),
    },
    "two_stage": {
        "anchor_side": ("0.05 * 2 ** level",),
        "valid_range": ([0.01, 0.99],),
        "rank_by": ("largest class logit",),
        "queries": ("learned content, boxes from the encoder (detached)",),
    },
    "inverse_sigmoid_eps": (EPS,),
    "box_refine": ("look forward twice",),
    "cls_branch": ("one linear per layer and one for the encoder",),
    "reg_branch": ("three linears with relu per layer and one for the encoder",),
    "denoising": DENOISING_REQUIRED,
    "matcher": MATCHER_REQUIRED,
    "losses": {
        "loss_cls": {"type": ("focal",)},
        "loss_box": {"type": ("l1",)},
        "loss_iou": {"type": ("giou",)},
        "normaliser": ("matched objects of all pictures, at least 1, for all three losses",),
    },
    "test": {"rank_over": ("query x class, sigmoid",), "nms": (None,)},
}
REQUIRED: dict[str, Required] = {
    "det.channel_mapper": NECK_REQUIRED,
    "det.dino_denoising": {"denoising": DENOISING_REQUIRED},
    "det.dino_matching": {"matcher": MATCHER_REQUIRED, "head_for_losses": HEAD_REQUIRED},
    "det.dino": {"neck": NECK_REQUIRED, "head": HEAD_REQUIRED},
}
"""By kind, the values of settings that our code has built in."""


def _denoising(s: Settings) -> DenoisingConfig:
    return DenoisingConfig(
        num_queries=s["num_dn_queries"],
        label_noise=s["label_noise_scale"],
        box_noise=s["box_noise_scale"],
    )


def _matching(s: Settings) -> MatchConfig:
    return MatchConfig(
        classes=s["cls_cost"]["weight"],
        boxes=s["box_cost"]["weight"],
        giou=s["iou_cost"]["weight"],
        alpha=s["cls_cost"]["alpha"],
        gamma=s["cls_cost"]["gamma"],
    )


def _losses(s: Settings) -> SetLossConfig:
    return SetLossConfig(
        classes=s["loss_cls"]["weight"],
        boxes=s["loss_box"]["weight"],
        giou=s["loss_iou"]["weight"],
        alpha=s["loss_cls"]["alpha"],
        gamma=s["loss_cls"]["gamma"],
    )


def _config(head: Settings, neck: Settings) -> DinoConfig:
    attention = head["deform_attention"]
    return DinoConfig(
        dim=head["embed_dims"],
        num_levels=attention["num_levels"],
        num_queries=head["num_queries"],
        encoder_layers=head["encoder_layers"],
        decoder_layers=head["decoder_layers"],
        ffn_dim=head["ffn_channels"],
        deformable_heads=attention["num_heads"],
        query_heads=head["self_attention_heads"],
        num_points=attention["num_points"],
        norm_groups=neck["norm_groups"],
        norm_eps=head["norm_eps"],
        map_temperature=head["positional_encoding"]["temperature"],
        box_temperature=head["decoder_box_encoding"]["temperature"],
        denoising=_denoising(head["denoising"]),
        matching=_matching(head["matcher"]),
        losses=_losses(head["losses"]),
        max_detections=head["test"]["max_per_img"],
    )


def _draws(record: Record) -> Draws:
    names = ("noise_label_chance", "noise_new_label", "noise_sign", "noise_part")
    return Draws(*(record.inputs[name] for name in names))


def _parts(boxes: Tensor, size: Size) -> Tensor:
    """xyxy in pixels -> centre and size in parts of the image."""
    scaled = boxes / torch.tensor([size[1], size[0]] * 2)
    low, high = scaled[:, :2], scaled[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)


def _truths(record: Record) -> tuple[list[Tensor], list[Tensor], list[Size]]:
    """Labels, boxes in parts of the image, and sizes without padding, of every image."""
    objects, sizes = objects_of(record), [extent.valid for extent in extents_of(record.settings)]
    boxes = [_parts(image.boxes, size) for image, size in zip(objects, sizes, strict=True)]
    return [image.labels for image in objects], boxes, sizes


def _channel_mapper(record: Record) -> dict[str, Tensor]:
    s = record.settings
    widths = s["in_channels"]
    neck = ChannelMapper(
        widths, s["out_channels"], num_extra=s["num_outs"] - len(widths), num_groups=s["norm_groups"]
    )
    levels = record.load_into(neck, NECK)(maps_of(record, "f"))
    return {f"m{i}": level for i, level in enumerate(levels)}


def _noise(record: Record) -> dict[str, Tensor]:
    s = record.settings
    labels, boxes, _ = _truths(record)
    config = _denoising(s["denoising"])
    groups = config.groups(max(map(len, labels)))
    noisy = spoil(labels, boxes, _draws(record), groups, config, EPS)
    slots = noisy.labels.shape[1]
    (embedding,) = record.params.values()
    return {
        "query_label": embedding[noisy.labels] * noisy.is_used[..., None],
        "query_box": noisy.box_logits,
        "attention_mask": hidden_queries(slots, groups, s["num_queries"], torch.device("cpu")).byte(),
        "num_groups": torch.tensor(groups),
        "pad_size": torch.tensor(slots),
    }


def _detections(record: Record, head: Dino, logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    outputs = {}
    images = record.settings["images"]
    for i, (extent, image) in enumerate(zip(extents_of(record.settings), images, strict=True)):
        found = head.best(logits[i], boxes[i], extent)
        outputs[f"detections{i}"] = found.boxes / torch.tensor(image["scale_factor"])
        outputs[f"detection_scores{i}"], outputs[f"labels{i}"] = found.scores, found.labels
    return outputs


def _dino_matching(record: Record) -> dict[str, Tensor]:
    s = record.settings
    head_settings, config = s["head_for_losses"], _matching(s["matcher"])
    logits, boxes = record.inputs["logits"], record.inputs["boxes"]
    labels, truths, sizes = _truths(record)
    outputs, targets = {}, []
    for i, image in enumerate(zip(logits, boxes, labels, truths, sizes, strict=True)):
        for name, cost in zip(("cls_cost", "box_cost", "iou_cost"), costs(*image, config), strict=True):
            outputs[f"{name}{i}"] = cost
        objects = assign(*image, config)
        is_object = objects >= 0
        outputs[f"assigned{i}"] = objects + 1
        outputs[f"assigned_labels{i}"] = torch.where(is_object, labels[i][objects], -1)
        wanted = torch.where(is_object, labels[i][objects], head_settings["num_classes"])
        targets.append(Targets(wanted, truths[i][objects] * is_object[:, None]))
    count = torch.tensor(float(max(1, sum(map(len, labels)))))
    terms = set_losses(logits, boxes, targets, sizes, count, _losses(head_settings["losses"]))
    outputs |= dict(zip(("loss_cls", "loss_box", "loss_iou"), terms, strict=True))
    neck = {"norm_groups": 1}
    head = _config(head_settings, neck).build([8], [8], head_settings["num_classes"])
    return outputs | _detections(record, head, logits, boxes)


def _dino(record: Record) -> dict[str, Tensor]:
    head_settings, neck = record.settings["head"], record.settings["neck"]
    config = _config(head_settings, neck)
    if neck["num_outs"] != config.num_levels or neck["out_channels"] != config.dim:
        raise ValueError("the neck's maps are not what the transformer takes")
    widths = neck["in_channels"]
    head = config.build(widths, [8 * 2**i for i in range(len(widths))], head_settings["num_classes"])
    record.load_into(head, DINO)
    return {**_tested(record, head), **_trained(record, head)}


def _tested(record: Record, head: Dino) -> dict[str, Tensor]:
    maps, extents = maps_of(record, "f"), extents_of(record.settings)
    with torch.no_grad():
        outputs = {f"m{i}": level for i, level in enumerate(head.neck(maps))}
        encoded = head.encode(maps, extents)
        decoded = head.decode(encoded)
    outputs |= {
        "memory": encoded.memory,
        "encoder_logits": encoded.logits,
        "encoder_boxes": encoded.box_logits.sigmoid(),
        "decoder_states": torch.stack(decoded.states),
        "decoder_references": torch.stack(decoded.references),
        "logits": torch.stack(decoded.logits),
        "boxes": torch.stack(decoded.boxes),
    }
    found = head.detect(maps, extents)
    again = _detections(record, head, decoded.logits[-1], decoded.boxes[-1])
    assert all(torch.equal(image.scores, again[f"detection_scores{i}"]) for i, image in enumerate(found))
    return outputs | again


def _trained(record: Record, head: Dino) -> dict[str, Tensor]:
    maps = [x.clone().requires_grad_() for x in maps_of(record, "f")]
    extents, objects = extents_of(record.settings), objects_of(record)
    labels, boxes, sizes = _truths(record)
    noisy = head.noisy(labels, boxes, _draws(record))
    slots = noisy.labels.shape[1]
    with torch.no_grad():
        encoded = head.encode(maps, extents)
        decoded = head.decode(encoded, noisy)
    outputs = {
        "train_logits": torch.stack(decoded.logits),
        "train_boxes": torch.stack(decoded.boxes),
    }
    sets = {"encoder": (encoded.logits, encoded.box_logits.sigmoid())}
    for k, (logits, found) in enumerate(zip(decoded.logits, decoded.boxes, strict=True)):
        sets[f"layer{k}"] = (logits[:, slots:], found[:, slots:])
    for name, (logits, found) in sets.items():
        for i, image in enumerate(zip(logits, found, labels, boxes, sizes, strict=True)):
            outputs[f"train_assigned_{name}_{i}"] = assign(*image, head.config.matching) + 1

    with torch.enable_grad():
        losses = head.losses(maps, extents, objects, _draws(record))
        total = torch.stack(list(losses.values())).sum()
        total.backward()
    last = head.config.decoder_layers - 1
    for name, loss in losses.items():
        part, what = name.split("_")
        theirs = {"classes": "loss_cls", "boxes": "loss_bbox", "giou": "loss_iou"}[what]
        kind, number = part.rstrip("0123456789"), part.lstrip("abcdefghijklmnopqrstuvwxyz")
        prefix = "interm_" if kind == "encoder" else "" if int(number) == last else f"d{number}_"
        outputs[f"train_{prefix}{'dn_' * (kind == 'denoising')}{theirs}"] = loss.detach()
    outputs["train_loss"] = total.detach()
    for i, x in enumerate(maps):
        assert x.grad is not None
        outputs[f"grad_f{i}"] = x.grad
    names = {target.sources[0]: name for name, target in plan(record.params, DINO).targets.items()}
    norms = []
    for theirs in record.settings["grad_norm_order"]:
        gradient = head.get_parameter(names[theirs]).grad
        assert gradient is not None, theirs
        norms.append(gradient.norm())
    outputs["grad_norms"] = torch.stack(norms)
    return outputs


def _checked(case: Any) -> Case:
    def run(record: Record) -> dict[str, Tensor]:
        check_required(record.settings, REQUIRED[record.kind])
        answer: dict[str, Tensor] = case(record)
        return {name: value.detach() for name, value in answer.items()}

    return run


CASES: dict[str, Case] = {
    kind: _checked(case)
    for kind, case in {
        "det.channel_mapper": _channel_mapper,
        "det.dino_denoising": _noise,
        "det.dino_matching": _dino_matching,
        "det.dino": _dino,
    }.items()
}
