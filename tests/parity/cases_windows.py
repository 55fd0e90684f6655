"""Golden files of LLaVA-UHD's window attention (arXiv 2412.13871), of both versions: how each kind is built
and run.

Letters: B batch, n windows, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cases_upsample import STACK_REQUIRED
from record import Case, Record, Required, TableCheck, Unsupported, checked
from stepwell.fuse.upsample import KernelConfig, Level, UpsamplerConfig, build_upsampler
from stepwell.fuse.windows import BINS, WindowAttention, WindowConfig, nearest_bins
from stepwell.keys.uhd import pyramid_rules, resampler_rules, window_rules
from stepwell.layers.position import index_position_embedding, resize_position_embedding
from stepwell.ops.window_pool import window_edges, window_pool
from stepwell.structures import Size

__all__ = ["CASES"]

CHOICE: Required = {
    "pool_candidates": ([list(bins) for bins in BINS],),
    "pool_candidate_order": ("rows_cols",),
    "pool_tie": ("first",),
}
POOL: Required = {
    **CHOICE,
    "roi_aligned": (False,),
    "roi_sampling_ratio": (-1,),
    "roi_spatial_scale": (1.0,),
}
ATTENTION: Required = {
    **POOL,
    "norm_eps": (1e-6,),
    "position_encoding": ("sincos_2d",),
    "position_temperature": (10000.0,),
    "position_first_half": ("x",),
    "position_resize": ("bicubic",),
    "value_gets_position": (False,),
    "qkv_bias": (True,),
}
STACK = "upsampler.upsampler."  # before the names of the pyramid's parameters

REQUIRED: dict[str, Required] = {
    "uhd.window_pool": {
        **POOL,
        "map_layout": ("BHWC",),
        "window_order": ("row_major",),
        "box_columns": (["batch_index", "x1", "y1", "x2", "y2"],),
        "bf16_rule": ("map_cast_first_boxes_rounded_too", None),
    },
    "uhd.pooling_choice": {**CHOICE, "distance": ("absolute_log_ratio",)},
    "uhd.window_attention": {
        **ATTENTION,
        "level_embedding_on": ("keys",),
        "upsampler": STACK_REQUIRED,
    },
    "uhd.v1_resampler": {**ATTENTION, "kv_projection_bias": (False,)},
    "uhd.pos_embed": {
        "temperature": (10000.0,),
        "first_half": ("x",),
        "half_layout": ("sin_then_cos",),
        "resize": ("bicubic",),
        "align_corners": (False,),
    },
}
"""By kind, the values that our code has built in; a record may leave a key out."""


def _square(side: int) -> Size:
    return side, side


def _window_pool(record: Record) -> dict[str, Tensor]:
    s = record.settings
    outputs: dict[str, Tensor] = {}
    for entry in s["maps"]:
        grid, size = _square(entry["query_grid"]), tuple(entry["map_hw"])
        bins = nearest_bins(size)
        if list(bins) != entry["pool_rows_cols"]:
            raise ValueError(f"map {entry['index']}: bins {bins}, recorded {entry['pool_rows_cols']}")
        exact = record.inputs[f"map{entry['index']}"].movedim(-1, 1)
        maps = {str(entry["index"]): exact}
        if s["outputs_bf16"]:
            maps[f"_bf16_{entry['index']}"] = exact.bfloat16()
        for suffix, x in maps.items():
            outputs[f"windows{suffix}"] = window_pool(x, grid, bins).flatten(0, 1)
            if s["outputs_boxes"]:
                outputs[f"boxes{suffix}"] = _boxes(x, grid)
    return outputs


def _boxes(x: Tensor, grid: Size) -> Tensor:
    """(B * n, 5): number in the batch, left, top, right, bottom."""
    rows, cols = (window_edges(length, n, x.dtype) for length, n in zip(x.shape[-2:], grid, strict=True))
    numbers = torch.arange(len(x), dtype=x.dtype)
    first = torch.cartesian_prod(numbers, rows[:-1], cols[:-1])
    last = torch.cartesian_prod(numbers, rows[1:], cols[1:])
    return torch.stack([first[:, 0], first[:, 2], first[:, 1], last[:, 2], last[:, 1]], 1)


def _pooling_choice(record: Record) -> TableCheck:
    differences = [
        f"{height}x{width}: {nearest_bins((height, width))}, recorded {(rows, cols)}"
        for height, width, rows, cols in record.table["rows"]
        if nearest_bins((height, width)) != (rows, cols)
    ]
    return TableCheck(("rows",), differences=tuple(differences))


def _window_attention(record: Record) -> dict[str, Tensor]:
    s = record.settings
    levels = [factor.bit_length() - 1 for factor in s["levels"]]
    config = WindowConfig(
        grid=_square(s["grid_size"]), query_sets=s["num_query_sets"], num_heads=s["num_heads"]
    )
    attention = WindowAttention([s["kv_dim"]] * len(levels), s["embed_dim"], config, levels=levels)
    num_stages = max(levels)
    stack = s.get("upsampler") or {}
    kernel = KernelConfig(radius=stack.get("radius", 3), key_dim=stack.get("key_dim", 32))
    pyramid = build_upsampler(UpsamplerConfig(kernel=kernel), s["kv_dim"], num_stages)
    of_pyramid = {name: x for name, x in record.params.items() if name.startswith(STACK)}
    of_windows = {name: x for name, x in record.params.items() if name not in of_pyramid}
    rules = window_rules(levels, s["num_query_sets"])
    replace(record, params=of_windows).load_into(attention, rules)
    if num_stages:
        of_pyramid = {name.removeprefix(STACK): x for name, x in of_pyramid.items()}
        replace(record, params=of_pyramid).load_into(pyramid, pyramid_rules(num_stages))
    tokens = []
    for i, (rows, cols) in enumerate(s["patch_sizes"]):
        x = record.inputs["features"][i, : rows * cols].t().unflatten(1, (rows, cols))[None]
        of_view = [Level(x), *pyramid.levels(x, _image(record, i))]
        tokens.append(attention([[of_view[level] for level in levels]]))
    return {"tokens": torch.cat(tokens)}


def _image(record: Record, i: int) -> Tensor:
    """View i as the encoder sees it, (1, 3, H, W)."""
    facts = record.settings["images"]
    image = record.inputs[f"{facts['prefix']}{i}"].float()
    if facts["rescale_factor"] is not None:
        image = image * facts["rescale_factor"]
    if facts["mean"] is not None:
        mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
        image = (image - mean) / std
    return image[None]


def _v1_resampler(record: Record) -> dict[str, Tensor]:
    s = record.settings
    if s["kv_projection"] != (s["kv_dim"] != s["embed_dim"]):
        raise Unsupported(f"kv_projection {s['kv_projection']!r} from {s['kv_dim']} to {s['embed_dim']}")
    config = WindowConfig(
        grid=_square(s["grid_size"]),
        num_heads=s["num_heads"],
        query_sets=1,
        level_code="none",
        bias=False,
    )
    module = WindowAttention([s["kv_dim"]], s["embed_dim"], config, levels=[0])
    record.load_into(module, resampler_rules())
    maps = [
        record.inputs[f"x{i}"].transpose(1, 2).unflatten(2, tuple(size)) for i, size in enumerate(s["sizes"])
    ]
    return {f"tokens{i}": module([[Level(x)]]) for i, x in enumerate(maps)}


def _pos_embed(record: Record) -> dict[str, Tensor]:
    def table(entry: Mapping[str, Any]) -> Tensor:
        return index_position_embedding(entry["dim"], _square(entry["grid"]))

    s = record.settings
    tables = {entry["output"]: table(entry) for entry in s["tables"]}
    resized = {
        entry["output"]: resize_position_embedding(
            table(entry), _square(entry["grid"]), tuple(entry["size_hw"])
        )
        for entry in s["resized"]
    }
    return tables | resized


CASES: dict[str, Case] = {
    kind: checked(case, REQUIRED)
    for kind, case in {
        "uhd.window_pool": _window_pool,
        "uhd.pooling_choice": _pooling_choice,
        "uhd.window_attention": _window_attention,
        "uhd.v1_resampler": _v1_resampler,
        "uhd.pos_embed": _pos_embed,
    }.items()
}
