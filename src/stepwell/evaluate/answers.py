"""The answers of a run, kept line by line while they come, so that a run which was stopped goes on.

A folder holds one run. settings.json is what its answers hang on: a run with other settings is refused.
answers.jsonl holds a line for every row that was answered; half a last line is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from torch import Tensor, nn

from stepwell.evaluate.differences import differences
from stepwell.folders import write_whole
from stepwell.models.ask import Assistant
from stepwell.structures import Region, Size

__all__ = [
    "ANSWERS",
    "SETTINGS",
    "Answer",
    "AnswersFile",
    "digest_of_file",
    "digest_of_networks",
    "digest_of_weights",
    "open_run",
]

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"

_SAMPLED = 64  # numbers of every tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """To one row. question: as the model was asked; seconds: its share of its batch's; visual_tokens,
    image_sizes, (height, width), and regions that were looked at closely, in pixels: one an image.
    """

    entry: int
    question_id: Any
    image: list[str]
    question: str
    answers: list[str]
    prediction: str
    seconds: float
    visual_tokens: list[int]
    image_sizes: list[Size]
    regions: list[Region | None] = field(default_factory=list)  # none in answers of 0.1


class AnswersFile:
    """The answers in a folder, by entry; a context in which more are added."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """settings: names -> JSON values. Raises ValueError where the folder holds a run with others."""
        self.folder = folder
        open_run(folder, settings)
        self.answers = {answer.entry: answer for answer in _read(folder / ANSWERS)}
        write_whole(folder / ANSWERS, "".join(map(_line, self.answers.values())))

    def __enter__(self) -> Self:
        self._file: TextIO = (self.folder / ANSWERS).open("a", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, answer: Answer) -> None:
        """On the disk when this returns, as far as a killed process goes."""
        self._file.write(_line(answer))
        self._file.flush()
        self.answers[answer.entry] = answer


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Answer]:
    """Those whose lines are whole."""
    answers = []
    for line in path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            answers.append(Answer(**json.loads(line)))
        except (ValueError, TypeError):  # cut off when the run was killed: its row is asked again
            continue
    return answers


def open_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a run, with its settings. Raises ValueError where it holds a run with others."""
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_others(folder, settings)
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2))


def _refuse_others(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        return
    try:
        kept = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} cannot be read; name another folder, or delete this one") from None
    if differing := differences(kept, json.loads(json.dumps(settings))):
        raise ValueError(
            f"{folder} holds the answers of another run: {differing}; name another folder "
            "with --output, or delete this one"
        )


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_weights(assistant: Assistant) -> str:
    """Alike for the same weights, whatever engine holds them: some numbers of every tensor tell it."""
    return digest_of_networks(assistant.engine.networks)


def digest_of_networks(networks: Iterable[nn.Module]) -> str:
    """Of all that they are saved with, parameters and statistics, whichever network holds which."""
    digests = {_digest(tensor) for network in networks for tensor in network.state_dict().values()}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def _digest(tensor: Tensor) -> str:
    """One that lies elsewhere, such as on a disk, is told by its shape."""
    numbers: list[float] = []
    if not tensor.is_meta:
        flat = tensor.detach().flatten()
        numbers = flat[:: max(1, len(flat) // _SAMPLED)].float().tolist()
    return hashlib.sha256(repr((tuple(tensor.shape), numbers)).encode()).hexdigest()
