"""Every name is renamed, joined, dropped or reported."""

from __future__ import annotations

import re

import pytest
import torch

from stepwell.keys.engine import Drop, Join, Prefix, Rename, convert, plan

QKV = Join((r"(\w+)\.q", r"(\w+)\.k", r"(\w+)\.v"), r"\1.qkv", torch.cat)


def test_the_first_rule_that_matches_takes_a_name() -> None:
    result = plan(["a.w", "b.w"], [Rename(r"a\.w", "first"), Rename(r"(.)\.w", r"\1.second")])
    assert result.targets.keys() == {"first", "b.second"}


def test_a_pattern_has_to_match_the_whole_name() -> None:
    assert plan(["fc.weight.extra"], [Rename(r"fc\.weight", "w")]).unknown == ["fc.weight.extra"]


def test_a_tensor_may_be_changed_on_its_way() -> None:
    result = convert({"w": torch.ones(2, 3)}, [Rename("w", "v", torch.t)])
    assert result["v"].shape == (3, 2)


def test_parts_are_joined_in_the_order_of_the_rule() -> None:
    state = {"x.v": torch.tensor([3]), "x.q": torch.tensor([1]), "x.k": torch.tensor([2])}
    assert convert(state, [QKV])["x.qkv"].tolist() == [1, 2, 3]


def test_an_incomplete_join_is_unknown() -> None:
    assert sorted(plan(["x.q", "x.v"], [QKV]).unknown) == ["x.q", "x.v"]


def test_what_is_dropped_says_why() -> None:
    result = plan(["index"], [Drop("index", "computed here")])
    assert (result.dropped, result.targets, result.unknown) == ({"index": "computed here"}, {}, [])


def test_two_sources_of_one_target_are_refused() -> None:
    with pytest.raises(ValueError, match="would both become 'w'"):
        plan(["a", "b"], [Rename("[ab]", "w")])


def test_two_sources_of_one_part_of_a_join_are_refused() -> None:
    both = Join((r"(?:old_)?q", "k"), "qk", torch.cat)
    with pytest.raises(ValueError, match="'q' and 'old_q' would both be part 0 of 'qk'"):
        plan(["q", "old_q", "k"], [both])


def test_a_name_that_no_rule_under_its_prefix_takes_goes_to_the_next_rule() -> None:
    rules = [Prefix(r"net\.", "ours.", [Prefix(r"a\.", "", [Rename("w", "w")])]), Drop("net.*", "not needed")]
    result = plan(["net.a.w", "net.b.w"], rules)
    assert result.targets["ours.w"].sources == ("net.a.w",)
    assert result.dropped == {"net.b.w": "not needed"}


def test_tensors_without_a_rule_are_named() -> None:
    with pytest.raises(ValueError, match="1 tensors have no place here: other"):
        convert({"other": torch.zeros(1)}, [])


def test_a_table_moves_under_a_prefix_with_its_groups() -> None:
    def upper(match: re.Match[str]) -> str:
        return match[1].upper()

    rules = [QKV, Rename("n_(.)", upper), Drop("index|count", "computed here")]
    moved = [Prefix(r"(?:net|module)\.", "ours.", rules)]
    result = plan(["net.x.q", "net.x.k", "net.x.v", "module.n_a", "net.count", "n_b"], moved)
    assert result.targets["ours.x.qkv"].sources == ("net.x.q", "net.x.k", "net.x.v")
    assert result.targets["ours.A"].sources == ("module.n_a",)
    assert result.dropped == {"net.count": "computed here"}
    assert result.unknown == ["n_b"]
