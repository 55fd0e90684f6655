"""The cost tables of PIIP, rebuilt: every network built on the meta device, and counted.

arXiv 2501.07783, Tables I to XVII, and the official README; tables.yaml holds the printed figures and what
each is the figure of. What the printed figures count is told in flops/count.py and docs/piip.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import torch
import yaml
from torch import nn

from stepwell.encoders.catalogue import ENCODERS, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import PADS_TOKENS, Convention, count_params, paper_macs
from stepwell.flops.outlines import outlines
from stepwell.flops.report import build_outlined
from stepwell.flops.text import aligned
from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.dense import ClassifierSettings
from stepwell.models.published.piip_settings import dense_settings
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.models.runs import layer_runs
from stepwell.views.pyramid import image_pyramid

__all__ = ["Setting", "count_setting", "paper_rows", "paper_table", "read_settings"]

Row = dict[str, Any]
"""A line of a table by the keys of COLUMNS, None where there is no such figure."""
COLUMNS = {
    "table": ("table", ""),
    "row": ("row", ""),
    "expected_gflops": ("printed G", "g"),
    "computed_gflops": ("counted G", ".2f"),
    "error": ("error", "+.2%"),
    "expected_params_M": ("printed M", "g"),
    "computed_params_M": ("counted M", ".2f"),
    "reason": ("why it differs", ""),
}
"""Key of a row -> its heading in the table, and how its values are written."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stands behind a printed figure, in the words of tables.yaml."""

    branches: str
    arguments: Sequence[Mapping[str, Any]] = ()
    windows: Any = 0
    interactions: int = 0
    attention: Any = "deformable"
    directions: Any = "adjacent"
    fast: bool = False
    class_token: bool = False
    counter: Convention = "A"
    rms_norm: int = 0
    table_side: int | None = None

    def branch_configs(self) -> tuple[BranchConfig, ...]:
        names = self.branches.split()
        windows = self.windows if isinstance(self.windows, list) else [self.windows] * len(names)
        return tuple(map(self._branch, names, windows, self.arguments or [{}] * len(names)))

    def _branch(self, name: str, window: int | str, extra: Mapping[str, Any]) -> BranchConfig:
        encoder, _, side = name.partition("@")
        size, spec, arguments = int(side), encoder_spec(encoder, extra), dict(extra)
        if ENCODERS[encoder].build is VisionTransformer and self.counter != "L":
            arguments["windows"] = [14, 14, 0] * (spec.depth // 3) if window == "vitdet" else window
            padded = self.counter == "D" or ENCODERS[encoder].family in PADS_TOKENS
            arguments["window_padding"] = "tokens" if padded else "qkv"
            if self.counter == "A":  # the counter stored a position for every cell of the view
                arguments["position_grid"] = (self.table_side or size // spec.stride,) * 2
            if self.class_token:
                arguments["class_token"] = True
        runs = layer_runs(spec.depth, self.interactions)
        return BranchConfig(encoder=encoder, size=size, interactions=runs, arguments=arguments)


def read_settings() -> dict[tuple[str, str], dict[str, Any]]:
    """(table, row) -> the line of tables.yaml, its reason spelled out."""
    data = yaml.safe_load((resources.files("stepwell.flops") / "tables.yaml").read_text(encoding="utf-8"))
    reasons = {None: "", **data["reasons"]}
    return {
        (str(table), str(row)): {**line, "reason": reasons[line.get("reason")]}
        for table, lines in data["tables"].items()
        for row, line in lines.items()
    }


def paper_rows() -> list[Row]:
    """Every row, in the order of the paper. GFLOPs are 1e9 multiply-accumulates."""
    counted: dict[str, dict[str, tuple[int, int]]] = {}  # rows that share a network are counted once
    rows = []
    for (table, name), line in read_settings().items():
        fields = dict(line)
        reason, part = fields.pop("reason"), fields.pop("part", None)
        printed, printed_M = fields.pop("gflops"), fields.pop("params_M", None)
        gflops, params_M = None, None
        if fields:
            key = json.dumps(fields, sort_keys=True)
            if key not in counted:
                counted[key] = count_setting(Setting(**fields))
            parts = [counted[key][part]] if part else list(counted[key].values())
            gflops, params_M = sum(macs for macs, _ in parts) / 1e9, sum(params for _, params in parts) / 1e6
        rows.append(
            {
                "table": table,
                "row": name,
                "expected_gflops": printed,
                "computed_gflops": gflops,
                "expected_params_M": printed_M,
                "computed_params_M": params_M,
                "reason": reason,
                "error": None if gflops is None else gflops / printed - 1,
            }
        )
    return rows


def paper_table(*, as_json: bool = False) -> str:
    """Every row as a table, or as a JSON list of objects."""
    rows = paper_rows()
    if as_json:
        return json.dumps(rows, indent=2, ensure_ascii=False)
    lines = [
        ["-" if row[key] is None else format(row[key], form) for key, (_, form) in COLUMNS.items()]
        for row in rows
    ]
    return aligned([heading for heading, _ in COLUMNS.values()], lines)


def count_setting(setting: Setting) -> dict[str, tuple[int, int]]:
    """part -> (multiply-accumulates, parameters) of the network, built and counted."""
    model, run = _build(setting)
    macs = paper_macs(model, run, setting.counter, rms_norm=setting.rms_norm)
    return {part: (macs.get(part, 0), params) for part, params in count_params(model).items()}


def _build(setting: Setting) -> tuple[nn.Module, Callable[[], object]]:
    branches, fast = setting.branch_configs(), setting.fast
    interaction = InteractionConfig(
        attention=setting.attention, project=not fast, norm=not fast, directions=setting.directions
    )
    common: dict[str, Any] = {"branches": branches, "interaction": interaction}
    if setting.counter == "A":
        common["head"] = "first_patch" if setting.class_token and len(branches) > 1 else "merge"
        return build_outlined(ClassifierSettings(**common))
    if setting.counter == "D" and len(branches) > 1:
        return build_outlined(dense_settings(merge="stages", **common))
    side = max(branch.size for branch in branches)
    with outlines():
        encoder = build_pyramid(branches, interaction)
        views = image_pyramid(torch.empty(1, 3, side, side), [branch.size / side for branch in branches])
    return encoder.eval(), partial(encoder, views)
