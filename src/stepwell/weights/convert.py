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
from typing import Any

import torch
from transformers import PreTrainedConfig

from stepwell.folders import commit_of, read_config
from stepwell.keys.checkpoint import Checkpoint, open_checkpoint
from stepwell.keys.engine import Plan, plan
from stepwell.keys.report import FitError, Report, compare
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.models.published.published import Published
from stepwell.models.vision import VisionConfig
from stepwell.weights.build import build_model, write_processor
from stepwell.weights.write import new_folder, write_safetensors, write_tensors

__all__ = ["convert", "dry_run", "read_manifest"]

Shape = tuple[int, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    as_: str,
    max_shard_bytes: int = 2_000_000_000,
    overwrite: bool = False,
    tokenizer: str | Path | None = None,
) -> Report:
    """Write the checkpoint `source` (file or folder) to the new folder `out`, as the published model `as_`;
    parts of a model, as a file each, named after the part.

    tokenizer: a folder with one, by default the source's. Raises FitError (nothing is written) where
    names or shapes contradict `as_`, CheckpointError for what cannot be read, FileExistsError for a folder in
    use.
    """
    published = _published(as_)
    checkpoint = open_checkpoint(source, window=max_shard_bytes // 4)
    if published.parts:
        return _convert_parts(published, checkpoint, out, overwrite=overwrite)
    beside = Path(source) if Path(source).is_dir() else Path(source).parent
    fields = read_config(beside)
    config, renaming, report = _prepare(published, checkpoint.shapes, fields)
    report.notes += checkpoint.notes
    report.commit = commit_of(source)
    if not report.ok:
        hint = "; its config.json has to lie beside it" if published.text_config and not fields else ""
        raise FitError(report.complaint() + hint, report)
    if report.absent:
        name, why = next(iter(report.absent.items()))
        raise FitError(f"{len(report.absent)} tensors cannot be made ({name}): {why}", report)
    metas = {name: target.make(checkpoint.meta) for name, target in renaming.targets.items()}
    elements: Counter[torch.dtype] = Counter()
    for meta in metas.values():
        elements[meta.dtype] += meta.numel()
    config.dtype = elements.most_common(1)[0][0]
    with new_folder(out, overwrite=overwrite) as folder:
        report.notes += write_processor(folder, config, Path(tokenizer) if tokenizer else beside)
        write_safetensors(
            folder,
            metas,
            lambda name: renaming.targets[name].make(checkpoint.read),
            max_shard_bytes=max_shard_bytes,
        )
        config.save_pretrained(folder)
        (folder / "conversion.json").write_text(json.dumps(report.json(), indent=1), "utf-8")
    return report


def dry_run(manifest: str | Path, *, as_: str) -> Report:
    """What `convert` would say of a list of names and shapes; nothing is written. It may not be ok."""
    published, shapes = _published(as_), read_manifest(manifest)
    if published.parts:
        return _prepare_parts(published, shapes)[1]
    return _prepare(published, shapes, {})[2]


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


def _convert_parts(
    published: Published, checkpoint: Checkpoint, out: str | Path, *, overwrite: bool
) -> Report:
    renaming, report = _prepare_parts(published, checkpoint.shapes)
    report.notes += checkpoint.notes
    if not report.ok:
        raise FitError(report.complaint(), report)
    with new_folder(out, overwrite=overwrite) as folder:
        for part, prefix in _prefixes(published).items():
            tensors = {
                name.removeprefix(prefix): target.make(checkpoint.read)
                for name, target in renaming.targets.items()
                if name.startswith(prefix)
            }
            write_tensors(folder / f"{part}.safetensors", tensors)
        (folder / "conversion.json").write_text(json.dumps(report.json(), indent=1), "utf-8")
    return report


def _prepare_parts(published: Published, shapes: Mapping[str, Shape]) -> tuple[Plan, Report]:
    """What becomes of every tensor of a file that holds parts alone, and whether that is right."""
    renaming = plan(shapes, published.rules(published.settings))
    settings = published.settings
    assert isinstance(settings, VisionConfig)
    assert published.text_config is not None
    with torch.device("meta"):
        vision = settings.build(published.text_config["hidden_size"])
    prefixes = tuple(_prefixes(published).values())
    ours = {name: tuple(t.shape) for name, t in vision.state_dict().items() if name.startswith(prefixes)}
    return renaming, compare(published.name, renaming, shapes, ours, {})


def _prefixes(published: Published) -> dict[str, str]:
    """Of the tensors of each part, in the vision system."""
    assert isinstance(published.settings, VisionConfig)
    return {part: f"{published.settings.parts[part]}." for part in published.parts}


def _prepare(
    published: Published, shapes: Mapping[str, Shape], fields: Mapping[str, Any]
) -> tuple[PreTrainedConfig, Plan, Report]:
    """The configuration of our model, what becomes of every source tensor, and whether that is right."""
    renaming = plan(shapes, published.rules(published.settings))
    embedding = renaming.targets.get("model.language_model.embed_tokens.weight")
    vocab_size = next(iter(shapes[embedding.sources[0]]), None) if embedding else None
    model = build_model(published, fields, vocab_size)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent: dict[str, str] = {}
    for what, prefixes in (
        ("language model", ("model.language_model.", "lm_head.")),
        ("layer of a language model", ("model.language_model.layers.",)),
        ("encoder", ("model.vision.branches.",)),
        ("head", ("head.",)),
    ):
        if not any(name.startswith(prefixes) for name in renaming.targets):
            why = f"no {what} in this source"
            absent = {name: why for name in ours if name.startswith(prefixes)} | absent
    for name in model.all_tied_weights_keys.keys() - renaming.targets.keys():
        ours.pop(name)  # it is another tensor
    report = compare(published.name, renaming, shapes, ours, absent)
    if published.quirk:
        report.notes.append(published.quirk)
    return model.config, renaming, report
