"""The self-check finds a fast path that is wrong, and looks at every op that has one."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

from stepwell.doctor import checks
from stepwell.doctor.checks import CHECKS, self_check

OPS = Path(__file__).parents[2] / "src" / "stepwell" / "ops"


def twins() -> list[tuple[str, str]]:
    """(module, op) of every op that is defined twice, NAME_reference and NAME_fast."""
    found = []
    for path in sorted(OPS.glob("*.py")):
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        found += [
            (path.stem, name[:-5]) for name in sorted(names) if name.endswith("_fast") and name[0] != "_"
        ]
    return found


def result(name: str) -> checks.Result:
    (found,) = (one for one in self_check() if one.name == name)
    return found


def test_every_op_with_a_fast_twin_is_checked() -> None:
    assert {op for _, op in twins()} <= CHECKS.keys()


def test_here_all_fast_paths_are_right_to_rounding() -> None:
    for one in self_check():
        assert one.is_ok, one
        assert one.difference is not None
        assert one.difference < 1e-4


@pytest.mark.parametrize(("module", "op"), [pair for pair in twins() if pair[1] != "depthwise"])
@pytest.mark.parametrize("wrong", ["values", "gradients"])
def test_a_wrong_fast_twin_is_found(module, op, wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depthwise convolutions have theirs on GPUs alone."""
    home = importlib.import_module(f"stepwell.ops.{module}")
    right = getattr(home, f"{op}_fast")

    def broken(*args: object) -> torch.Tensor:
        out = right(*args)
        if wrong == "values":
            return out + 0.01 * out.detach().abs().max()
        return out.detach() + 1.01 * (out - out.detach())

    for place in (home, checks):
        if hasattr(place, f"{op}_fast"):
            monkeypatch.setattr(place, f"{op}_fast", broken)
    failed = [one for one in self_check() if not one.is_ok]
    assert op in {one.name for one in failed}
    assert all(one.difference is not None and 0.001 < one.difference < 0.1 for one in failed)


@pytest.mark.parametrize("name", ["in_parts", "pooled_norm", "attention"])
def test_a_wrong_path_beside_the_twins_is_found(name, monkeypatch: pytest.MonkeyPatch) -> None:
    place, what = {
        "in_parts": ("stepwell.ops.parts", "choose"),  # taken whole by a function that is no longer the same
        "pooled_norm": ("stepwell.doctor.checks", "pool_for_norm"),
        "attention": ("torch.nn.functional", "scaled_dot_product_attention"),
    }[name]
    module = importlib.import_module(place)
    right = getattr(module, what)
    if name == "in_parts":
        monkeypatch.setattr(torch.Tensor, "split", lambda x, step, dim: [x[:, :step], x[:, :step]])
    else:
        monkeypatch.setattr(module, what, lambda *args, **rest: 1.01 * right(*args, **rest))
    assert not result(name).is_ok


def test_an_error_in_one_check_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("stepwell.ops.deform_attn.deform_attn_fast", fail)
    assert result("deform_attn").error == "RuntimeError: no kernel image is available"
    assert [one.name for one in self_check() if not one.is_ok] == ["deform_attn"]


def test_values_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stepwell.ops.double.double_map_fast", lambda x, *rest: x.new_full((2, 3, 18, 14), torch.nan)
    )
    assert result("double_map").error is not None
    assert not result("double_map").is_ok


def test_random_numbers_of_the_caller_stay_as_they_were() -> None:
    before = torch.get_rng_state()
    self_check()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.cuda
def test_a_gpu_is_checked_against_its_own_reference() -> None:
    for one in self_check("cuda"):
        assert one.is_ok, one
