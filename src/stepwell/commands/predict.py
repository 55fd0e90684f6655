"""`stepwell predict`: what a detector, a segmenter or a classifier finds in pictures.

Nothing imported above imports torch: what needs no model is answered before it is there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from stepwell.commands.graph_options import Int8, OnRuntime, Runtime, check_runtime, load_on_runtime
from stepwell.commands.limits import MaxAspect, MaxBytes, MaxPixels, MaxSeconds, MaxSide, image_limits
from stepwell.commands.loading import Device, Dtype, Precision, Revision, check_model, quieten
from stepwell.commands.pictures import STDIN, find_pictures
from stepwell.commands.printing import print_json, show_progress
from stepwell.commands.tile_options import InTiles, TileOverlap, TileScale, TileSize, tiles_of
from stepwell.folders import SHIPPED_DETECTOR, one_line, write_whole
from stepwell.ops.memory import is_about_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from stepwell.images.limits import ImageLimits
    from stepwell.models.predictions import Prediction

__all__ = ["predict"]

UNREADABLE = 1
"""Exit code where a picture could not be read."""
LONGEST_STEM = 200
"""Bytes of a picture's name in that of its drawing: a name has 255 at most, and this is not all of it."""


def predict(
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PICTURES", help="Files, folders, quoted patterns; - reads one from standard input."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A model folder, a hub name or a published name. "
            f"[default: {SHIPPED_DETECTOR.name}, defects of circuit boards]",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of scores. [default: 0.5 for objects]")
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The best so many a picture. [default: the model's own number, 100 for most; 5 classes]",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--batch-size", min=1, help="Together. [default: 1 on a CPU, 8 elsewhere]"),
    ] = None,
    tiles: InTiles = False,
    tile_size: TileSize = None,
    tile_overlap: TileOverlap = None,
    tile_scale: TileScale = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a line of JSON a picture.")] = False,
    coco: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write what is found as a COCO file.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Draw what is found, as PNGs.")
    ] = None,
    runtime: OnRuntime = None,
    int8: Int8 = False,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = None,
    max_pixels: MaxPixels = None,
    max_side: MaxSide = None,
    max_aspect: MaxAspect = None,
    max_bytes: MaxBytes = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Predict what is in pictures: objects, a class for every pixel, or classes of the whole."""
    if not pictures:
        raise ValueError("name pictures: stepwell predict PICTURES... --model MODEL")
    model = model or SHIPPED_DETECTOR.name
    if as_json and jsonl:
        raise ValueError("--json and --jsonl exclude each other: a list, or a line a picture")
    how = tiles_of(tiles, size=tile_size, overlap=tile_overlap, scale=tile_scale)
    if coco is not None and not coco.absolute().parent.is_dir():
        raise ValueError(f"cannot write {coco}: there is no folder {coco.parent}")
    check_runtime(runtime, device, dtype, int8=int8)
    names = find_pictures(pictures)
    limits = image_limits(
        for_tiles=tiles,
        max_pixels=max_pixels,
        max_side=max_side,
        max_aspect=max_aspect,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
    )
    from stepwell.images.draw import check_unsigned, refuse_pictures

    drawings = {} if show is None else _drawings(show, names)
    refuse_pictures([*drawings.values(), *([coco] if coco else [])], filter(STDIN.__ne__, names))
    check_unsigned(drawings.values())
    if show is not None:
        show.mkdir(parents=True, exist_ok=True)
    network = _load(model, partial(_opened, revision, device, dtype, runtime, int8=int8))
    options = {"threshold": threshold, "max_detections": max_detections, "batch": batch, "tiles": how}
    with ExitStack() as outputs:
        writers: list[_Writer] = [outputs.enter_context(_Json(lines=jsonl)) if as_json or jsonl else _Table()]
        if coco is not None:
            writers.append(outputs.enter_context(_Coco(coco, network.class_names)))
        if show is not None:
            writers.append(_Drawings(drawings))
        failed = 0
        for count, (name, image, found) in enumerate(_predicted(network, names, limits, options), start=1):
            if isinstance(found, str):
                failed += 1
                print(f"stepwell: {_said(name)}: {found}", file=sys.stderr, flush=True)
            for writer in writers:
                writer.add(name, image, found)
            show_progress(count, len(names))
    if failed:
        print(f"stepwell: {failed} of {len(names)} pictures could not be looked at", file=sys.stderr)
        raise typer.Exit(UNREADABLE)


def _opened(
    revision: str | None,
    device: str | None,
    dtype: Precision | None,
    runtime: Runtime | None,
    model: str,
    *,
    int8: bool,
) -> Any:
    check_model(model, device)
    quieten()
    if runtime is not None:
        return load_on_runtime(model, runtime, revision, int8=int8)
    from stepwell.weights.load import load

    return load(model, device=device, dtype=dtype, revision=revision)


def _load(model: str, opened: Callable[[str], Any]) -> Any:
    """Raises ValueError for a model that predicts nothing."""
    network = opened(model)

    from stepwell.models.predicting import Predicts

    if not isinstance(network, Predicts):
        raise ValueError(
            f"{model} predicts nothing: it is a {type(network).__name__}; take a detector, a segmenter or a "
            "classifier"
        )
    return network


def _predicted(
    network: Any, names: Sequence[str], limits: ImageLimits, options: dict[str, Any]
) -> Iterator[tuple[str, Image | None, Prediction | str]]:
    """Of each picture its name, itself, and what is in it; without a picture, why it cannot be read."""
    from stepwell.images.open import open_image
    from stepwell.models.engine import device_of
    from stepwell.models.predicting import batch_size_on

    step = options["batch"] or batch_size_on(device_of(network))
    if options["tiles"] is not None:
        step = 1
    for first in range(0, len(names), step):
        images: dict[str, Image] = {}
        faults: dict[str, str] = {}
        for name in names[first : first + step]:
            try:
                images[name] = open_image(sys.stdin.buffer if name == STDIN else name, limits=limits)
            except FileNotFoundError:
                faults[name] = "no such file"
            except (OSError, ValueError) as error:
                faults[name] = "a folder without pictures" if Path(name).is_dir() else one_line(error)
        found = {**faults, **_found(network, images, options)}
        for name in names[first : first + step]:
            yield name, images.get(name), found[name]


def _found(network: Any, images: dict[str, Image], options: dict[str, Any]) -> dict[str, Prediction | str]:
    """Of each picture by its name; where memory is short of all together, of one after the other."""
    try:
        return dict(zip(images, network.predict(list(images.values()), **options), strict=True))
    except Exception as error:
        if not is_about_memory(error):
            raise
    if len(images) == 1:
        return dict.fromkeys(images, "not enough memory to look at it")
    return {name: _found(network, {name: image}, options)[name] for name, image in images.items()}


def _said(name: str) -> str:
    return "standard input" if name == STDIN else name


class _Writer(Protocol):
    def add(self, name: str, image: Image | None, found: Prediction | str) -> None:
        """The next picture, and what is in it; without a picture, why it cannot be read."""


class _Table:
    """What is in each picture, as text."""

    def add(self, name: str, image: Image | None, found: Prediction | str) -> None:
        if isinstance(found, str):
            return
        print(f"{_said(name)}  {found.summary()}")
        for line in found.lines():
            print(f"  {line}")
        sys.stdout.flush()


class _Json:
    """A line of JSON a picture, as they come, or all of them in one list at the end."""

    def __init__(self, *, lines: bool) -> None:
        self.lines = lines
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> _Json:
        return self

    def add(self, name: str, image: Image | None, found: Prediction | str) -> None:
        record = {"image": name, **({"error": found} if isinstance(found, str) else found.to_dict())}
        if self.lines:
            print_json(record)
        else:
            self.records.append(record)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.lines and kind is None:
            print_json(self.records)


class _Coco:
    """One COCO file of all pictures that could be read, numbered from 1 on, there whole at the end."""

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        self.path = path
        self.categories = [{"id": i, "name": name} for i, name in enumerate(class_names)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def __enter__(self) -> _Coco:
        return self

    def add(self, name: str, image: Image | None, found: Prediction | str) -> None:
        if isinstance(found, str):
            return
        number, (height, width) = len(self.images) + 1, found.image_size
        self.images.append({"id": number, "file_name": name, "height": height, "width": width})
        for record in found.to_coco(number):
            self.annotations.append({"id": len(self.annotations) + 1, **record})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            file = {"images": self.images, "annotations": self.annotations, "categories": self.categories}
            write_whole(self.path, json.dumps(file, ensure_ascii=False))


class _Drawings:
    """A PNG a picture. paths: by the pictures' names."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths

    def add(self, name: str, image: Image | None, found: Prediction | str) -> None:
        if image is None or isinstance(found, str):
            return
        from stepwell.images.draw import save_signed

        save_signed(found.draw(image), self.paths[name])


def _drawings(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Where each picture is drawn, named after it; of two pictures of one name, the second is numbered."""
    paths: dict[str, Path] = {}
    taken: set[str] = set()
    for name in names:
        stem, number = "stdin" if name == STDIN else Path(name).stem, 1
        stored = os.fsencode(stem)
        if len(stored) > LONGEST_STEM:
            stem = stored[:LONGEST_STEM].decode(errors="ignore")
        free = stem
        while free.lower() in taken:  # some disks take a.png and A.png for one
            number += 1
            free = f"{stem}-{number}"
        taken.add(free.lower())
        paths[name] = folder / f"{free}.png"
    return paths
