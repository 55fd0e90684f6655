"""The cost tables of PIIP, rebuilt: every network built on the meta device, and counted.

arXiv 2501.07783, Tables I to XVII, and the official README; tables.yaml holds the printed figures and what
each is the figure of. What the printed numbers count is told in flops/cost.py and docs/piip.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from typing import Any

import torch
import yaml
from torch import nn

from stepwell.encoders.catalogue import ENCODERS
from stepwell.flops.cost import CONVENTIONS, Convention
from stepwell.flops.count import BACKBONE, count_macs, count_params
from stepwell.flops.outlines import outlines
from stepwell.flops.shapes import VitShape, shape_of
from stepwell.flops.text import aligned
from stepwell.models.published.piip import dense_settings
from stepwell.models.runs import layer_runs
from stepwell.models.settings import BranchConfig, ClassifierSettings, InteractionConfig, PiipConfig
from stepwell.models.vision import build_classifier, build_features, build_pyramid_encoder
from stepwell.views.pyramid import image_pyramid

__all__ = ["Row", "Setting", "count_setting", "paper_rows", "paper_table", "read_settings", "rows_as_json"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table. `computed_*` None: not computed. GFLOPs are 1e9 multiply-accumulates."""

    table: str
    row: str
    expected_gflops: float
    computed_gflops: float | None
    expected_params_M: float | None
    computed_params_M: float | None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """Computed over printed GFLOPs, minus one."""
        if self.computed_gflops is None:
            return None
        return self.computed_gflops / self.expected_gflops - 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What stands behind a printed figure, in the words of tables.yaml."""

    branches: str
    arguments: Sequence[Mapping[str, Any]] = ()
    windows: Any = 0
    interactions: int = 0
    attention: Any = "deformable"
    directions: str = "adjacent"
    fast: bool = False
    class_token: bool = False
    counter: str = "A"
    rms_norm: int = 0
    table_side: int | None = None

    @property
    def convention(self) -> Convention:
        return replace(CONVENTIONS[self.counter], rms_norm=self.rms_norm)

    @property
    def interaction(self) -> InteractionConfig:
        return InteractionConfig(
            attention=self.attention, project=not self.fast, norm=not self.fast, directions=self.directions
        )

    def branch_configs(self) -> tuple[BranchConfig, ...]:
        names = self.branches.split()
        windows = self.windows if isinstance(self.windows, list) else [self.windows] * len(names)
        extra = self.arguments or [{}] * len(names)
        return tuple(map(self._branch, names, windows, extra))

    def _branch(self, name: str, window: int | str, extra: Mapping[str, Any]) -> BranchConfig:
        encoder, _, side = name.partition("@")
        size, shape, arguments = int(side), shape_of(encoder, extra), dict(extra)
        depth = len(shape.dims)
        if isinstance(shape, VitShape) and self.counter != "L":
            arguments["windows"] = [14, 14, 0] * (depth // 3) if window == "vitdet" else window
            padded = self.counter == "D" or ENCODERS[encoder].family == "augreg"
            arguments["window_padding"] = "tokens" if padded else "qkv"
            if self.counter == "A":  # the counter stored a position for every cell of the view
                cells = self.table_side or size // shape.patch
                arguments["position_grid"] = (cells, cells)
            if self.class_token:
                arguments["class_token"] = True
        runs = layer_runs(depth, self.interactions)
        return BranchConfig(encoder=encoder, size=size, interactions=runs, arguments=arguments)


def read_settings() -> dict[tuple[str, str], dict[str, Any]]:
    """(table, row) -> the line of tables.yaml, its reason spelled out."""
    text = (resources.files("stepwell.flops") / "tables.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    reasons = data["reasons"]
    return {
        (str(table), str(row)): {**line, "reason": reasons[line["reason"]] if "reason" in line else ""}
        for table, lines in data["tables"].items()
        for row, line in lines.items()
    }


def paper_rows() -> list[Row]:
    """Every row, in the order of the paper."""
    counted: dict[str, dict[str, tuple[int, int]]] = {}  # rows that share a network are counted once
    rows = []
    for (table, name), line in read_settings().items():
        fields = dict(line)
        reason, part = fields.pop("reason"), fields.pop("part", None)
        gflops, params = fields.pop("gflops"), fields.pop("params_M", None)
        macs = numbers = None
        if fields:
            key = json.dumps(fields, sort_keys=True)
            if key not in counted:
                counted[key] = count_setting(Setting(**fields))
            parts = counted[key]
            chosen = [parts[part]] if part else list(parts.values())
            macs = sum(macs for macs, _ in chosen) / 1e9
            numbers = sum(params for _, params in chosen) / 1e6
        rows.append(
            Row(
                table=table,
                row=name,
                expected_gflops=gflops,
                computed_gflops=macs,
                expected_params_M=params,
                computed_params_M=numbers,
                reason=reason,
            )
        )
    return rows


def paper_table(*, as_json: bool = False) -> str:
    """Every row as a table, or as a JSON list of objects."""
    rows = paper_rows()
    if as_json:
        return rows_as_json(rows)
    lines = [
        [
            row.table,
            row.row,
            f"{row.expected_gflops:g}",
            "-" if row.computed_gflops is None else f"{row.computed_gflops:.2f}",
            "-" if row.error is None else f"{row.error:+.2%}",
            "-" if row.expected_params_M is None else f"{row.expected_params_M:g}",
            "-" if row.computed_params_M is None else f"{row.computed_params_M:.2f}",
            row.reason,
        ]
        for row in rows
    ]
    heads = ["table", "row", "printed G", "counted G", "error", "printed M", "counted M", "why it differs"]
    return aligned(heads, lines)


def rows_as_json(rows: Sequence[Row]) -> str:
    entries = [{**asdict(row), "error": row.error} for row in rows]
    return json.dumps(entries, indent=2, ensure_ascii=False)


def count_setting(setting: Setting) -> dict[str, tuple[int, int]]:
    """part -> (multiply-accumulates, parameters) of the network, built and counted."""
    branches = setting.branch_configs()
    model, run = _build(setting, branches)
    macs = count_macs(model, run, setting.convention)
    params = count_params(model)
    return {part: (macs[part] if BACKBONE.fullmatch(part) else 0, params[part]) for part in params}


def _build(setting: Setting, branches: tuple[BranchConfig, ...]) -> tuple[nn.Module, Callable[[], object]]:
    side = branches[-1].size
    common: dict[str, Any] = {"branches": branches, "interaction": setting.interaction}
    with outlines():
        image = torch.empty(1, 3, side, side)
        if setting.counter == "L" or (setting.counter == "D" and len(branches) == 1):
            encoder = build_pyramid_encoder(PiipConfig(**common)).eval()
            return encoder, partial(encoder, image_pyramid(image, [b.size / side for b in branches]))
        model: nn.Module
        if setting.counter == "D":
            model = build_features(dense_settings(merge="stages", **common))
        else:
            heads = setting.class_token and len(branches) > 1
            settings = ClassifierSettings(head="first_patch" if heads else "merge", **common)
            model = build_classifier(settings, num_classes=1000)
    return model.eval(), partial(model, image)
