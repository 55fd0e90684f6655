"""Golden files of DINO: neck, denoising queries, matching, and the whole head with losses and gradients.

Images are told by `pad_shape` (of the batch), `img_shape` (the valid part), and the factors by which boxes go
back to the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from record import Case, Record, Required, Unsupported, check_required, checked
from stepwell.heads.channel_mapper import ChannelMapper
from stepwell.heads.dino import DenoisingConfig, Dino, DinoConfig, best_boxes
from stepwell.heads.dino_denoising import Draws, contents, denoising, num_groups, unseen_queries
from stepwell.heads.dino_matching import (
    BoxTerms,
    Truths,
    assign,
    average_over_processes,
    costs,
    set_losses,
)
from stepwell.heads.dino_transformer import refine
from stepwell.keys.dino import LABEL_EMBEDDING, NECK, dino_rules
from stepwell.keys.engine import plan
from stepwell.structures import Extent, FoundObjects, Objects

__all__ = ["CASES"]

NECK_REQUIRED: Required = {
    "norm": ("groupnorm",),
    "norm_eps": (1e-5,),
    "conv_bias": (False,),
    "activation": (None,),
    "extra_level": ("3x3 convolution with stride 2 on the last input map, then the norm",),
}
DENOISING_REQUIRED: Required = {
    "groups": ("dynamic: max(1, floor(num_dn_queries / largest number of objects in a picture))",),
    "inverse_sigmoid_eps": (1e-3,),
}
MATCHER_REQUIRED: Required = {
    "cls_cost": {"type": ("focal",), "eps": (1e-12,)},
    "box_cost": {"type": ("l1",), "target_format": ("cxcywh, normalised by the picture without padding",)},
    "iou_cost": {"type": ("giou",), "boxes": ("xyxy in pixels",)},
}
LOSSES_REQUIRED: Required = {
    "loss_cls": {"type": ("focal",)},
    "loss_box": {"type": ("l1",)},
    "loss_iou": {"type": ("giou",)},
    "normaliser": ("matched objects of all pictures, at least 1, for all three losses",),
}
TEST_REQUIRED: Required = {"rank_over": ("query x class, sigmoid",), "nms": (None,)}
HEAD_REQUIRED: Required = {
    "activation": ("relu",),
    "norm": ("layernorm, after each part",),
    "norm_eps": (1e-5,),
    "deform_attention": {"value_masked_by_padding": (True,)},
    "positional_encoding": {
        "normalize": (True,),
        "scale": (6.283185307179586,),
        "eps": (1e-6,),
        "offset": (0.0,),
        "order": ("y, x",),
        "level_embedding_added": (True,),
    },
    "decoder_box_encoding": {
        "scale": (6.283185307179586,),
        "order": ("y, x, w, h",),
        "mlp": ("two linears with relu, input 2 * embed_dims",),
    },
    "two_stage": {
        "anchor_side": ("0.05 * 2 ** level",),
        "valid_range": ([0.01, 0.99],),
        "rank_by": ("largest class logit",),
        "queries": ("learned content, boxes from the encoder (detached)",),
    },
    "inverse_sigmoid_eps": (1e-3,),
    "box_refine": ("look forward twice",),
    "cls_branch": ("one linear per layer and one for the encoder",),
    "reg_branch": ("three linears with relu per layer and one for the encoder",),
    "denoising": DENOISING_REQUIRED,
    "matcher": MATCHER_REQUIRED,
    "losses": LOSSES_REQUIRED,
    "test": TEST_REQUIRED,
}
REQUIRED: dict[str, Required] = {
    "det.channel_mapper": NECK_REQUIRED,
    "det.dino_denoising": {"denoising": DENOISING_REQUIRED},
    "det.dino_matching": {
        "matcher": MATCHER_REQUIRED,
        "losses": LOSSES_REQUIRED,
        "head_for_losses": {"test": TEST_REQUIRED},
    },
    "det.dino": {"neck": NECK_REQUIRED, "head": HEAD_REQUIRED},
}
TERMS = {"class": "cls", "box": "bbox", "giou": "iou"}
"""Our name of a loss -> theirs."""


def _maps(record: Record, *, grad: bool = False) -> list[Tensor]:
    names = [f"f{i}" for i in range(sum(name[0] == "f" for name in record.inputs))]
    return [record.inputs[name].clone().requires_grad_(grad) for name in names]


def _extents(record: Record) -> list[Extent]:
    images = record.settings["images"]
    return [Extent(valid=tuple(i["img_shape"]), padded=tuple(i["pad_shape"])) for i in images]


def _objects(record: Record) -> list[Objects]:
    inputs, images = record.inputs, range(len(record.settings["images"]))
    return [Objects(inputs[f"gt_boxes{i}"], inputs[f"gt_labels{i}"]) for i in images]


def _draws(record: Record) -> Draws:
    names = ("noise_label_chance", "noise_new_label", "noise_sign", "noise_part")
    chance, label, sign, part = (record.inputs[name] for name in names)
    return Draws(chance, label, sign * 2 - 1, part)


def _original(record: Record, found: Sequence[FoundObjects]) -> dict[str, Tensor]:
    """In pixels of the original images."""
    named: dict[str, Tensor] = {}
    for i, (image, detections) in enumerate(zip(record.settings["images"], found, strict=True)):
        named[f"detections{i}"] = detections.boxes / detections.boxes.new_tensor(image["scale_factor"])
        named[f"detection_scores{i}"] = detections.scores
        named[f"labels{i}"] = detections.labels
    return named


def _cost_terms(matcher: dict[str, Any]) -> BoxTerms:
    label = matcher["cls_cost"]
    return BoxTerms(
        label=label["weight"],
        alpha=label["alpha"],
        gamma=label["gamma"],
        box=matcher["box_cost"]["weight"],
        giou=matcher["iou_cost"]["weight"],
    )


def _loss_terms(losses: dict[str, Any]) -> BoxTerms:
    label = losses["loss_cls"]
    return BoxTerms(
        label=label["weight"],
        alpha=label["alpha"],
        gamma=label["gamma"],
        box=losses["loss_box"]["weight"],
        giou=losses["loss_iou"]["weight"],
    )


def _denoising(settings: dict[str, Any]) -> DenoisingConfig:
    return DenoisingConfig(
        num_queries=settings["num_dn_queries"],
        label_noise=settings["label_noise_scale"],
        box_noise=settings["box_noise_scale"],
    )


def _config(head: dict[str, Any], neck: dict[str, Any]) -> DinoConfig:
    attention = head["deform_attention"]
    if neck["num_outs"] != attention["num_levels"]:
        raise Unsupported(f"{neck['num_outs']} maps for {attention['num_levels']} levels")
    if neck["out_channels"] != head["embed_dims"]:
        raise Unsupported(f"a neck of width {neck['out_channels']} before a head of {head['embed_dims']}")
    return DinoConfig(
        dim=head["embed_dims"],
        num_levels=attention["num_levels"],
        norm_groups=neck["norm_groups"],
        num_queries=head["num_queries"],
        encoder_layers=head["encoder_layers"],
        decoder_layers=head["decoder_layers"],
        ffn_dim=head["ffn_channels"],
        num_heads=attention["num_heads"],
        num_points=attention["num_points"],
        self_attention_heads=head["self_attention_heads"],
        cell_temperature=head["positional_encoding"]["temperature"],
        box_temperature=head["decoder_box_encoding"]["temperature"],
        denoising=_denoising(head["denoising"]),
        cost=_cost_terms(head["matcher"]),
        loss=_loss_terms(head["losses"]),
        max_detections=head["test"]["max_per_img"],
    )


def _channel_mapper(record: Record) -> dict[str, Tensor]:
    s = record.settings
    mapper = ChannelMapper(
        s["in_channels"], s["out_channels"], num_levels=s["num_outs"], num_groups=s["norm_groups"]
    )
    return {f"m{i}": x for i, x in enumerate(record.load_into(mapper, NECK)(_maps(record)))}


def _dino_denoising(record: Record) -> dict[str, Tensor]:
    s, config = record.settings, _denoising(record.settings["denoising"])
    truths = Truths.of(_extents(record), _objects(record), like=record.inputs["noise_part"])
    denoised = denoising(
        (truths.boxes / truths.scale).split(truths.counts),
        truths.labels.split(truths.counts),
        _draws(record),
        num_groups(truths.counts, config.num_queries),
        label_noise=config.label_noise,
        box_noise=config.box_noise,
    )
    table = nn.ModuleDict({"label_embedding": nn.Embedding(s["num_classes"], s["embed_dims"])})
    return {
        "query_label": contents(record.load_into(table, LABEL_EMBEDDING)["label_embedding"], denoised),
        "query_box": denoised.box_logits,
        "attention_mask": unseen_queries(denoised, s["num_queries"]).to(torch.uint8),
        "pad_size": torch.tensor(denoised.num_queries),
        "num_groups": torch.tensor(denoised.groups),
    }


def _dino_matching(record: Record) -> dict[str, Tensor]:
    s = record.settings
    logits, boxes = record.inputs["logits"], record.inputs["boxes"]
    terms, extents, objects = _cost_terms(s["matcher"]), _extents(record), _objects(record)
    truths = Truths.of(extents, objects, like=boxes)
    assigned = assign(logits[None], boxes[None], truths, terms)
    outputs = _assignments(assigned[0], objects, "assigned{image}", "assigned_labels{image}")
    for i, (logit, box) in enumerate(zip(logits, boxes, strict=True)):
        cost = costs(logit, box, truths.by_image()[i], terms)
        outputs |= {f"{name}_cost{i}": c for name, c in zip(("cls", "box", "iou"), cost, strict=True)}
    count = average_over_processes((assigned >= 0).sum().to(logits.dtype))
    losses = set_losses(logits[None], boxes[None], assigned, truths, _loss_terms(s["losses"]), count)
    outputs |= {f"loss_{name}": loss[0] for name, loss in zip(("cls", "box", "iou"), losses, strict=True)}
    found = best_boxes(logits, boxes, extents, s["head_for_losses"]["test"]["max_per_img"])
    return outputs | _original(record, found)


def _assignments(
    assigned: Tensor, objects: Sequence[Objects], name: str, labels: str = ""
) -> dict[str, Tensor]:
    """(B, Q) of one set -> by image: the object, counted in it from 1 on, else 0; its label, else -1."""
    named, first = {}, 0
    for image, (row, of_image) in enumerate(zip(assigned, objects, strict=True)):
        number = torch.where(row >= 0, row - first + 1, 0)
        named[name.format(image=image)] = number
        if labels:
            named[labels.format(image=image)] = torch.cat([torch.tensor([-1]), of_image.labels])[number]
        first += len(of_image.labels)
    return named


def _dino(record: Record) -> dict[str, Tensor]:
    check_required(record.settings, REQUIRED["det.dino"])
    s = record.settings
    config = _config(s["head"], s["neck"])
    dino = Dino(s["neck"]["in_channels"], s["head"]["num_classes"], config)
    record.load_into(dino, dino_rules(config.encoder_layers, config.decoder_layers))
    with torch.no_grad():
        outputs = _tested(record, dino)
    outputs |= _trained(record, dino)
    return {name: outputs[name] for name in record.outputs if name in outputs}  # some leave large ones out


def _tested(record: Record, dino: Dino) -> dict[str, Tensor]:
    maps, extents = _maps(record), _extents(record)
    memory = dino.encode(maps, extents)
    selection = dino.select(memory)
    layers = dino.decode(memory, selection)
    predictions = dino.predict(layers)
    last = refine(dino.box_heads[len(layers) - 1], layers[-1].hidden, layers[-1].references)
    return {
        **{f"m{i}": x for i, x in enumerate(dino.neck(maps))},
        "memory": memory.cells,
        "encoder_logits": selection.logits,
        "encoder_boxes": selection.boxes,
        "decoder_states": torch.stack([layer.states for layer in layers]),
        "decoder_references": torch.stack([*(layer.references for layer in layers), last]),
        "logits": predictions.logits,
        "boxes": predictions.boxes,
        **_original(record, dino.detect(maps, extents)),
    }


def _trained(record: Record, dino: Dino) -> dict[str, Tensor]:
    maps, objects = _maps(record, grad=True), _objects(record)
    matched = dino.match(maps, _extents(record), objects, draws=_draws(record))
    outputs = {
        "train_logits": torch.cat([matched.spoilt.logits, matched.found.logits[1:]], 2),
        "train_boxes": torch.cat([matched.spoilt.boxes, matched.found.boxes[1:]], 2),
    }
    for k, assigned in enumerate(matched.assigned):
        name = f"train_assigned_layer{k - 1}_{{image}}" if k else "train_assigned_encoder_{image}"
        outputs |= _assignments(assigned, objects, name)
    losses = dino.losses_of(matched)
    outputs |= {_their_name(name, dino): loss for name, loss in losses.items()}
    outputs["train_loss"] = torch.stack(list(losses.values())).sum()

    outputs["train_loss"].backward()
    outputs |= {f"grad_f{i}": x.grad for i, x in enumerate(maps) if x.grad is not None}
    rules = dino_rules(dino.config.encoder_layers, dino.config.decoder_layers)
    ours = {target.sources[0]: name for name, target in plan(record.params, rules).targets.items()}
    parameters = dict(dino.named_parameters())
    gradients = [parameters[ours[name]].grad for name in record.settings["grad_norm_order"]]
    return outputs | {
        "grad_norms": torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])
    }


def _their_name(name: str, dino: Dino) -> str:
    """Of a loss; the last layer's has no number."""
    of, term = name.rsplit("_", 1)
    loss = f"loss_{TERMS[term]}"
    if of == "encoder":
        return f"train_interm_{loss}"
    layer = int(of.removeprefix("layer").removeprefix("denoising")) - 1
    which = "" if layer == dino.config.decoder_layers - 1 else f"d{layer}_"
    return f"train_{which}{'dn_' if of.startswith('denoising') else ''}{loss}"


CASES: dict[str, Case] = {
    **{
        kind: checked(case, REQUIRED)
        for kind, case in (
            ("det.channel_mapper", _channel_mapper),
            ("det.dino_denoising", _dino_denoising),
            ("det.dino_matching", _dino_matching),
        )
    },
    "det.dino": _dino,
}
