"""A released checkpoint becomes a folder of ours, or a line that says why not.

Names come first: the key table is tried on all of them and every shape is compared before a byte is written.
Then tensor by tensor into a temporary folder that is renamed when it is whole. At no time are more than two
shards of output in memory, whatever the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from stepwell.keys.engine import Plan, plan
from stepwell.models.published import PUBLISHED, Published, find_published
from stepwell.weights.checkpoint import new_folder, open_checkpoint, write_safetensors
from stepwell.weights.layouts import Layout, build_layout
from stepwell.weights.report import Report, compare
from stepwell.weights.text_config import read_config

__all__ = ["ConversionError", "convert", "dry_run", "read_manifest"]

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """A checkpoint that is not the model it was said to be. One line; `report` has every name."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def convert(
    source: str | Path,
    out: str | Path,
    *,
    as_: str,
    max_shard_bytes: int = 2_000_000_000,
    overwrite: bool = False,
    tokenizer: str | Path | None = None,
) -> Report:
    """Write the checkpoint `source` (file or folder) to the new folder `out`, as the published model `as_`.

    tokenizer: a folder with one, by default the source's. Raises ConversionError (nothing is written) where
    names or shapes contradict `as_`, CheckpointError for what cannot be read, FileExistsError for a folder in
    use.
    """
    published = _published(as_)
    checkpoint = open_checkpoint(source, window=max_shard_bytes // 4)
    beside = Path(source) if Path(source).is_dir() else Path(source).parent
    layout, made, report = _prepare(published, checkpoint.shapes, read_config(beside))
    report.notes += checkpoint.notes
    if not report.ok:
        raise ConversionError(report.complaint(), report)
    if report.absent:
        name, why = next(iter(report.absent.items()))
        raise ConversionError(f"{len(report.absent)} tensors cannot be made ({name}): {why}", report)
    metas = {name: target.make(checkpoint.meta) for name, target in made.targets.items()}
    elements: Counter[torch.dtype] = Counter()
    for meta in metas.values():
        elements[meta.dtype] += meta.numel()
    layout.config.dtype = elements.most_common(1)[0][0]
    with new_folder(out, overwrite=overwrite) as folder:
        report.notes += layout.write_processor(folder, Path(tokenizer) if tokenizer else beside)
        write_safetensors(
            folder,
            metas,
            lambda name: made.targets[name].make(checkpoint.read),
            max_shard_bytes=max_shard_bytes,
        )
        layout.config.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(report.json(), indent=1), "utf-8")
    return report


def dry_run(manifest: str | Path, *, as_: str) -> Report:
    """What `convert` would say of a list of names and shapes; nothing is written. It may not be ok."""
    published = _published(as_)
    _, _, report = _prepare(published, read_manifest(manifest), {})
    return report


def read_manifest(path: str | Path) -> dict[str, Shape]:
    """Names and shapes from JSON: {name: [sizes]}, or that under "keys". Raises ValueError of one line."""
    path = Path(path)
    try:
        content = json.loads(path.read_text("utf-8"))
        keys = content.get("keys", content)
        shapes = {str(name): tuple(int(side) for side in shape) for name, shape in keys.items()}
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not a manifest of names and shapes ({type(error).__name__})") from None
    if not shapes or any(side < 0 for shape in shapes.values() for side in shape):
        raise ValueError(f"{path} is not a manifest of names and shapes")
    return shapes


def _published(name: str) -> Published:
    published = find_published(name)
    if published is None:
        raise ValueError(f"unknown configuration {name!r}; choose from {', '.join(PUBLISHED)}")
    return published


def _prepare(
    published: Published, shapes: Mapping[str, Shape], settings: Mapping[str, object]
) -> tuple[Layout, Plan, Report]:
    layout = build_layout(published, shapes, settings)
    made = plan(shapes, layout.rules)
    report = compare(published.name, made, shapes, layout.ours, layout.absent)
    if published.quirk:
        report.notes.append(published.quirk)
    return layout, made, report
