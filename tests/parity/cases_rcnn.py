"""Golden files of two-stage detectors: how each kind is built from its settings and run.

Their pictures are our images; boxes of detections go back to the original picture by its scale factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from record import Case, Record, Required, TableCheck, check_required
from required_rcnn import REQUIRED
from settings_rcnn import (
    Settings,
    anchor_config,
    assignment,
    box_head_config,
    cascade_config,
    check_mask_size,
    coder_of,
    mask_head_config,
    num_classes_of,
    rpn_config,
    sampling,
    selection,
    shared,
)
from stepwell.heads.anchors import are_valid, base_anchors, grid_anchors
from stepwell.heads.box_head import BoxHead
from stepwell.heads.cascade import Cascade
from stepwell.heads.fpn import FeaturePyramid
from stepwell.heads.mask_head import MaskHead, mask_loss, mask_targets
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import Proposals, Rpn
from stepwell.heads.two_stage import RegionOutput, RegionSample, TwoStage, draw_regions
from stepwell.keys.engine import Rule, plan
from stepwell.keys.rcnn import BOX_HEAD, MASK_HEAD, NECK, RPN, cascade_rules, rcnn_rules, stage_rules
from stepwell.ops.paste import paste
from stepwell.ops.regions import pool_region_levels, region_levels
from stepwell.structures import Extent, FoundObjects, Objects, Size

__all__ = ["CASES", "extents_of", "maps_of", "objects_of"]

Outputs = dict[str, Tensor]


def _size(pair: list[int]) -> Size:
    height, width = pair
    return height, width


def extents_of(s: Settings) -> list[Extent]:
    return [Extent(_size(image["img_shape"]), _size(image["pad_shape"])) for image in s["images"]]


def maps_of(record: Record, letter: str) -> list[Tensor]:
    return [
        record.inputs[f"{letter}{k}"]
        for k in range(sum(n[0] == letter and n[1:].isdigit() for n in record.inputs))
    ]


def objects_of(record: Record) -> list[Objects]:
    found = []
    for i in range(len(record.settings["images"])):
        boxes = record.inputs[f"gt_boxes{i}"]
        labels = record.inputs.get(f"gt_labels{i}", torch.zeros(len(boxes), dtype=torch.long))
        found.append(Objects(boxes, labels, record.inputs.get(f"gt_masks{i}")))
    return found


def _anchors(record: Record) -> Outputs:
    s = record.settings
    config, strides = anchor_config(s["anchors"]), s["anchors"]["strides"]
    outputs = {f"base{k}": torch.tensor(base_anchors(stride, config)) for k, stride in enumerate(strides)}
    for i, grid in enumerate(s["grids"]):
        sizes, shape = [_size(size) for size in grid["map_sizes"]], _size(grid["pad_shape"])
        num, like = config.num_per_cell, torch.empty(0)
        valid = are_valid(sizes, strides, Extent(shape, shape), num, like.device)
        parts = valid.split([height * width * num for height, width in sizes])
        for k, (size, stride, part) in enumerate(zip(sizes, strides, parts, strict=True)):
            outputs[f"anchors{i}_{k}"] = grid_anchors(size, stride, config, like)
            outputs[f"valid{i}_{k}"] = part
    return outputs


def _box_coder(record: Record) -> Outputs:
    boxes, truths = record.inputs["boxes"], record.inputs["gt"]
    deltas, of_classes = record.inputs["deltas"], record.inputs["deltas_classes"].unflatten(1, (-1, 4))
    size, outputs = _size(record.settings["max_shape"]), {}
    for i, settings in enumerate(record.settings["coders"]):
        coder = coder_of(settings)
        outputs[f"encoded{i}"] = coder.encode(boxes, truths)
        outputs[f"decoded{i}"] = coder.decode(boxes, deltas)
        outputs[f"decoded_clipped{i}"] = coder.decode(boxes, deltas, size)
        outputs[f"decoded_classes{i}"] = coder.decode(boxes, of_classes, size).flatten(1)
        outputs[f"round_trip{i}"] = coder.decode(boxes, outputs[f"encoded{i}"])
    return outputs


def _fpn(record: Record) -> Outputs:
    s = record.settings
    num_extra = s["num_outs"] - len(s["in_channels"])
    neck = FeaturePyramid(s["in_channels"], s["out_channels"], num_extra=num_extra)
    return _named("p", record.load_into(neck, NECK)(maps_of(record, "f")))


def _named(name: str, values: list[Tensor]) -> Outputs:
    return {f"{name}{k}": value for k, value in enumerate(values)}


def _rpn(record: Record) -> Outputs:
    s = record.settings
    config = rpn_config(s["rpn"], s["rpn_train"], s["proposals"], s["proposals"])
    rpn = Rpn(s["rpn"]["in_channels"], s["rpn"]["anchors"]["strides"], config)
    logits, deltas = record.load_into(rpn, RPN)(maps_of(record, "p"))
    extents, objects = extents_of(s), objects_of(record)
    drawn = rpn.draw([(x.shape[-2], x.shape[-1]) for x in logits], extents, objects, logits[0])
    objectness, boxes = rpn.level_losses(logits, deltas, drawn, objects)
    return {
        **_named("cls", logits),
        **_named("reg", deltas),
        **_proposals("", rpn.propose(logits, deltas, extents, config.testing)),
        **_named("loss_cls", list(objectness)),
        **_named("loss_bbox", list(boxes)),
        **_named("pos_inds", [image.sample.positive for image in drawn]),
        **_named("neg_inds", [image.sample.negative for image in drawn]),
    }


def _proposals(prefix: str, proposals: list[Proposals]) -> Outputs:
    return {
        **_named(f"{prefix}proposals", [image.boxes for image in proposals]),
        **_named(f"{prefix}proposal_scores", [image.scores for image in proposals]),
    }


def _roi_extractor(record: Record) -> Outputs:
    s = record.settings["roi_extractor"]
    maps, boxes = maps_of(record, "p"), record.inputs["boxes"]
    features = pool_region_levels(
        maps,
        boxes,
        record.inputs["picture"],
        s["output_size"],
        strides=s["strides"],
        finest=s["finest_scale"],
        samples=s["sampling_ratio"],
        aligned=s["aligned"],
    )
    return {"levels": region_levels(boxes, s["strides"], s["finest_scale"]), "features": features}


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()[None] * 100


def _bbox_head(record: Record) -> Outputs:
    s = record.settings
    config, num_classes = box_head_config(s["bbox_head"]), s["bbox_head"]["num_classes"]
    head = BoxHead(s["bbox_head"]["in_channels"], s["bbox_head"]["roi_feat_size"], num_classes, config)
    logits, deltas = record.load_into(head, BOX_HEAD)(record.inputs["features"])
    outputs = {"cls": logits, "reg": deltas.flatten(1)}
    samples, chosen_rows = [], []
    for i, (extent, truth) in enumerate(zip(extents_of(s), objects_of(record), strict=True)):
        rows = (record.inputs["picture"] == i).nonzero()[:, 0]
        boxes, scale = record.inputs["boxes"][rows], torch.tensor(s["images"][i]["scale_factor"])
        outputs[f"boxes{i}"] = (config.coder.decode(boxes, deltas[rows], extent.valid) / scale).flatten(1)
        outputs[f"scores{i}"] = logits[rows].softmax(1)
        found = head.select(logits[rows], deltas[rows], boxes, extent.valid, selection(s["test"]))
        outputs |= {f"detections{i}": found.boxes / scale, f"detections_unscaled{i}": found.boxes}
        outputs |= dict.fromkeys((f"detection_scores{i}", f"detection_scores_unscaled{i}"), found.scores)
        outputs |= dict.fromkeys((f"labels{i}", f"labels_unscaled{i}"), found.labels)
        sample = draw_regions(
            boxes,
            truth,
            num_classes,
            assignment=assignment(s["train"]["assigner"]),
            sampling=sampling(s["train"]["sampler"]),
            give_objects=s["train"]["sampler"]["add_gt_as_proposals"],
        )
        outputs |= {f"pos_inds{i}": sample.sample.positive, f"neg_inds{i}": sample.sample.negative}
        samples.append(sample)
        chosen_rows.append(rows[sample.sample.places])
    rows, (boxes, labels, targets) = torch.cat(chosen_rows), _joined(samples)
    is_positive = (labels < num_classes)[:, None]
    losses = head.losses(logits[rows], deltas[rows], boxes, labels, targets)
    return outputs | {
        "target_labels": labels,
        "target_label_weights": torch.ones(len(labels)),
        "target_deltas": config.coder.encode(boxes, targets) * is_positive,
        "target_delta_weights": is_positive.float().expand(-1, 4),
        "loss_cls": losses["classes"],
        "loss_bbox": losses["boxes"],
        "accuracy": _accuracy(logits[rows], labels),
    }


def _joined(samples: list[RegionSample]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([image.boxes for image in samples]),
        torch.cat([image.labels for image in samples]),
        torch.cat([image.targets for image in samples]),
    )


def _mask_head(record: Record) -> Outputs:
    s = record.settings
    head = MaskHead(
        s["mask_head"]["in_channels"], s["mask_head"]["num_classes"], mask_head_config(s["mask_head"])
    )
    record.load_into(head, MASK_HEAD)
    boxes, labels, image = record.inputs["boxes"], record.inputs["labels"], s["images"][0]
    logits = head(record.inputs["features"])
    of_labels = head(record.inputs["features"], labels)
    targets = mask_targets(
        record.inputs["gt_masks"], boxes, record.inputs["assigned"], s["train"]["mask_size"]
    )
    scale = torch.tensor(image["scale_factor"])
    height, width = _size(image["ori_shape"])
    enlarged = (round(height * image["scale_factor"][1]), round(width * image["scale_factor"][0]))
    pasted = {
        "masks": paste(
            of_labels.sigmoid(), boxes / scale, (height, width), threshold=s["test"]["mask_thr_binary"]
        ),
        "masks_unscaled": paste(of_labels.sigmoid(), boxes, enlarged, threshold=s["test"]["mask_thr_binary"]),
        "pasted": paste(of_labels.sigmoid(), boxes / scale, (height, width)),
    }
    loss = head_weight(s) * mask_loss(of_labels, targets)
    return {"logits": logits, **pasted, "targets": targets, "loss_mask": loss[None]}


def head_weight(s: Settings) -> float:
    return float(s["mask_head"]["loss_mask"]["weight"])


def _found(record: Record, detections: list[FoundObjects], *, pixels: bool) -> Outputs:
    outputs: Outputs = {}
    for i, (found, image) in enumerate(zip(detections, record.settings["images"], strict=True)):
        assert found.masks is not None
        boxes = found.boxes / torch.tensor(image["scale_factor"])
        outputs |= {f"detections{i}": boxes, f"detection_scores{i}": found.scores}
        outputs |= {f"labels{i}": found.labels, f"mask_prob{i}": found.masks}
        if pixels:
            threshold = record.settings["rcnn_test"]["mask_thr_binary"]
            outputs[f"masks{i}"] = paste(found.masks, boxes, _size(image["ori_shape"]), threshold=threshold)
    return outputs


def _first_stage(
    head: TwoStage, maps: list[Tensor], extents: list[Extent], objects: list[Objects]
) -> tuple[Outputs, list[Tensor], list[Tensor]]:
    """Outputs of neck and RPN, and boxes proposed in testing and in training. maps: of the pyramid."""
    config = head.settings.rpn
    logits, deltas = head.rpn(maps)
    tested, trained = (
        head.rpn.propose(logits, deltas, extents, limits) for limits in (config.testing, config.training)
    )
    drawn = head.rpn.draw([(x.shape[-2], x.shape[-1]) for x in logits], extents, objects, logits[0])
    outputs = {**_named("p", maps), **_proposals("", tested), **_proposals("train_", trained)}
    for i, image in enumerate(drawn):
        outputs |= {
            f"sampled_rpn{i}_pos": image.sample.positive,
            f"sampled_rpn{i}_neg": image.sample.negative,
        }
    return outputs, [image.boxes for image in tested], [image.boxes for image in trained]


def _gradients(
    record: Record, head: nn.Module, rules: list[Rule], maps: list[Tensor], loss: Tensor
) -> Outputs:
    names = dict(head.named_parameters())
    ours = [next(iter(plan([name], rules).targets)) for name in record.settings["grad_norm_order"]]
    loss.backward()
    norms = [gradient.norm() for name in ours if (gradient := names[name].grad) is not None]
    outputs = {f"grad_f{k}": x.grad for k, x in enumerate(maps) if x.grad is not None}
    return {**outputs, "grad_norms": torch.stack(norms)}


def _mask_rcnn(record: Record) -> Outputs:
    s = record.settings
    config = RcnnConfig(
        **shared(s),
        box=box_head_config(s["roi_head"]["bbox_head"]),
        assignment=assignment(s["rcnn_train"]["assigner"]),
        sampling=sampling(s["rcnn_train"]["sampler"]),
    )
    check_mask_size(s["rcnn_train"], config.regions)
    strides = s["roi_head"]["bbox_roi_extractor"]["strides"]
    head = config.build(s["fpn"]["in_channels"], strides, s["roi_head"]["bbox_head"]["num_classes"])
    record.load_into(head, rcnn_rules())
    maps = [x.clone().requires_grad_() for x in maps_of(record, "f")]
    extents, objects = extents_of(s), objects_of(record)
    losses = head.losses(maps, extents, objects)
    gradients = _gradients(record, head, rcnn_rules(), maps, sum(losses.values(), torch.zeros(())))
    with torch.no_grad():
        pyramid = head.neck(maps)
        outputs, _, trained = _first_stage(head, pyramid, extents, objects)
        samples = head.draw(trained, objects)
        for i, image in enumerate(samples):
            outputs |= {f"sampled{i}_pos": image.sample.positive, f"sampled{i}_neg": image.sample.negative}
        _, labels, _ = _joined(samples)
        logits, _ = head.box(head.pool(pyramid, [image.boxes for image in samples], config.regions.box_side))
        outputs |= _found(record, head.detect(maps, extents), pixels=True)
    return {
        **outputs,
        **gradients,
        "train_acc": _accuracy(logits, labels),
        "train_loss": sum(losses.values(), torch.zeros(1)),
        **{f"train_loss_{theirs}": losses[ours] for ours, theirs in LOSSES.items()},
        "train_loss_mask": losses["masks"][None],
    }


LOSSES = {"classes": "cls", "boxes": "bbox", "rpn_objectness": "rpn_cls", "rpn_boxes": "rpn_bbox"}


def _stage_outputs(s: Settings, stages: list[RegionOutput]) -> Outputs:
    outputs: Outputs = {}
    for k, stage in enumerate(stages):
        outputs[f"stage{k}_rois"] = torch.cat(stage.boxes)
        outputs |= {f"stage{k}_cls": stage.logits, f"stage{k}_reg": stage.deltas.flatten(1)}
    mean = torch.stack([stage.logits for stage in stages]).mean(0)
    return outputs | _named("mean_cls", list(mean.split([len(boxes) for boxes in stages[0].boxes])))


def _learnt(
    head: Cascade, maps: list[Tensor], proposals: list[Tensor], extents: list[Extent], objects: list[Objects]
) -> Outputs:
    """Samples, losses and accuracies of every stage. maps: of the pyramid."""
    losses, seen = head.learn(maps, proposals, extents, objects)
    outputs: Outputs = {}
    for k, (samples, output) in enumerate(seen):
        for i, image in enumerate(samples):
            outputs[f"sampled_stage{k}_{i}_pos"] = image.sample.positive
            outputs[f"sampled_stage{k}_{i}_neg"] = image.sample.negative
        outputs[f"train_s{k}_acc"] = _accuracy(output.logits, _joined(samples)[1])
        outputs[f"train_s{k}_loss_cls"] = losses[f"classes_{k}"]
        outputs[f"train_s{k}_loss_bbox"] = losses[f"boxes_{k}"]
        outputs[f"train_s{k}_loss_mask"] = losses[f"masks_{k}"][None]
    return outputs


def _cascade(record: Record) -> Outputs:
    s = record.settings
    config = cascade_config(s)
    strides = s["roi_head"]["bbox_roi_extractor"]["strides"]
    head = config.build([config.dim] * len(strides), strides, num_classes_of(s)).eval()
    stages = nn.ModuleDict({"boxes": head.boxes, "masks": head.masks})
    record.load_into(stages, stage_rules(len(config.stages)))
    maps, extents, objects = maps_of(record, "p"), extents_of(s), objects_of(record)
    proposals = [record.inputs[f"proposals{i}"] for i in range(len(extents))]
    outputs = _stage_outputs(s, head.run_stages(maps, proposals, extents))
    detections = head.detect_in(maps, proposals, extents)
    outputs |= _found(record, detections, pixels=False)
    regions = head.pool(maps, [found.boxes for found in detections], config.regions.mask_side)
    labels = torch.cat([found.labels for found in detections])
    for k, mask_head in enumerate(head.masks):
        parts = mask_head(regions, labels).split([len(found.labels) for found in detections])
        outputs |= _named(f"stage{k}_mask_logits", list(parts))
    outputs |= _learnt(head, maps, proposals, extents, objects)
    _, seen = head.learn(maps, proposals, extents, objects)
    for k, (samples, _) in enumerate(seen):
        outputs[f"train_stage{k}_rois"] = _joined(samples)[0]
        counts = torch.tensor([len(image.boxes) for image in samples])
        outputs[f"train_stage{k}_picture"] = torch.arange(len(samples)).repeat_interleave(counts)
    return outputs


def _cascade_mask_rcnn(record: Record) -> Outputs:
    s = record.settings
    config = cascade_config(s)
    strides = s["roi_head"]["bbox_roi_extractor"]["strides"]
    head = config.build(s["fpn"]["in_channels"], strides, num_classes_of(s))
    rules = cascade_rules(len(config.stages))
    record.load_into(head, rules)
    maps = [x.clone().requires_grad_() for x in maps_of(record, "f")]
    extents, objects = extents_of(s), objects_of(record)
    losses = head.losses(maps, extents, objects)
    gradients = _gradients(record, head, rules, maps, sum(losses.values(), torch.zeros(())))
    with torch.no_grad():
        pyramid = head.neck(maps)
        outputs, tested, trained = _first_stage(head, pyramid, extents, objects)
        outputs |= _stage_outputs(s, head.run_stages(pyramid, tested, extents))
        outputs |= _learnt(head, pyramid, trained, extents, objects)
        outputs |= _found(record, head.detect(maps, extents), pixels=True)
    return {
        **outputs,
        **gradients,
        "train_loss": sum(losses.values(), torch.zeros(1)),
        "train_loss_rpn_cls": losses["rpn_objectness"],
        "train_loss_rpn_bbox": losses["rpn_boxes"],
    }


def _check(settings: Mapping[str, Any], required: Required, where: str = "") -> None:
    """As `check_required`, each object of a list too."""
    for key, ours in required.items():
        value = settings.get(key)
        if not isinstance(ours, Mapping):
            check_required(settings, {key: ours}, where)
        elif isinstance(value, list):
            for k, part in enumerate(value):
                _check(part, ours, f"{where}{key}.{k}.")
        elif value is not None:
            _check(value, ours, f"{where}{key}.")


def _checked(case: Case) -> Case:
    """The case, after a look at what its kind requires; whole detectors turn gradients on themselves."""

    def run(record: Record) -> Mapping[str, Tensor] | TableCheck:
        _check(record.settings, REQUIRED[record.kind])
        with torch.set_grad_enabled("grad_norm_order" in record.settings):
            return case(record)

    return run


CASES: dict[str, Case] = {
    kind: _checked(case)
    for kind, case in {
        "det.anchors": _anchors,
        "det.box_coder": _box_coder,
        "det.fpn": _fpn,
        "det.rpn": _rpn,
        "det.roi_extractor": _roi_extractor,
        "det.bbox_head": _bbox_head,
        "det.mask_head": _mask_head,
        "det.mask_rcnn": _mask_rcnn,
        "det.cascade": _cascade,
        "det.cascade_mask_rcnn": _cascade_mask_rcnn,
    }.items()
}
