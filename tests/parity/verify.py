"""Are we equal to the official code? `python tests/parity/verify.py PATH... [--path reference|fast|both]`

Every golden file (record.py) names a kind; the kind names a case (cases_*.py), which is run on the readable
reference and on the fast path. One line a file: its name, the largest error over its tolerance, and ok,
FAILED or unsupported with the reason.
Exit code 0 when every file passed, 1 when one did not, 2 when a path is missing or cannot be read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import cases_anyres
import cases_dino
import cases_dual
import cases_encoders
import cases_inf
import cases_metrics
import cases_multiview
import cases_piip
import cases_slices
import cases_upsample
import cases_windows
from record import Case, Record, TableCheck, Unsupported, read_record
from stepwell.ops.choose import Path as OpPath
from stepwell.ops.choose import prefer

__all__ = ["Unreadable", "Verdict", "error_over_tolerance", "main", "read_records", "verify"]

CASES: dict[str, Case] = {
    **cases_dino.CASES,
    **cases_dual.CASES,
    **cases_anyres.CASES,
    **cases_encoders.CASES,
    **cases_inf.CASES,
    **cases_metrics.CASES,
    **cases_multiview.CASES,
    **cases_piip.CASES,
    **cases_slices.CASES,
    **cases_upsample.CASES,
    **cases_windows.CASES,
}
"""By kind; each system has a file of its own."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of one file; `error` is the largest error over its tolerance, at most 1 where ok."""

    status: str  # ok, FAILED or unsupported
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file in a folder of golden files that is damaged, and how."""

    path: Path
    reason: str


def read_records(paths: Iterable[Path]) -> list[Record | Unreadable]:
    """The records in files and folders (`*.safetensors` and `*.json` that are records, sorted by name).

    A file of a folder that cannot be read stands in its place with the reason. Raises FileNotFoundError for a
    missing path and ValueError for a file named itself that cannot be read, or holds no record.
    """
    records: list[Record | Unreadable] = []
    for path in paths:
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json") and f.is_file())
            recorded = [record for record in map(_read_or_reason, files) if record is not None]
            if not recorded:
                raise ValueError(f"{path}: no golden file in this folder")
            records += recorded
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif (record := read_record(path)) is None:
            raise ValueError(f"{path}: not a golden file, it has no record")
        else:
            records.append(record)
    return records


def _read_or_reason(path: Path) -> Record | Unreadable | None:
    try:
        return read_record(path)
    except ValueError as error:
        return Unreadable(path, _one_line(error).removeprefix(f"{path}: "))


def verify(record: Record, paths: Sequence[OpPath] = ("reference", "fast")) -> Verdict:
    """Run one record's case on each path and judge the worse of them."""
    case = CASES.get(record.kind)
    if case is None:
        return Verdict("unsupported", reason=f"kind {record.kind}")
    verdicts = []
    for path in paths:
        with prefer(path):
            verdict = _run(case, record)
        if verdict.status == "unsupported":
            return verdict
        if verdict.status == "FAILED":
            return Verdict("FAILED", verdict.error, f"{path} path: {verdict.reason}")
        verdicts.append(verdict)
    return max(verdicts, key=lambda verdict: verdict.error or 0.0)


def _run(case: Case, record: Record) -> Verdict:
    try:
        answer = case(record)
    except Unsupported as error:
        return Verdict("unsupported", reason=str(error))
    except Exception as error:  # whatever a case raises is this file's verdict, and the others still run
        return Verdict("FAILED", reason=f"{type(error).__name__}: {_one_line(error)}"[:300])
    return _judge_table(answer) if isinstance(answer, TableCheck) else _judge_tensors(answer, record)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _judge_table(check: TableCheck) -> Verdict:
    if check.differences:
        more = f" (and {len(check.differences) - 1} more)" if len(check.differences) > 1 else ""
        return Verdict("FAILED", math.inf, f"{check.differences[0][:200]}{more}")
    told = [f"not yet {', '.join(check.left_out)}"] if check.left_out else []
    told += [f"by {program} {', '.join(parts)}" for program, parts in check.by_others.items()]
    checked = [f"checked {', '.join(check.parts)}"] if told else []
    return Verdict("ok", 0.0, "; ".join(checked + told))


def _judge_tensors(ours: Mapping[str, Tensor], record: Record) -> Verdict:
    if ours.keys() != record.outputs.keys():
        missing, extra = record.outputs.keys() - ours.keys(), ours.keys() - record.outputs.keys()
        return Verdict("FAILED", reason=f"outputs missing {sorted(missing)}, not recorded {sorted(extra)}")
    worst = 0.0
    for name, stored in record.outputs.items():
        if ours[name].shape != stored.shape:
            shapes = f"{tuple(ours[name].shape)}, recorded {tuple(stored.shape)}"
            return Verdict("FAILED", reason=f"output {name} has shape {shapes}")
        error = error_over_tolerance(ours[name], stored, *record.limits(name))
        if not error <= 1:
            return Verdict("FAILED", error, f"output {name}")
        worst = max(worst, error)
    return Verdict("ok", worst)


def error_over_tolerance(ours: Tensor, stored: Tensor, rtol: float, atol: float) -> float:
    """max of |ours - stored| / (atol + rtol * |stored|).

    NaN, and any difference where nothing is allowed, counts as infinite.
    """
    if stored.numel() == 0:
        return 0.0
    ours, stored = ours.detach().cpu().double(), stored.double()
    difference = torch.where(ours == stored, 0.0, (ours - stored).abs())  # equal infinities do not differ
    allowed = atol + rtol * stored.abs()
    error = torch.where(difference == 0, 0.0, difference / allowed)
    return float(torch.where(error.isnan(), math.inf, error).max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/parity/verify.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="golden files or folders of them")
    parser.add_argument("--path", choices=("reference", "fast", "both"), default="both", help="default: both")
    options = parser.parse_args(arguments)
    try:
        records = read_records(options.paths)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    asked: tuple[OpPath, ...] = ("reference", "fast") if options.path == "both" else (options.path,)
    width = max(len(record.path.name) for record in records)
    count = dict.fromkeys(("ok", "FAILED", "unsupported"), 0)
    for record in records:
        if isinstance(record, Unreadable):
            verdict = Verdict("FAILED", reason=record.reason[:300])
        else:
            verdict = verify(record, asked)
        count[verdict.status] += 1
        largest = "-" if verdict.error is None else f"{verdict.error:.3g}"
        print(
            f"{record.path.name:{width}}  {largest:>9}  {verdict.status}  {verdict.reason}".rstrip(),
            flush=True,
        )
    print(f"{count['ok']} passed, {count['FAILED']} failed, {count['unsupported']} unsupported")
    return 0 if count["ok"] == len(records) else 1


if __name__ == "__main__":
    sys.exit(main())
