"""The cost tables of PIIP, rebuilt: every network built on the meta device, and counted.

arXiv 2501.07783, Tables I to XVII, and the official README; tables.yaml holds the printed figures and what
each is the figure of. What the printed figures count is told in flops/count.py and docs/piip.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from typing import Any

import torch
import yaml
from torch import nn

from stepwell.encoders.catalogue import ENCODERS, encoder_spec
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import Convention, count_params, paper_macs
from stepwell.flops.outlines import outlines
from stepwell.flops.text import aligned
from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.dense import ClassifierSettings
from stepwell.models.published.piip import dense_settings
from stepwell.models.pyramid import BranchConfig, build_pyramid
from stepwell.models.runs import layer_runs
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
        return None if self.computed_gflops is None else self.computed_gflops / self.expected_gflops - 1


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
            padded = self.counter == "D" or ENCODERS[encoder].family == "augreg"
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
    """Every row, in the order of the paper."""
    counted: dict[str, dict[str, tuple[int, int]]] = {}  # rows that share a network are counted once
    rows = []
    for (table, name), line in read_settings().items():
        fields = dict(line)
        reason, part = fields.pop("reason"), fields.pop("part", None)
        gflops, params_M = fields.pop("gflops"), fields.pop("params_M", None)
        macs, params = None, None
        if fields:
            key = json.dumps(fields, sort_keys=True)
            if key not in counted:
                counted[key] = count_setting(Setting(**fields))
            parts = counted[key]
            macs, params = map(sum, zip(*([parts[part]] if part else parts.values()), strict=True))
        rows.append(
            Row(
                table=table,
                row=name,
                expected_gflops=gflops,
                computed_gflops=None if macs is None else macs / 1e9,
                expected_params_M=params_M,
                computed_params_M=None if params is None else params / 1e6,
                reason=reason,
            )
        )
    return rows


def paper_table(*, as_json: bool = False) -> str:
    """Every row as a table, or as a JSON list of objects."""
    rows = paper_rows()
    if as_json:
        return rows_as_json(rows)

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [
            row.table,
            row.row,
            shown(row.expected_gflops, "g"),
            shown(row.computed_gflops, ".2f"),
            shown(row.error, "+.2%"),
            shown(row.expected_params_M, "g"),
            shown(row.computed_params_M, ".2f"),
            row.reason,
        ]
        for row in rows
    ]
    heads = ["table", "row", "printed G", "counted G", "error", "printed M", "counted M", "why it differs"]
    return aligned(heads, lines)


def rows_as_json(rows: Sequence[Row]) -> str:
    return json.dumps([{**asdict(row), "error": row.error} for row in rows], indent=2, ensure_ascii=False)


def count_setting(setting: Setting) -> dict[str, tuple[int, int]]:
    """part -> (multiply-accumulates, parameters) of the network, built and counted."""
    model, run = _build(setting)
    macs = paper_macs(model, run, setting.counter, rms_norm=setting.rms_norm)
    return {part: (macs.get(part, 0), params) for part, params in count_params(model).items()}


def _build(setting: Setting) -> tuple[nn.Module, Callable[[], object]]:
    branches, fast, counter = setting.branch_configs(), setting.fast, setting.counter
    interaction = InteractionConfig(
        attention=setting.attention, project=not fast, norm=not fast, directions=setting.directions
    )
    common: dict[str, Any] = {"branches": branches, "interaction": interaction}
    side = branches[-1].size
    with outlines():
        image: Any = torch.empty(1, 3, side, side)
        if counter == "L" or (counter == "D" and len(branches) == 1):
            model: nn.Module = build_pyramid(branches, interaction)
            image = image_pyramid(image, [branch.size / side for branch in branches])
        elif counter == "D":
            model = dense_settings(merge="stages", **common).build()
        else:
            head = "first_patch" if setting.class_token and len(branches) > 1 else "merge"
            model = ClassifierSettings(head=head, **common).build(num_classes=1000)
    return model.eval(), partial(model, image)
