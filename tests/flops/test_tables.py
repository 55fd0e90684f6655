"""PIIP's printed figures: every kind of row counted, all of them read."""

from __future__ import annotations

import json

import pytest

from stepwell.flops import tables
from stepwell.flops.tables import Setting, count_setting, paper_rows, paper_table, read_settings

SETTINGS = read_settings()
COUNTED = {key: line for key, line in SETTINGS.items() if "branches" in line}
FEATURES = (
    *("reason", "counter", "attention", "directions", "fast", "class_token", "rms_norm", "part"),
    "table_side",
)


def _setting(line):
    return Setting(**{k: v for k, v in line.items() if k not in ("gflops", "params_M", "reason", "part")})


def _one_of_each_kind():
    """The cheapest row of every table and feature; `stepwell flops --paper` counts the others too."""
    kinds = {}
    for key, line in sorted(COUNTED.items(), key=lambda item: item[1]["gflops"]):
        kinds.setdefault((key[0], *(line.get(feature) for feature in FEATURES)), key)
    return list(kinds.values())


@pytest.mark.parametrize("key", _one_of_each_kind(), ids="-".join)
def test_a_printed_figure_is_met_within_a_percent_or_has_a_reason(key):
    line = SETTINGS[key]
    parts = count_setting(_setting(line))
    chosen = [parts[line["part"]]] if "part" in line else parts.values()
    gflops, params = sum(macs for macs, _ in chosen) / 1e9, sum(params for _, params in chosen) / 1e6
    assert (abs(gflops / line["gflops"] - 1) > 0.01) == bool(line["reason"])
    if "params_M" in line:
        assert params == pytest.approx(line["params_M"], rel=0.01, abs=0.05)


@pytest.mark.parametrize("key", COUNTED, ids="-".join)
def test_every_row_tells_of_which_branches_it_is_the_figure(key):
    branches = _setting(COUNTED[key]).branch_configs()
    assert [f"{branch.encoder}@{branch.size}" for branch in branches] == COUNTED[key]["branches"].split()


@pytest.mark.parametrize(
    ("counter", "encoder", "padding"),
    [("A", "deit_t", "qkv"), ("A", "augreg_s", "tokens"), ("D", "deit_t", "tokens")],
)
def test_windows_are_padded_where_the_counter_padded_them(counter, encoder, padding):
    (branch,) = Setting(branches=f"{encoder}@64", counter=counter, windows=3).branch_configs()
    assert branch.arguments["window_padding"] == padding


def test_an_rms_norm_is_charged_as_the_row_says():
    tiny = {"dim": 8, "depth": 1, "num_heads": 1, "norm": "rmsnorm"}
    bare, charged = (
        count_setting(Setting(branches="vit_t@32", arguments=[tiny], rms_norm=n, counter="L")) for n in (0, 2)
    )
    assert charged["branches.0"][0] - bare["branches.0"][0] == 2 * 2 * 4 * 8  # two norms of 2x2 cells


def test_classifiers_with_class_tokens_have_a_head_a_branch_and_merge_nothing():
    tokens, none = (
        count_setting(Setting(branches="vit_nano@32 vit_nano@64", interactions=2, class_token=token))
        for token in (True, False)
    )
    assert "merges" in none
    assert "merges" not in tokens
    assert tokens["head"][1] == 2 * none["head"][1]


def test_every_row_is_there():
    assert len(SETTINGS) == 105
    assert len(SETTINGS) - len(COUNTED) == 3
    assert sum(table == "repository README" for table, _ in SETTINGS) == 11
    assert sum(bool(line["reason"]) for line in SETTINGS.values()) == 13


def test_rows_that_share_a_network_are_counted_once_and_shown_with_their_own_part(monkeypatch):
    network = {"branches": "vit_nano@64", "counter": "L"}
    lines = {
        ("I", "whole"): {"gflops": 2, "params_M": 3, "reason": "", **network},
        ("I", "head"): {"gflops": 1, "reason": "digit", "part": "head", **network},
        ("XI", "theirs"): {"gflops": 7, "reason": "other"},
    }
    counted = []

    def count(setting):
        counted.append(setting)
        return {"branches.0": (1_500_000_000, 2_000_000), "head": (600_000_000, 1_000_000)}

    monkeypatch.setattr(tables, "read_settings", lambda: lines)
    monkeypatch.setattr(tables, "count_setting", count)
    assert json.loads(paper_table(as_json=True)) == paper_rows()
    assert counted == [Setting(**network)] * 2  # once for each table that was asked for
    whole, head, theirs = paper_rows()
    assert whole == {
        "table": "I",
        "row": "whole",
        "expected_gflops": 2,
        "computed_gflops": 2.1,
        "expected_params_M": 3,
        "computed_params_M": 3.0,
        "reason": "",
        "error": pytest.approx(0.05),
    }
    assert (head["computed_gflops"], head["computed_params_M"]) == (0.6, 1.0)
    assert (theirs["computed_gflops"], theirs["error"]) == (None, None)
    shown = [line.split() for line in paper_table().splitlines()]
    assert shown[2] == ["I", "whole", "2", "2.10", "+5.00%", "3", "3.00"]
    assert shown[4] == ["XI", "theirs", "7", "-", "-", "-", "-", "other"]
