"""The verify command judges golden files as their record says, and says why one fails."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import verify
from record import Record, TableCheck, Unsupported, read_record
from stepwell.keys.engine import Drop, Rename
from stepwell.ops.choose import choose

GOLDEN = Path(__file__).parent / "inf"
PROJECTOR = GOLDEN / "projector_mlp2x_gelu.safetensors"


def write(path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A golden file of kind `test.kind`."""
    record = {"system": "test", "kind": "test.kind", "case": path.stem, "version": "a", "settings": {}}
    record |= {"tolerance": {"rtol": 0, "atol": 0}, "params_without_influence": []}
    save_file(tensors, path, metadata={"json": json.dumps(record | changes)})
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with a case for `test.kind`; exit code and lines."""

    def go(*arguments: str | Path, case: Any = None) -> tuple[int, list[str]]:
        if case is not None:
            monkeypatch.setitem(verify.CASES, "test.kind", case)
        code = verify.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).splitlines()

    return go


def test_recorded_files_of_the_llava_family_pass(run: Any) -> None:
    names = ["conversations.json", *(f"projector_{kind}.safetensors" for kind in ("linear", "mlp2x_gelu"))]
    names += [f"splice_{kind}.safetensors" for kind in ("left", "right", "right_truncated")]
    code, lines = run(*(GOLDEN / name for name in names))
    assert code == 0
    assert lines[-1] == "6 passed, 0 failed, 0 unsupported"
    assert all(" ok" in line for line in lines[:-1])


@pytest.mark.slow
def test_the_script_finds_its_siblings_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, verify.__file__, str(PROJECTOR), "--path", "reference"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 unsupported"


def test_a_changed_weight_fails_on_both_paths_and_says_which_output(run: Any, tmp_path: Path) -> None:
    tensors = load_file(PROJECTOR)
    tensors["param.2.bias"][0] += 1e-3
    record = read_record(PROJECTOR)
    assert record is not None
    changed = write(
        tmp_path / "changed.safetensors",
        tensors,
        kind="inf.projector",
        settings=record.settings,
        tolerance=record.tolerance,
    )
    code, lines = run(changed)
    assert code == 1
    assert "FAILED  reference path: output y" in lines[0]
    assert lines[1] == "0 passed, 1 failed, 0 unsupported"


def test_a_table_says_the_first_of_its_differences(run: Any, tmp_path: Path) -> None:
    table = json.loads((GOLDEN / "conversations.json").read_text(encoding="utf-8"))
    table["vicuna_v1"]["cases"][3]["prompt"] += " "
    table["qwen_next"]["cases"][0]["spans"][0][1] += 1
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    code, (line, _) = run(path)
    assert code == 1
    assert line.endswith("FAILED  reference path: vicuna_v1/text_only: prompt (and 1 more)")


def test_the_splice_is_exact(run: Any, tmp_path: Path) -> None:
    record = read_record(GOLDEN / "splice_left.safetensors")
    assert record is not None
    tensors = load_file(record.path)
    first = tensors["out.inputs_embeds"].flatten()
    first[-1] = torch.nextafter(first[-1], torch.tensor(9.0))
    path = tmp_path / "splice.safetensors"
    write(path, tensors, kind="inf.splice", settings=record.settings)
    assert run(path)[0] == 1


@pytest.mark.parametrize(
    ("ours", "stored", "rtol", "atol", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0, 0, 0),
        ([1.0, 2.0], [1.0, 2.5], 0.0, 1.0, 0.5),
        ([1.0, 3.0], [1.0, 2.0], 0.25, 0.5, 1.0),
        ([1.0, 2.0 + 1e-6], [1.0, 2.0], 0, 0, math.inf),
        ([math.nan, 2.0], [1.0, 2.0], 1, 1, math.inf),
        ([math.nan, 2.0], [math.nan, 2.0], 1, 1, math.inf),
        ([math.inf, 2.0], [math.inf, 2.0], 0, 0, 0),
        ([math.inf, 2.0], [1.0, 2.0], 1, 1, math.inf),
        ([], [], 0, 0, 0),
    ],
)
def test_error_is_measured_against_the_tolerance(
    ours: list[float], stored: list[float], rtol: float, atol: float, expected: float
) -> None:
    error = verify.error_over_tolerance(torch.tensor(ours), torch.tensor(stored), rtol, atol)
    assert error == pytest.approx(expected)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"y": torch.zeros(3)}, "output y has shape (3,), recorded (2,)"),
        ({}, "outputs missing ['y'], not recorded []"),
        ({"y": torch.zeros(2), "z": torch.zeros(2)}, "outputs missing [], not recorded ['z']"),
        ({"y": torch.ones(2)}, "FAILED  reference path: output y"),
    ],
)
def test_outputs_that_do_not_fit_the_record_fail(
    run: Any, tmp_path: Path, outputs: dict[str, Tensor], says: str
) -> None:
    path = write(tmp_path / "a.safetensors", {"out.y": torch.zeros(2)})
    code, (line, _) = run(path, case=lambda record: outputs)
    assert code == 1
    assert says in line


def test_an_exception_of_one_case_is_its_verdict_and_the_others_still_run(run: Any, tmp_path: Path) -> None:
    def case(record: Record) -> dict[str, Tensor]:
        if record.case == "a":
            raise RuntimeError("first line\nsecond line")
        return {"y": torch.zeros(2)}

    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", {"out.y": torch.zeros(2)})
    code, lines = run(tmp_path, case=case)
    assert code == 1
    assert lines[0].endswith("FAILED  reference path: RuntimeError: first line second line")
    assert lines[1].split() == ["b.safetensors", "0", "ok"]
    assert lines[2] == "1 passed, 1 failed, 0 unsupported"


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], ["reference", "fast"]), (["--path", "fast"], ["fast"]), (["--path", "reference"], ["reference"])],
)
def test_a_case_runs_on_the_paths_asked_for(
    run: Any, tmp_path: Path, options: list[str], expected: list[str]
) -> None:
    seen = []

    def case(record: Record) -> dict[str, Tensor]:
        seen.append("fast" if choose(fast_ok=True, why_not="") else "reference")
        return {"y": torch.zeros(2)}

    code, _ = run(write(tmp_path / "a.safetensors", {"out.y": torch.zeros(2)}), *options, case=case)
    assert (code, seen) == (0, expected)


def test_a_failure_on_the_fast_path_alone_fails_the_file(run: Any, tmp_path: Path) -> None:
    def case(record: Record) -> dict[str, Tensor]:
        return {"y": torch.full((2,), float(choose(fast_ok=True, why_not="")))}

    code, (line, _) = run(write(tmp_path / "a.safetensors", {"out.y": torch.zeros(2)}), case=case)
    assert code == 1
    assert "FAILED  fast path: output y" in line


def test_an_unknown_kind_and_unknown_settings_are_unsupported(run: Any, tmp_path: Path) -> None:
    def case(record: Record) -> dict[str, Tensor]:
        raise Unsupported("window 7")

    write(tmp_path / "a.safetensors", {"out.y": torch.zeros(2)})
    write(tmp_path / "b.safetensors", {"out.y": torch.zeros(2)}, kind="test.other")
    code, lines = run(tmp_path, case=case)
    assert code == 1
    assert lines[0].endswith("-  unsupported  window 7")
    assert lines[1].endswith("-  unsupported  kind test.other")
    assert lines[2] == "0 passed, 0 failed, 2 unsupported"


def test_a_table_checked_in_part_names_what_is_left_out(run: Any, tmp_path: Path) -> None:
    table = {"system": "test", "kind": "test.kind", "case": "a", "settings": {}, "squares": [1]}
    (tmp_path / "a.json").write_text(json.dumps(table))

    def case(record: Record) -> TableCheck:
        assert record.table == {"squares": [1]}
        return TableCheck(("squares",), left_out=("cubes",))

    code, (line, _) = run(tmp_path / "a.json", case=case)
    assert code == 0
    assert line.endswith("ok  checked squares; not yet cubes")


def test_a_folder_is_read_in_order_without_the_files_that_hold_no_record(run: Any, tmp_path: Path) -> None:
    shutil.copy(PROJECTOR, tmp_path / "b.safetensors")
    shutil.copy(PROJECTOR, tmp_path / "a.safetensors")
    (tmp_path / "README.md").write_text("no record")
    (tmp_path / "manifest.json").write_text('{"tensors": 3}')
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    code, lines = run(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in lines] == ["a.safetensors", "b.safetensors", "2"]


def test_a_damaged_file_in_a_folder_fails_and_the_others_are_checked(run: Any, tmp_path: Path) -> None:
    shutil.copy(PROJECTOR, tmp_path / "c.safetensors")
    (tmp_path / "a.safetensors").write_bytes(PROJECTOR.read_bytes()[:500])
    (tmp_path / "b.json").write_bytes(b'{"kind": ')
    code, lines = run(tmp_path)
    assert code == 1
    for line, name in zip(lines, ("a.safetensors", "b.json"), strict=False):
        assert line.startswith(name)
        assert "-  FAILED  not a readable golden file" in line
    assert lines[2].split()[::2] == ["c.safetensors", "ok"]
    assert lines[3] == "1 passed, 2 failed, 0 unsupported"


def test_parameters_that_are_missing_are_named(run: Any, tmp_path: Path) -> None:
    def case(record: Record) -> dict[str, Tensor]:
        return {"y": record.load_into(nn.Linear(2, 3), [Rename("weight", "weight")]).bias}

    tensors = {"param.weight": torch.zeros(3, 2), "out.y": torch.zeros(3)}
    code, (line, _) = run(write(tmp_path / "a.safetensors", tensors), case=case)
    assert code == 1
    assert 'Missing key(s) in state_dict: "bias"' in line


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.safetensors", None, "no such file or folder"),
        ("empty", "folder", "no golden file in this folder"),
        ("cut.safetensors", b"\x00" * 20, "not a readable golden file"),
        ("cut.json", b'{"kind": ', "not a readable golden file"),
        ("list.json", b"[1]", "not a golden file, it has no record"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    run: Any, tmp_path: Path, name: str, content: Any, says: str
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    code, lines = run(PROJECTOR, path)
    assert code == 2
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert says in lines[0]


def record_with(params: dict[str, Tensor], idle: tuple[str, ...] = ()) -> Record:
    return Record(
        path=Path("a"),
        system="test",
        kind="test.kind",
        case="a",
        version="a",
        settings={},
        params=params,
        params_without_influence=idle,
    )


def test_parameters_go_in_through_key_tables_strictly() -> None:
    rules = [Rename(r"fc\.(weight|bias)", r"\1"), Drop("extra", "not needed")]
    params = {"fc.weight": torch.randn(2, 3), "fc.bias": torch.randn(2), "extra": torch.zeros(1)}
    module = record_with(params).load_into(nn.Linear(3, 2), rules)
    assert torch.equal(module.weight, params["fc.weight"])
    assert not module.training
    with pytest.raises(ValueError, match="1 parameters have no place here: other"):
        record_with({**params, "other": torch.zeros(1)}).load_into(nn.Linear(3, 2), rules)
    with pytest.raises(RuntimeError, match="Missing key"):
        record_with({"fc.weight": params["fc.weight"]}).load_into(nn.Linear(3, 2), rules)


def test_parameters_without_influence_need_no_place() -> None:
    params = {"weight": torch.randn(2, 3), "bias": torch.randn(2), "idle": torch.zeros(1)}
    record = record_with(params, idle=("idle",))
    assert record.converted([Rename("weight|bias", r"\g<0>")]).keys() == {"weight", "bias"}
