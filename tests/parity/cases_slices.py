"""Golden files of LLaVA-UHD's slices: their sizes, pixels and encoder, and the order of their visual tokens.

Records give sizes as [width, height] and grids as [columns, rows]. S is the side of a square view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cases_inf import spliced
from record import Case, Record, Required, TableCheck, Unsupported, check_required, checked
from stepwell.encoders.encoder import side_by_side
from stepwell.encoders.vit import VisionTransformer
from stepwell.keys.backbones import backbone_rules
from stepwell.language.labels import tokens_of_image
from stepwell.models.uhd import UhdVision
from stepwell.ops.ragged import by_shape
from stepwell.structures import CLIP_MEAN, CLIP_STD, TokenLayout
from stepwell.views.preprocess import to_tensor
from stepwell.views.slices import SliceGeometry, long_side_size, total_area_size

__all__ = ["CASES"]

ORDER: Required = {
    "grid_order": ("cols_rows",),
    "overview_position": ("last",),
    "organised_before_overview": ("separator_of_first_slice",),
    "per_slice_separator": ("own_separator_after_each_slice",),
    "no_slices": ("overview_only_no_separator",),
}
REQUIRED: dict[str, Required] = {
    "uhd.slicing": {"size_order": ("width_height",)},
    "uhd.preprocess": {
        "resample": ("bicubic",),
        "resample_on": ("uint8",),
        "rescale_factor": (1 / 255,),
        "norm_crop_at": ("top_left",),
        "norm_crop_from": ("overview_u8",),
    },
    "uhd.clip_vision": {
        "family": ("clip",),
        "layer_scale": (False,),
        "pre_norm": (True,),
        "pos_embed_resize": ("bicubic",),
        "padding_masked": (True,),
        "features_drop_class_token": (True,),
        "embedded_after": ("pre_norm",),
        "last_hidden": ("before_post_norm",),
        "pooled": ("post_norm_class_token",),
    },
    "uhd.token_order": {**ORDER, "columns": (["view", "token", "id"],), "separator_view": (-1,)},
    "uhd.token_splice": {
        **ORDER,
        "truncate": ("after_splicing",),
        "embedding": {
            "channels": (["view", "token", "id", "image"],),
            "text": ([-1, 0, "id", 0],),
            "separator": ([-1, 0, "id", 0],),
            "visual": (["view", "token", 0, "image"],),
            "padding": ([0, 0, 0, 0],),
        },
    },
}
"""By kind, the values of settings that our code, or the case, has built in."""


def _geometry(**changes: Any) -> SliceGeometry:
    fields: dict[str, Any] = {
        "name": "",
        "side": 1,
        "stride": 1,
        "max_slices": 1,
        "never_split": False,
        "token_grid": (1, 1),
        "organised": True,
        "newline": (),
        "comma": (),
        "before_overview": "first",
        "long_side": None,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    return SliceGeometry(**fields | changes)


def _slicing(record: Record) -> TableCheck:
    """Each list of the table has its settings, or several columns of them."""
    differences, lists = [], record.settings["lists"]
    for name, facts in lists.items():
        columns = facts.get("columns", {"": {}})
        for row in record.table[name]:
            for column, its_facts in columns.items():
                recorded = row[column] if column else {k: v for k, v in row.items() if k != "size"}
                if isinstance(recorded, list):
                    recorded = {"resized": recorded}
                ours = _sizes(row["size"], {**record.settings, **facts, **its_facts})
                place = f"{name} {column}".rstrip() + " {}x{}".format(*row["size"])
                differences += [
                    f"{place}: {key} {ours.get(key)}, recorded {value}"
                    for key, value in recorded.items()
                    if key not in ours or ours[key] != value
                ]
    tables = [name for name, value in record.table.items() if isinstance(value, list)]
    return TableCheck(tuple(lists), tuple(name for name in tables if name not in lists), tuple(differences))


def _sizes(image: Sequence[int], s: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says of one image, in its order of width and height."""
    width, height = image
    if "max_size" in s:
        return {"resized": _turned(long_side_size((height, width), s["max_size"]))}
    if "area_slices" in s:
        area = s["area_slices"] * s["scale_resolution"] ** 2
        return {"resized": _turned(total_area_size((height, width), area))}
    organised, per_slice = (
        _geometry(
            side=s["scale_resolution"],
            stride=s["patch_size"],
            max_slices=s["max_slice_nums"],
            never_split=s.get("never_split", False),
            token_grid=(s["query_grid"], s["query_grid"]),
            organised=organised,
            newline=(s["separators_row_end"],),
            comma=(s["separators_within_row"],),
        ).layout((height, width))
        for organised in (True, False)
    )
    *slices, overview = organised.inputs
    (rows, cols), (h, w) = organised.tiles, slices[0] if slices else (0, 0)
    return {
        "overview": _turned(overview),
        "grid": [cols, rows] if slices else None,
        "refine": [cols * w, rows * h] if slices else None,
        "boxes": [
            [col * w, row * h, (col + 1) * w, (row + 1) * h] for row in range(rows) for col in range(cols)
        ],
        "separators": _separators(per_slice),
        "tokens_organised": len(_ids(organised)),
        "tokens_per_slice_separators": len(_ids(per_slice)),
    }


def _turned(size: tuple[int, int]) -> list[int]:
    return [size[1], size[0]]


def _ids(layout: TokenLayout, placeholder: int = -1) -> list[int]:
    """What stands for an image whose separators are ids: of a tokenizer, only the size is looked at."""
    return tokens_of_image(layout, range(2**31), placeholder)


def _separators(layout: TokenLayout) -> list[int]:
    return [i for run in layout.runs for i in run.ids or ()]


def _preprocess(record: Record) -> dict[str, Tensor]:
    s = record.settings
    mean, std = tuple(s["image_mean"]), tuple(s["image_std"])
    geometry = _geometry(
        side=s["scale_resolution"],
        stride=s["patch_size"],
        max_slices=s["max_slice_nums"],
        never_split=s["never_split"],
        mean=mean,
        std=std,
    )
    crop_height, crop_width = s["norm_crop_hw"]
    outputs: dict[str, Tensor] = {}
    for case in s["cases"]:
        i = case["index"]
        image = Image.fromarray(record.inputs[f"image{i}"].numpy())
        layout = geometry.layout((image.height, image.width))
        if layout.tiles != _grid(case["grid"]):
            raise ValueError(f"a grid of {layout.tiles}, recorded {case['grid']} columns and rows")
        *slices, overview = (_grey_levels(view, geometry) for view in geometry.inputs(image, layout))
        outputs[f"overview_u8_{i}"] = overview
        parts = {f"slice_u8_{i}_{j}": part for j, part in enumerate(slices)}
        outputs |= {name: part for name, part in parts.items() if name in record.outputs}
        stored = record.outputs[f"overview_u8_{i}"]
        normalised = to_tensor(Image.fromarray(stored.numpy()), tuple(stored.shape[:2]), mean, std)
        outputs[f"overview_norm_crop{i}"] = normalised[:, :crop_height, :crop_width]
    return outputs


def _grid(recorded: Sequence[int] | None) -> tuple[int, int]:
    return (recorded[1], recorded[0]) if recorded else (0, 0)


def _grey_levels(view: Tensor, geometry: SliceGeometry) -> Tensor:
    """(3, h, w), normalised -> (h, w, 3), uint8."""
    shift, scale = torch.tensor(geometry.mean), torch.tensor(geometry.std)
    return ((view.permute(1, 2, 0) * scale + shift) * 255).round().byte()


def _clip_vision(record: Record) -> dict[str, Tensor]:
    """Views of any shapes, those of one shape together; official code pads them to one length."""
    s = record.settings
    grid = tuple(s["pos_embed_grid"])
    encoder = VisionTransformer(
        dim=s["hidden_size"],
        depth=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"],
        mlp_ratio=(s["intermediate_size"] + 0.5) / s["hidden_size"],  # the half survives rounding down
        patch=s["patch_size"],
        patch_bias=s["patch_bias"],
        qkv_bias=s["qkv_bias"],
        qk_norm=s["qk_norm"],
        norm_eps=s["norm_eps"],
        activation=s["activation"],
        position_grid=grid,
        antialias=s["pos_embed_resize_antialias"],
        class_token=True,
        class_slot=True,
        embed_norm=True,
        final_norm=True,
    )
    rules = backbone_rules("clip", class_token=True, class_slot=True, final_norm=True, grid=grid)
    record.load_into(encoder, rules)
    depth, select = encoder.spec.depth, s["select_layer"]
    selected = select if select >= 0 else depth + 1 + select  # of the states, of which the stem's is 0

    def states(views: Tensor) -> list[Tensor]:
        embedded = encoder.stem(views)
        features = encoder.run(embedded, 0, selected - 1)
        last = encoder.run(features, selected, depth - 1)
        assert last.class_token is not None
        pooled = encoder.norm(last.class_token)[:, 0]
        return [side_by_side(embedded), features.tokens, side_by_side(last), pooled]

    views = [record.inputs[f"image{i}"] for i in range(s["num_views"])]
    results = by_shape(states, views)
    names = ("embedded", "features", "last_hidden")
    outputs = {
        f"{name}{i}": state
        for i, view in enumerate(results)
        for name, state in zip(names, view[:-1], strict=True)
    }
    return outputs | {"pooled": torch.stack([view[-1] for view in results])}


def _image(
    grid: Sequence[int] | None, separators: list[int], case: Mapping[str, Any], s: Mapping[str, Any]
) -> tuple[TokenLayout, Tensor]:
    """The layout of an image with this grid of slices, and the place (view, token) of each visual token, put
    in order by the vision system itself.

    At S = 1 the image of `grid` pixels has that grid.
    """
    check_required(s, {"organised_row_separator": (s["separator_row_end"],)})
    edge, (rows, cols) = case["query_edge"], _grid(grid)
    geometry = _geometry(
        max_slices=max(rows * cols, 1),
        token_grid=(edge, edge),
        organised=case["organised"],
        newline=(s["separator_row_end"],),
        comma=(s["separator_within_row"],),
    )
    layout, per_slice = (
        geometry.layout((max(rows, 1), max(cols, 1)))
        for geometry in (geometry, replace(geometry, organised=False))
    )
    if _separators(per_slice) != separators:
        raise Unsupported(f"separators {separators} of a grid {grid}")
    views, cells = torch.arange(len(layout.views)), torch.arange(edge * edge)
    places = torch.stack(torch.meshgrid(views, cells, indexing="ij"), dim=-1)  # (views, edge * edge, 2)
    vision = UhdVision(nn.Identity(), None, nn.Identity(), geometry, layers=[], levels=[])
    return layout, vision._arranged(list(places), layout)


def _token_order(record: Record) -> dict[str, Tensor]:
    s = record.settings

    def order(case: Mapping[str, Any]) -> Iterator[list[int]]:
        layout, places = _image(case["grid"], case["separators"], case, s)
        visual = iter(places.tolist())
        for i in _ids(layout):
            yield [*next(visual), 0] if i == -1 else [s["separator_view"], 0, i]

    return {f"order{case['index']}": torch.tensor(list(order(case))) for case in s["cases"]}


def _token_splice(record: Record) -> dict[str, Tensor]:
    s = record.settings
    check_required(s, {"visual_label": (s["ignore_index"],)})
    names = {"inputs_embeds": "embeds", "labels": "labels", "attention_mask": "attention_mask"}
    outputs: dict[str, Tensor] = {}
    for case in s["cases"]:
        images = []
        for number, (grid, separators) in enumerate(zip(case["grids"], case["separators"], strict=True)):
            layout, places = _image(grid, separators, case, s)
            beside = torch.tensor([0, number]).expand(len(places), -1)
            images.append((_ids(layout, s["image_token_index"]), torch.cat([places, beside], dim=1)))
        batch = [
            record.inputs[f"{name}{case['index']}"] for name in ("input_ids", "labels", "attention_mask")
        ]
        ours = spliced(
            batch, images, _embed, s, padding_side=case["padding_side"], max_length=case["max_length"]
        )
        outputs |= {f"{names[name]}{case['index']}": tensor for name, tensor in ours.items()}
    return outputs


def _embed(ids: Tensor) -> Tensor:
    """(B, L) -> (B, L, 4): the code of a text or a separator."""
    nothing = torch.zeros_like(ids)
    return torch.stack([nothing - 1, nothing, ids, nothing], dim=-1).float()


CASES: dict[str, Case] = {
    kind: checked(case, REQUIRED)
    for kind, case in {
        "uhd.slicing": _slicing,
        "uhd.preprocess": _preprocess,
        "uhd.clip_vision": _clip_vision,
        "uhd.token_order": _token_order,
        "uhd.token_splice": _token_splice,
    }.items()
}
