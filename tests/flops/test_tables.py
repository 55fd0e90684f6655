"""PIIP's printed figures: all of them in closed form, and some by building the networks."""

from __future__ import annotations

import json

import pytest
from stepwell.flops.pyramid import PyramidCost

from stepwell.flops.tables import Row, Setting, count_setting, read_settings, rows_as_json
from stepwell.models.runs import STAGE_MERGES

SETTINGS = read_settings()
WITHOUT_SETTING = {"gflops", "params_M", "reason", "part"}


def _setting(line):
    return Setting(**{name: value for name, value in line.items() if name not in WITHOUT_SETTING})


def _in_closed_form(setting):
    branches = setting.branch_configs()
    merge, after, classes = "none", (), None
    if setting.counter == "A":
        merge = "none" if setting.class_token and len(branches) > 1 else "linear"
        classes = 1000
    elif setting.counter == "D" and len(branches) > 1:
        merge, after = "stages", STAGE_MERGES
    cost = PyramidCost(
        branches, setting.interaction, setting.convention, merge=merge, merge_after=after, num_classes=classes
    )
    return cost.parts([(branch.size, branch.size) for branch in branches])


COMPUTED = {key: line for key, line in SETTINGS.items() if "branches" in line}


@pytest.mark.parametrize("key", COMPUTED, ids="-".join)
def test_a_printed_figure_is_met_within_a_percent_or_has_a_reason(key):
    line = COMPUTED[key]
    parts = _in_closed_form(_setting(line))
    chosen = [parts[line["part"]]] if "part" in line else parts.values()
    gflops, params = sum(p.macs for p in chosen) / 1e9, sum(p.params for p in chosen) / 1e6
    assert (abs(gflops / line["gflops"] - 1) > 0.01) == bool(line["reason"])
    if "params_M" in line:
        assert params == pytest.approx(line["params_M"], rel=0.01, abs=0.05)


def test_every_row_is_there():
    assert len(SETTINGS) == 105
    assert len(SETTINGS) - len(COMPUTED) == 3
    assert sum(table == "repository README" for table, _ in SETTINGS) == 11
    assert sum(bool(line["reason"]) for line in SETTINGS.values()) == 13


@pytest.mark.parametrize(
    "key",
    [
        ("I", "PIIP-TSB 1120/896/448"),
        ("II", "PIIP-TSB T=ConvNeXt S=ViT B=ViT"),
        ("VIII", "PIIP-TSB 368/192/128"),
        ("X", "PIIP-B 512/256/128"),
        ("XI", "PIIP-LLaVA ConvNeXt-B+CLIP-L 1024/336 7B"),
        ("repository README", "InternViT-6B crop 512"),
        ("repository README", "PIIP-SBL AugReg 1568/1120/672"),
    ],
    ids="-".join,
)
def test_the_built_network_costs_what_the_closed_form_says(key):
    setting = _setting(SETTINGS[key])
    counted, parts = count_setting(setting), _in_closed_form(setting)
    for name, part in parts.items():
        assert counted.get(name, (0, 0)) == (part.macs, part.params)


def test_json_has_the_promised_fields():
    row = Row(
        table="I",
        row="B",
        expected_gflops=200,
        computed_gflops=201.0,
        expected_params_M=None,
        computed_params_M=3.0,
    )
    (entry,) = json.loads(rows_as_json([row]))
    assert entry == {
        "table": "I",
        "row": "B",
        "expected_gflops": 200,
        "computed_gflops": 201.0,
        "expected_params_M": None,
        "computed_params_M": 3.0,
        "error": pytest.approx(0.005),
        "reason": "",
    }
