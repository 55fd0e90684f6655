"""Reading other people's checkpoints without running them.

A checkpoint is safetensors, what torch.save writes (`.pth`, `.pt`, `.bin`, DeepSpeed's
`mp_rank_00_model_states.pt`), or numpy's `.npz`: one file, or shards with an index. Pickles are opened only
by torch's weights-only loader; beside tensors they may hold argparse.Namespace and numpy numbers, nothing
else. Tensors are read one by one through a memory map that is let go every `window` bytes, so memory does not
grow with the file. Not read: ZeRO optimiser shards, quantised or sparse tensors, torch files from before 1.6.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from stepwell.folders import one_line

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSource",
    "Tensors",
    "open_checkpoint",
    "weight_files",
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


class TensorSource(Protocol):
    """Named tensors, in a file or in memory."""

    shapes: dict[str, tuple[int, ...]]
    notes: list[str]

    def meta(self, name: str) -> Tensor: ...

    def read(self, name: str) -> Tensor: ...


class Tensors:
    """A state dict in memory, as what is read from a file."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.notes: list[str] = []
        self._state = state

    def meta(self, name: str) -> Tensor:
        return torch.empty_like(self._state[name], device="meta")

    def read(self, name: str) -> Tensor:
        return self._state[name]


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
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".npz")
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
            return _archived(path)
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
    raise CheckpointError(f"{path} is neither a safetensors nor a torch file, nor numpy's .npz")


def _archived(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a zip archive, torch's or numpy's, and notes."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # mapped, it would read as noise
        raise CheckpointError(
            f"{path} is a compressed archive; torch.save and np.savez write uncompressed ones"
        )
    if any(entry.filename.endswith("/data.pkl") for entry in entries):
        return _state_dict(_unpickled(path), path)
    if all(entry.filename.endswith(".npy") for entry in entries):
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, []
    raise CheckpointError(f"{path} is a zip archive but not one that torch.save or np.savez wrote")


def _unpickled(path: Path) -> object:
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
