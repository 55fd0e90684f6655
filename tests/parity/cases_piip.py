"""Golden files of PIIP: how each kind is built from its settings and run.

Settings list branch 1 first (widest network, smallest image); grids are [rows, columns].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from cases_encoders import check_position_grid, encoder_from_settings
from record import Case, Record, TableCheck, Unsupported, check_required
from required_piip import REQUIRED
from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.encoder import Encoder
from stepwell.encoders.vit import VisionTransformer
from stepwell.fuse.interaction import (
    DeformableCrossAttention,
    Injector,
    Interaction,
    InteractionConfig,
    InteractionUnit,
)
from stepwell.fuse.merge import (
    BranchMerge,
    ProjectorConfig,
    TokenMerge,
    dense_stacks,
    linear_stacks,
    stage_stacks,
)
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.heads.neck import SimplePyramid
from stepwell.keys.engine import Prefix, Rule
from stepwell.keys.piip import (
    ATTENTION,
    INJECTOR,
    UNIT,
    classifier_rules,
    features_rules,
    interaction_rules,
    token_merge_rules,
    vision_rules,
)
from stepwell.models.dense import PyramidClassifier, PyramidFeatures
from stepwell.models.piip import PiipVision
from stepwell.models.pyramid import PyramidEncoder, build_interactions
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, Size, TokenMap
from stepwell.views.pyramid import PyramidGeometry

__all__ = ["CASES"]


def _size(grid: list[int]) -> Size:
    rows, cols = grid
    return rows, cols


def _interaction_config(interaction: dict[str, Any]) -> InteractionConfig:
    deformable = interaction["attn_type"] == "deform"
    points = (
        {"num_points": interaction["n_points"], "ratio": interaction["deform_ratio"]} if deformable else {}
    )
    return InteractionConfig(
        attention="deformable" if deformable else "regular",
        num_heads=interaction["num_heads"],
        ffn_ratio=interaction["cffn_ratio"] if interaction["with_cffn"] else None,
        project=interaction.get("with_proj") is not False,
        norm=interaction["norm"] != "none",
        **points,
    )


def _deform_attention(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = DeformableCrossAttention(
        s["d_model"], s["d_feat"], num_heads=s["n_heads"], num_points=s["n_points"], ratio=s["ratio"]
    )
    record.load_into(module, ATTENTION)
    values = module.values_of(record.inputs["feat"])
    y = module(record.inputs["query"], _size(s["query_grid"]), values, _size(s["feat_grid"]))
    return {"y": y}


def _injector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = Injector(s["dim"], s["dim_feat"], _interaction_config(s["interaction"]))
    record.load_into(module, INJECTOR)
    values = module.values_of(record.inputs["feat"])
    y = module(record.inputs["query"], _size(s["query_grid"]), values, _size(s["feat_grid"]))
    return {"y": y}


def _states(record: Record) -> list[TokenMap]:
    """Inputs x1, x2, ... and their class tokens cls1, cls2, ... where there are any."""
    return [
        TokenMap(record.inputs[f"x{k}"], _size(grid), record.inputs.get(f"cls{k}"))
        for k, grid in enumerate(record.settings["grids"], start=1)
    ]


def _named(states: list[TokenMap]) -> dict[str, Tensor]:
    named = {f"x{k}": state.tokens for k, state in enumerate(states, start=1)}
    class_tokens = {f"cls{k}": state.class_token for k, state in enumerate(states, start=1)}
    return named | {name: token for name, token in class_tokens.items() if token is not None}


def _interaction_unit(record: Record) -> dict[str, Tensor]:
    s = record.settings
    unit = InteractionUnit(s["dims"], [(1, 0), (0, 1)], _interaction_config(s["interaction"]))
    return _named(record.load_into(unit, UNIT)(_states(record)))


def _llava_projector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = _token_merge(s)
    record.load_into(module, token_merge_rules(s["norm"]))
    return {"tokens": module([record.inputs[f"x{k}"] for k in range(1, len(s["in_dims"]) + 1)]).tokens}


def _token_merge(s: dict[str, Any]) -> TokenMerge:
    grid = _size(s["out_grid"]) if s["out_grid"] else None
    config = ProjectorConfig(norm=s["norm"], num_groups=s["norm_groups"] or 1, grid=grid)
    return TokenMerge(s["in_dims"], s["hidden_size"], config)


class _Block(nn.Module):
    """Bare blocks of every branch, and an interaction behind them."""

    def __init__(self, s: dict[str, Any]) -> None:
        super().__init__()
        encoders, self.tables = _encoders(s)
        for encoder in encoders:
            encoder.patch_embed = nn.Identity()  # recorded without an embedding
            encoder.class_token = None  # comes as an input
        self.branches = nn.ModuleList(encoders)
        self.interaction = Interaction(
            [encoder.spec.dim for encoder in encoders], _interaction_config(s["interaction"])
        )

    def rules(self) -> list[Rule]:
        rules: list[Rule] = [Prefix(r"interaction\.", "interaction.", interaction_rules(len(self.branches)))]
        for k, table in enumerate(self.tables):
            rules.append(Prefix(f"branch{k + 1}_", f"branches.{k}.", table))
        return rules

    def forward(self, states: list[TokenMap]) -> list[TokenMap]:
        encoders = cast("list[Encoder]", list(self.branches))
        states = [
            encoder.run(state, 0, encoder.spec.depth - 1)
            for encoder, state in zip(encoders, states, strict=True)
        ]
        return cast("list[TokenMap]", self.interaction(states))


def _interaction_block(record: Record) -> dict[str, Tensor]:
    module = _Block(record.settings)
    return _named(record.load_into(module, module.rules())(_states(record)))


def _encoders(s: dict[str, Any]) -> tuple[list[VisionTransformer | ConvNeXt], list[list[Rule]]]:
    """The branches and the key table of each."""
    _check_order(s)
    encoders, tables = zip(*(encoder_from_settings(branch) for branch in s["branches"]), strict=True)
    return list(encoders), list(tables)


def _check_order(s: dict[str, Any]) -> None:
    """Ours is the only order that was recorded; another one would be a new schedule."""
    finest_first = [f"{a}{b}" for a, b in pairwise(range(1, s["num_branches"] + 1))][::-1]
    if s["unit_order"] != finest_first:
        raise Unsupported(f"units in the order {s['unit_order']}")


def _pyramid(s: dict[str, Any]) -> tuple[PyramidEncoder, list[list[Rule]]]:
    """Branches and interactions, and the key table of every branch."""
    for branch, ratio in zip(s["branches"], s["image_ratios"], strict=True):
        check_position_grid(branch, [int(side * ratio) for side in s["image_size"]])
    encoders, tables = _encoders(s)
    ranges = [[(first, last) for first, last in branch["interaction_indexes"]] for branch in s["branches"]]
    interactions = build_interactions(
        [encoder.spec for encoder in encoders], ranges, _interaction_config(s["interaction"])
    )
    return PyramidEncoder(encoders, interactions, ranges), tables


def _backbone(record: Record) -> dict[str, Tensor]:
    s = record.settings
    encoder, tables = _pyramid(s)
    *earlier, last = s["merge_after"]
    if last != len(encoder.interactions) - 1:
        raise Unsupported(f"a last merge after interaction {last} of {len(encoder.interactions)}")
    dims = [
        [
            branch.spec.dims[spans[i][1]]
            for branch, spans in zip(encoder.encoders, encoder.ranges, strict=True)
        ]
        for i in s["merge_after"]
    ]
    stages = s["pyramid"]["stages"]
    operations = [stage["op"] for stage in stages]
    sources = [s["merge_after"].index(stage["merge_after"]) for stage in stages]
    if sources != (list(range(len(dims))) if earlier else [0] * len(stages)):
        raise Unsupported(f"maps from merges {sources} of {len(dims)}")
    neck = SimplePyramid(
        [dims[source][0] for source in sources],
        operations=operations,
        norm=s["pyramid"]["norm"],
        num_groups=s["pyramid"]["norm_groups"],
    )
    model = PyramidFeatures(
        encoder,
        [BranchMerge(_conv_stacks(widths, s["merge"])) for widths in dims],
        neck,
        ratios=s["image_ratios"],
        strides=range(len(stages)),
        dims=[dims[source][0] for source in sources],
        merge_after=earlier,
    )
    rules = features_rules(tables, len(encoder.interactions), merge_after=earlier, operations=operations)
    maps = record.load_into(model, rules)(record.inputs["image"])
    return {stage["name"]: maps[i] for i, stage in enumerate(stages)}


def _conv_stacks(dims: list[int], merge: dict[str, Any]) -> list[nn.Module]:
    num_groups = merge["norm_groups"]
    if merge["branch1_has_conv"]:
        return dense_stacks(dims, num_layers=merge["layers"], num_groups=num_groups)
    if merge["layers"] != 1:
        raise Unsupported(f"merge {merge}")
    return stage_stacks(dims, num_groups=num_groups)


def _classifier(record: Record) -> dict[str, Tensor]:
    s = record.settings
    encoder, tables = _pyramid(s)
    dims = [branch.spec.dim for branch in encoder.encoders]
    merged = s["head_rule"] == "merge"
    head: nn.Module
    if merged:
        merge = BranchMerge(linear_stacks(dims, num_groups=s["head"]["merge_norm_groups"]))
        head = MergedHead(merge, dims[0], s["num_classes"])
    else:
        head = BranchHeads(dims, s["num_classes"], read=s["head_rule"])
    model = PyramidClassifier(encoder, head, ratios=s["image_ratios"])
    record.load_into(model, classifier_rules(tables, len(encoder.interactions), merged=merged))
    return {"logits": model(record.inputs["image"])}


def _llava_tower(record: Record) -> dict[str, Tensor]:
    s = record.settings
    sides = [branch["img_size"] for branch in s["branches"]]
    if [side / sides[-1] for side in sides] != s["image_ratios"]:
        raise Unsupported(f"image_ratios {s['image_ratios']} of branches with sides {sides}")
    encoder, tables = _pyramid(s)
    geometry = _square_geometry(sides, "crop")
    model = PiipVision(encoder, _token_merge(s["projector"]), geometry)
    record.load_into(model, vision_rules(tables, len(encoder.interactions), norm=s["projector"]["norm"]))
    layout = geometry.layout((sides[-1], sides[-1]))
    images = list(record.inputs["image"])
    features = model.encode(images, [layout] * len(images))
    maps = {
        f"branch{k + 1}": torch.stack([image.maps[k].map for image in features]) for k in range(len(sides))
    }
    return maps | {"tokens": torch.stack([image.tokens for image in features])}


def _llava_preprocess(record: Record) -> dict[str, Tensor]:
    s = record.settings
    canvas = [int(255 * mean) for mean in s["image_mean"]]
    check_required(s["pad"], {"canvas_rgb": (canvas,)}, "pad.")
    outputs: dict[str, Tensor] = {}
    for framing in ("pad", "crop"):
        geometry = _square_geometry([s["size"]], framing, s["image_mean"], s["image_std"])
        for i in range(s["num_images"]):
            image = Image.fromarray(record.inputs[f"image{i}"].numpy())
            layout = geometry.layout((image.height, image.width))
            (outputs[f"{s[framing]['output_prefix']}{i}"],) = geometry.inputs(image, layout)
    return outputs


def _checked(case: Case) -> Case:
    """The case, after a look at what its kind requires."""

    def run(record: Record) -> Mapping[str, Tensor] | TableCheck:
        check_required(record.settings, REQUIRED[record.kind])
        if "projector" in record.settings:
            _check_projector(record.settings["projector"], "projector.")
        if record.kind == "piip.llava_projector":
            _check_projector(record.settings)
        return case(record)

    return run


def _check_projector(s: dict[str, Any], where: str = "") -> None:
    """The linears stand where the norm leaves them, and the norm has weights where ours has them."""
    grouped = s["norm"] == "groupnorm"
    facts = {"linear_indexes": ([1, 6] if grouped else [1, 5],), "norm_affine": (grouped,)}
    check_required(s, facts, where)


def _square_geometry(
    sides: Sequence[int],
    framing: str,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> PyramidGeometry:
    return PyramidGeometry(
        names=("",) * len(sides),
        sides=tuple(sides),
        strides=(1,) * len(sides),
        framing=framing,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


CASES: dict[str, Case] = {
    kind: _checked(case)
    for kind, case in {
        "piip.deform_attention": _deform_attention,
        "piip.injector": _injector,
        "piip.interaction_unit": _interaction_unit,
        "piip.interaction_block": _interaction_block,
        "piip.backbone": _backbone,
        "piip.classifier": _classifier,
        "piip.llava_tower": _llava_tower,
        "piip.llava_projector": _llava_projector,
        "piip.llava_preprocess": _llava_preprocess,
    }.items()
}
