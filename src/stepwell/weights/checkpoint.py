"""Reading other people's checkpoints without running them, and writing ours so that none is ever half there.

A checkpoint is safetensors or what torch.save writes (`.pth`, `.pt`, `.bin`, DeepSpeed's
`mp_rank_00_model_states.pt`): one file, or shards with an index. Pickles are opened only by torch's
weights-only loader; beside tensors they may hold argparse.Namespace and numpy numbers, nothing else. Tensors
are read one by one through a memory map that is let go every `window` bytes, so memory does not grow with the
file. Not read: ZeRO optimiser shards, quantised or sparse tensors, torch files from before 1.6.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stepwell.folders import one_line

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "new_folder",
    "open_checkpoint",
    "weight_files",
    "write_safetensors",
]

CONTAINERS = ("state_dict", "model", "module")  # mmdetection and Lightning, DeiT's training script, DeepSpeed
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "mp_rank_00_model_states.pt",
)
NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # what rebuilds a numpy number, wherever numpy keeps it
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilBHILefd"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as written by numpy 1
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]
"""What a pickle may name besides tensors."""


class CheckpointError(ValueError):
    """A source that is not a checkpoint, is damaged, or asks for code to be run. One line."""


class Checkpoint:
    """Named tensors of one or several files, read on demand.

    `shapes` are in the order of the files, which is the cheap order to read in. `notes` says what lay beside
    the tensors and was left alone (optimiser state, averaged copies of the weights).
    """

    def __init__(self, files: Iterable[Path], *, window: int) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.notes: list[str] = []
        self._dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        self._window = window
        self._mapped: tuple[Path | None, dict[str, Tensor]] = (None, {})
        self._touched = 0  # bytes read through the current map
        for file in files:
            tensors, notes = _map(file)
            for name, tensor in tensors.items():
                if name in self._files:
                    raise CheckpointError(f"{name!r} is in both {self._files[name].name} and {file.name}")
                self._files[name] = file
                self.shapes[name], self._dtypes[name] = tuple(tensor.shape), tensor.dtype
            self.notes += notes
        if not self.shapes:
            raise CheckpointError("the checkpoint holds no tensors")

    def meta(self, name: str) -> Tensor:
        """The tensor's shape and dtype, on the meta device."""
        return torch.empty(self.shapes[name], dtype=self._dtypes[name], device="meta")

    def read(self, name: str) -> Tensor:
        """A private copy, on the CPU, in the dtype of the file."""
        file = self._files[name]
        if self._mapped[0] != file or self._touched > self._window:
            self._mapped, self._touched = (file, _map(file)[0]), 0
        tensor = self._mapped[1][name].detach().clone(memory_format=torch.contiguous_format)
        self._touched += tensor.nbytes
        return tensor


def open_checkpoint(path: str | Path, *, window: int = 1_000_000_000) -> Checkpoint:
    """A file, or a folder with one checkpoint in it. At most `window` bytes (and one tensor) stay mapped.

    Raises FileNotFoundError, and CheckpointError of one line for what cannot or must not be read.
    """
    return Checkpoint(weight_files(Path(path)), window=window)


def weight_files(path: Path) -> list[Path]:
    """The files of the checkpoint that a file, an index or a folder is; all are there. Raises as above."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir():
        path = _file_in(path)
    return _shards(path) if path.name.endswith(".index.json") else [path]


def _file_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*zero_pp_rank_*")):
        raise CheckpointError(
            f"{folder} holds ZeRO shards; join them with DeepSpeed's zero_to_fp32.py and convert the result"
        )
    suffixes = (".safetensors", ".pth", ".pt", ".bin")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    if len(files) != 1:
        listed = ", ".join(path.name for path in files[:4]) or "none"
        raise CheckpointError(
            f"expected one weight file in {folder}, found {len(files)} ({listed}); name the file itself"
        )
    return files[0]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({type(error).__name__})") from None
    for name in names:
        if Path(name).name != name or "\\" in name or name == "..":
            raise CheckpointError(f"{index} points outside its folder: {name!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing beside {index.name}: {missing[0]}"
        )
    return [index.parent / name for name in names]


def _map(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one file, mapped and not yet read, and notes. Its first bytes say what it is."""
    with path.open("rb") as file:
        head = file.read(64)
    try:
        if head.startswith(b"PK\x03\x04"):
            return _state_dict(_unpickled(path), path)
        if head[8:9] == b"{":
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.offset_keys()}, []
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged or cut short: {one_line(error)}") from None
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a bare pickle or a torch file from before version 1.6, which cannot be read without "
            "trusting it; save it again with a current torch.save where it came from"
        )
    raise CheckpointError(f"{path} is neither a safetensors nor a torch file")


def _unpickled(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a zip archive but not one that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # mapped, it would read as noise
        raise CheckpointError(f"{path} is a compressed archive; torch.save writes uncompressed ones")
    with safe_globals(HARMLESS):
        if refused := get_unsafe_globals_in_checkpoint(path):
            raise CheckpointError(
                f"{path} wants to run {min(refused)!r} when opened, refused; "
                "keep only its tensors where it came from: torch.save(state_dict, path)"
            )
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a container, and notes on what lay beside them."""
    notes: list[str] = []
    while isinstance(content, Mapping):
        inner = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        if others := sorted(str(key) for key in content if key != inner):
            notes.append(f"{path.name}: weights taken from {inner!r}; not used: {', '.join(others)}")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            notes.append(f"{path.name}: {name!r} is no tensor ({type(value).__name__}), not used")
        elif value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {name!r} is sparse or quantised, which is not read")
        elif value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name!r} claims {value.nbytes:,} bytes but is stored in fewer")
        else:
            state[str(name)] = value
    return state, notes


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and vanishes if it fails.

    Whatever happens in between (disk full, a kill), `folder` is either as it was or complete. Raises
    FileExistsError when it holds files; with `overwrite` it is replaced, but only if it holds a model.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    full = folder.exists() and any(folder.iterdir())
    if full and not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder or ask to overwrite it")
    if full and not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        raise FileExistsError(f"{folder} holds other things than a model; it will not be replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        old = partial.with_name(partial.name + "-old")
        if full:
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
        try:
            save_file({n: make(n).contiguous() for n in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write a shard to {folder.parent}: {one_line(error)}") from None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return dict(split.tensor_to_filename)
