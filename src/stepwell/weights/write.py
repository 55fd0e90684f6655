"""Writing a model's folder so that it is never half there."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepwell.folders import one_line, share

__all__ = ["new_folder", "write_safetensors", "write_tensors"]


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and vanishes if it fails.

    Whatever happens in between (disk full, a kill), `folder` is either as it was or complete. Raises
    FileExistsError when it holds files; with `overwrite` it is replaced, but only if it holds a model.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    full = folder.exists() and any(folder.iterdir())
    if full and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder or ask to overwrite it")
    is_ours = any((folder / file).is_file() for file in ("config.json", "conversion.json"))
    if full and not (is_ours and any(folder.glob("*.safetensors"))):
        raise FileExistsError(f"{folder} holds other things than a model; it will not be replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        old = partial.with_name(partial.name + "-old")
        if full:
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Raises OSError."""
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, file, metadata={"format": "pt"})
        share(file)
    except SafetensorError as error:
        raise OSError(f"could not write {file.name} to {file.parent.parent}: {one_line(error)}") from None


def write_safetensors(
    folder: Path,
    metas: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = 2_000_000_000,
) -> dict[str, str]:
    """Tensors that `make` gives by name -> `model.safetensors`, or shards and their index.

    metas: name -> shape and dtype, on the meta device; in this order tensors are made, a shard at a time. One
    that is larger than `max_shard_bytes` gets a shard of its own. Returns name -> file. Raises OSError.
    """
    sizes = {name: torch.empty_like(meta, device="meta") for name, meta in metas.items()}  # no views
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: make(name) for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return dict(split.tensor_to_filename)
