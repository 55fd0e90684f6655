"""Golden files of LLaVA-NeXT's AnyRes and of how LLaVA's training draws and prepares its samples.

Records give sizes as [width, height] and grids as [columns, rows].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from record import Case, Record, Required, TableCheck, Unsupported, checked
from stepwell.fuse.tiles import TileMerge
from stepwell.keys.llava import NEWLINE
from stepwell.models.anyres import AnyResVision
from stepwell.structures import CLIP_MEAN, CLIP_STD, Size
from stepwell.train.length_groups import even_chunks, modality_groups
from stepwell.views.anyres import AnyResGeometry, best_target
from stepwell.views.preprocess import pad_to_square

__all__ = ["CASES"]

REQUIRED: dict[str, Required] = {
    "inf.anyres_merge": {
        "newline_at": ("end_of_each_row",),
        "first_crop": ("whole_image",),
        "single_crop": {"merge_type": ("flat", "spatial", "spatial_unpad")},
    },
    "inf.data_pipeline": {
        "size_order": ("width_height",),
        "canvas_rgb": ([0, 0, 0],),
        "pad_to_square": ("centred_on_longer_side",),
        "grouping_seed": ("torch_manual_seed_in_each_entry",),
    },
}
"""By kind, the values of settings that our code, or the case, has built in."""


def _geometry(pinpoints: Sequence[Sequence[int]], tile: int, **changes: Any) -> AnyResGeometry:
    if ragged := [target for target in pinpoints if target[0] % tile or target[1] % tile]:
        raise Unsupported(f"pinpoint {ragged[0]}: ours are whole tiles of {tile}")
    fields: dict[str, Any] = {
        "side": tile,
        "stride": tile,
        "framing": "squeeze",
        "grids": tuple((height // tile, width // tile) for width, height in pinpoints),
        "merge": "spatial_unpad",
        "max_tiles": None,
        "floor": "float",
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    return AnyResGeometry(**fields | changes)


def _turned(size: Sequence[int]) -> Any:
    """Height and width, or width and height, in the other order."""
    return type(size)([size[1], size[0]])


def _anyres_merge(record: Record) -> dict[str, Tensor]:
    s = record.settings
    tile, single = s["tile"], s["single_crop"]
    features = {name.removeprefix("features."): views for name, views in record.inputs.items()}

    def merged(views: Tensor, merge: Any, size: Size, pinpoints: Any, grid: Size) -> Tensor:
        geometry = _geometry(pinpoints, tile, stride=tile // s["grid_side"], merge=merge)
        layout = geometry.layout(size)
        if layout.tiles != grid:
            raise ValueError(f"tiles {layout.tiles} of an image {size}, recorded {grid}")
        module = TileMerge(views.shape[-1], newline=merge == "spatial_unpad")
        if module.newline is not None:
            record.load_into(module, [NEWLINE])
        vision = AnyResVision(nn.Identity(), nn.Identity(), module, geometry, num_layers=0)
        overview, *tiles = views
        tokens = vision._arranged([*tiles, overview], layout)
        assert len(tokens) == layout.num_visual
        return tokens

    outputs = {
        f"{merge}.{case['index']}": merged(
            features[str(case["index"])],
            merge,
            tuple(_turned(case["image_size_wh"])),
            s["pinpoints"],
            tuple(_turned(case["grid_wh"])),
        )
        for case in s["cases"]
        for merge in s["merge_types"]
    }
    alone = features[single["features"]]
    outputs[single["output"]] = merged(alone, single["merge_type"], (tile, tile), [], (0, 0))
    return outputs


def _select(record: Record) -> Iterator[str]:
    """The best of every list of targets, and where recorded its grid."""
    s = record.settings
    for row in record.table["anyres_select"]:
        size = tuple(_turned(row["size_wh"]))
        for name, pinpoints in s["pinpoints"].items():
            ours = list(_turned(best_target(size, [tuple(_turned(target)) for target in pinpoints])))
            if (recorded := row.get(f"{name}_pinpoints_best_wh", ours)) != ours:
                yield f"{name} {row['size_wh']}: {ours}, recorded {recorded}"
            tiles = list(_turned(_geometry(pinpoints, s["tile"]).layout(size).tiles))
            if (recorded := row.get(f"{name}_grid_wh", tiles)) != tiles:
                yield f"{name} grid of {row['size_wh']}: {tiles}, recorded {recorded}"


def _pinpoints(name: str) -> Callable[[Record], Iterator[str]]:
    """A list of targets that the table repeats, as our grids."""

    def check(record: Record) -> Iterator[str]:
        tile, recorded = record.settings["tile"], record.table[f"anyres_pinpoints_{name}"]
        grids = _geometry(record.settings["pinpoints"][name], tile).grids
        ours = [[cols * tile, rows * tile] for rows, cols in grids]
        if ours != recorded:
            yield f"{name}: {ours}, recorded {recorded}"

    return check


def _resize_and_pad(record: Record) -> Iterator[str]:
    """Where an image's content lies in its target, seen in the tiles: all that is not the canvas."""
    s = record.settings
    geometry = _geometry(
        s["pinpoints"][s["resize_and_pad_pinpoints"]], s["tile"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    for row in record.table["anyres_resize_and_pad"]:
        width, height = row["size_wh"]
        layout = geometry.layout((height, width))
        *tiles, _ = geometry.inputs(Image.new("RGB", (width, height), "white"), layout)
        rows, cols = layout.tiles
        shown = torch.stack(tiles).unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        ys, xs = (shown.sum(0) > 0).nonzero(as_tuple=True)
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        ours = {"target_wh": [shown.shape[2], shown.shape[1]], "content_box_xyxy": box, "tiles": len(tiles)}
        for key, value in ours.items():
            if row[key] != value:
                yield f"{row['size_wh']}: {key} {value}, recorded {row[key]}"


def _pad_to_square(record: Record) -> Iterator[str]:
    for i, case in enumerate(record.table["pad_to_square"]):
        image = Image.fromarray(np.array(case["image_hwc"], dtype=np.uint8))
        padded = pad_to_square(image, tuple(case["background"]))
        if np.array(padded).tolist() != case["result_hwc"]:
            yield f"{i}: {image.width}x{image.height} image"


def _grouping(record: Record) -> Iterator[str]:
    """The official generator is torch's own of the process; one with its seed draws the same."""
    for i, case in enumerate(record.table["modality_length_grouping"]):
        generator = torch.Generator().manual_seed(case["torch_manual_seed"])
        ours = modality_groups(
            case["lengths"], case["batch_size"], case["world_size"], generator, official=True
        )
        if ours != case["indices"]:
            yield f"{i}: {ours}, recorded {case['indices']}"


def _chunks(record: Record) -> Iterator[str]:
    for i, case in enumerate(record.table["even_chunks"]):
        if (ours := even_chunks(case["indices"], case["lengths"], case["num_chunks"])) != case["chunks"]:
            yield f"{i}: {ours}, recorded {case['chunks']}"


def _data_pipeline(record: Record) -> TableCheck:
    parts: dict[str, Callable[[Record], Iterator[str]]] = {
        "anyres_select": _select,
        "anyres_resize_and_pad": _resize_and_pad,
        "pad_to_square": _pad_to_square,
        "modality_length_grouping": _grouping,
        "even_chunks": _chunks,
        **{f"anyres_pinpoints_{name}": _pinpoints(name) for name in record.settings["pinpoints"]},
    }
    recorded = record.settings["parts"]
    checked = tuple(part for part in recorded if part in parts)
    differences = tuple(f"{part}/{what}" for part in checked for what in parts[part](record))
    return TableCheck(checked, tuple(part for part in recorded if part not in parts), differences)


CASES: dict[str, Case] = {
    "inf.anyres_merge": checked(_anyres_merge, REQUIRED),
    "inf.data_pipeline": checked(_data_pipeline, REQUIRED),
}
