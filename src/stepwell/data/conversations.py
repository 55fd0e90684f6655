"""Training files of images and conversations about them, as LLaVA and those after it write them.

LLaVA-1.5 (arXiv 2310.03744): a JSON list of entries with `image`, a path (or none), and `conversations`,
turns that are "from" a "human" or "gpt" with a "value" each. Others write a JSON value a line, `images`,
`messages` of "role" and "content", contents in parts that name their images, and several images. A single
placeholder is moved to the front of its turn, as the official code does. "region", [left, top, right, bottom]
in fractions of the image, is what is looked at closely; beside several images there is a list of one, or
null, each. "system" is what a system turn would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from stepwell.data.files import path_of, place_of, read_list
from stepwell.data.sample import Sample
from stepwell.folders import one_line
from stepwell.language.characters import well_formed
from stepwell.language.conversation import from_llava
from stepwell.language.messages import IMAGE, Message, image_in
from stepwell.views.region import regions_beside

__all__ = ["Conversations"]

_IMAGES, _TURNS = ("image", "images"), ("conversations", "messages")


class Conversations:
    """A source of the entries of one file, or of a sequence of them, such as a `datasets.Dataset`.

    Images stay as they are told: paths, `{"bytes": ..., "path": ...}`, or images. Raises ValueError, at once,
    for a file that holds no list; at an index, one line of what is wrong with the entry.
    """

    def __init__(
        self,
        entries: str | Path | Sequence[Mapping[str, Any]],
        *,
        images: Path | None = None,
        prompt: str | None = None,
    ) -> None:
        """images: the folder that image paths start from, by default the one of the file. prompt: a line that
        is put behind every question that does not end with it.
        """
        self.path = Path(entries) if isinstance(entries, str | Path) else None
        self.entries: Sequence[Any] = entries if self.path is None else _read(self.path)  # type: ignore[assignment]
        self.images = Path(images or (self.path.parent if self.path else "."))
        self.prompt = prompt

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, index: int) -> str:
        place = place_of(self.entries, index)
        return f"{self.path}, {place}" if self.path else place

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"an entry is an object with {' or '.join(_TURNS)}, got a {type(entry).__name__}"
            )
        turns = _field(entry, _TURNS)
        if isinstance(turns, Mapping):  # a column of lists, as datasets.Sequence has it
            turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise ValueError(f"it has no turns under {' or '.join(_TURNS)}")
        if any(isinstance(turn, Mapping) and turn.get("weight") == 0 for turn in turns):
            raise ValueError("all answers are learned, also one of weight 0: leave that out")
        if not _is_none(entry.get("system")):
            turns = [{"from": "system", "value": entry["system"]}, *turns]
        images, regions = _images(entry, turns)
        messages = from_llava(turns, has_image=bool(images), rule="llava_next")
        _check(messages, len(images))
        if len(images) == 1:
            messages = from_llava(turns, has_image=True, rule="llava")
        if self.prompt is not None:
            messages = [_prompted(message, self.prompt) for message in messages]
        found = tuple(map(self._found, images))
        return Sample(images=found, messages=tuple(messages), regions=tuple(regions) if any(regions) else ())

    def _found(self, image: Any) -> Any:
        """A path starts from the folder of images; an address is left to whoever opens it."""
        if isinstance(image, Mapping) and image.get("bytes") is None:
            image = image.get("path")
        is_address = isinstance(image, str) and (image.startswith("data:") or "://" in image[:16])
        return path_of(self.images, image) if isinstance(image, str | Path) and not is_address else image


def _read(path: Path) -> Sequence[Any]:
    """The entries of a file; of Parquet, as Arrow that is mapped and not held in memory.

    Raises ValueError of one line for what is none, FileNotFoundError, ImportError where datasets is missing.
    """
    if path.suffix != ".parquet":
        return read_list(path)
    files = sorted(map(str, path.parent.glob(path.name))) if "*" in path.name else [str(path)]
    if not files or not Path(files[0]).is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        from datasets import Dataset, Features, disable_progress_bars, logging
    except ImportError as error:
        raise ImportError("Parquet is read by datasets: pip install 'stepwell[train]'") from error
    from pyarrow import parquet

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # what it logs of a damaged file, it raises too
    try:
        features = Features.from_arrow_schema(parquet.read_schema(files[0]))
        rows: Sequence[Any] = Dataset.from_parquet(files, features=Features(_undecoded(dict(features))))
    except Exception as error:  # pyarrow's own, and those of datasets around them
        raise ValueError(f"{path} cannot be read as Parquet: {one_line(error.__cause__ or error)}") from None
    return rows


def _undecoded(feature: Any) -> Any:
    """A feature of datasets, or several, whose images stay as they lie in the file: they are opened under the
    limits of images, and only where they are wanted.
    """
    from datasets import Image

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(of) for name, of in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(of) for of in feature]
    if hasattr(feature, "feature"):
        feature = copy(feature)
        feature.feature = _undecoded(feature.feature)
    return feature


def _prompted(message: Message, prompt: str) -> Message:
    text = _text(message).rstrip()
    if message["role"] != "user" or text.endswith(prompt):
        return message
    content = f"{text}\n{prompt}"
    if not isinstance(message["content"], str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return {**message, "content": content}


def _field(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The one of the fields that says something. Raises ValueError where both do."""
    said = [name for name in names if not _is_none(entry.get(name))]
    if len(said) > 1:
        raise ValueError(f"it has {' and '.join(said)}; give one of them")
    return entry[said[0]] if said else None


def _images(entry: Mapping[str, Any], turns: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Of an entry, in the order of their placeholders: beside the turns, or in parts of their contents; and
    the region of each, or None.
    """
    beside = _field(entry, _IMAGES)
    images = list(beside) if isinstance(beside, list | tuple) else [] if _is_none(beside) else [beside]
    if any(map(_is_none, images)):
        raise ValueError(f"one of its {len(images)} images has no name")
    within = [
        (image, part.get("region"))
        for turn in turns
        for part in _parts(turn)
        if (image := image_in(part)) is not None
    ]
    if images and within:
        raise ValueError("images stand in its turns and beside them; give them once")
    parts = [part for turn in turns for part in _parts(turn) if part.get("region") is not None]
    if (within and not _is_none(entry.get("region"))) or any(image_in(part) is None for part in parts):
        raise ValueError("a region stands where its image does: beside the turns, or in the image's part")
    regions = [region for _, region in within] if within else regions_beside(entry.get("region"), len(images))
    return images or [image for image, _ in within], regions


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _parts(turn: Any) -> list[Any]:
    content = _field(turn, ("content", "value")) if isinstance(turn, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _check(messages: Sequence[Message], num_images: int) -> None:
    """Raises ValueError for what nothing can be learned from, and for images that have no place."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"user and assistant must take turns, got {', '.join(roles) or 'none'}")
    if any(well_formed(text) != text for text in map(_text, messages)):
        raise ValueError("it has bytes that are no UTF-8, or half a character")
    placeholders = 0
    for number, message in enumerate(turns):
        text = _text(message)
        if not text.strip():
            raise ValueError(f"{'an answer' if number % 2 else 'a question'} is empty")
        if number % 2 == 0:
            placeholders += text.count(IMAGE) if num_images else IMAGE in text.splitlines()
    if placeholders != num_images:
        raise ValueError(f"it has {placeholders} {IMAGE} placeholders for {num_images} images")


def _text(message: Message) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])
