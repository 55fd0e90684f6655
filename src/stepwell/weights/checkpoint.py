"""Reading other people's checkpoints without running them, and writing ours so that none is ever half there.

A checkpoint is a file or a folder: safetensors (one file, or shards with an index) or what torch.save writes
(`.pth`, `.pt`, `.bin`, one or sharded, DeepSpeed's `mp_rank_00_model_states.pt`). Pickles are opened only by
torch's weights-only loader; beside tensors they may hold argparse.Namespace and numpy numbers, nothing else.
Tensors are read one by one through a memory map that is let go every `window` bytes, so memory does not grow
with the file. Not read: ZeRO optimiser shards, quantised or sparse tensors, torch files from before 1.6.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

__all__ = ["Checkpoint", "CheckpointError", "new_folder", "open_checkpoint", "write_safetensors"]

MAX_PICKLE_BYTES = 256_000_000  # the part of a torch file that is a program, tensors not counted
CONTAINERS = ("state_dict", "model", "module")  # mmdetection and Lightning, DeiT's training script, DeepSpeed
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "mp_rank_00_model_states.pt",
)
NUMPY_NUMBERS = [
    type(np.dtype(kind)) for kind in ("?", "b", "h", "i", "l", "B", "H", "I", "L", "e", "f", "d")
]


class CheckpointError(ValueError):
    """A source that is not a checkpoint, is damaged, or asks for code to be run. One line."""


class Checkpoint:
    """Named tensors of one or several files, read on demand.

    `notes` says what was found and left alone (optimiser state, averaged copies of the weights).
    """

    def __init__(self, parts: Iterable[_Part], *, window: int) -> None:
        self._where: dict[str, _Part] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._window, self._touched = window, 0
        self._open: _Part | None = None
        self.notes: list[str] = []
        for part in parts:
            for name, shape in part.scan().items():
                if name in self._shapes:
                    raise CheckpointError(
                        f"{name!r} is in both {self._where[name].path.name} and {part.path.name}"
                    )
                self._where[name], self._shapes[name] = part, shape
            self.notes.extend(part.notes)
            part.close()
        if not self._shapes:
            raise CheckpointError("the checkpoint holds no tensors")

    @property
    def names(self) -> list[str]:
        """In the order of the files, which is the cheap order to read in."""
        return list(self._shapes)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """A private copy, on the CPU, in the dtype of the file."""
        part = self._where[name]
        if self._open is not part or self._touched > self._window:
            self.close()
        self._open = part
        tensor = part.read(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(f"{part.path} changed while it was read")
        self._touched += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Let go of the memory map. Reading goes on working: the next `read` maps again."""
        if self._open is not None:
            self._open.close()
        self._open, self._touched = None, 0


class _Part(Protocol):
    path: Path
    notes: list[str]

    def scan(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str) -> Tensor: ...
    def close(self) -> None: ...


def open_checkpoint(path: str | Path, *, window: int = 1_000_000_000) -> Checkpoint:
    """A file, or a folder with one checkpoint in it. At most `window` bytes (and one tensor) stay mapped.

    Raises FileNotFoundError, and CheckpointError of one line for what cannot or must not be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir():
        path = _file_in(path)
    files = _shards(path) if path.name.endswith(".index.json") else [path]
    return Checkpoint([_part(file) for file in files], window=window)


def _file_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*zero_pp_rank_*")):
        raise CheckpointError(
            f"{folder} holds ZeRO shards; join them with DeepSpeed's zero_to_fp32.py and convert the result"
        )
    found = sorted(
        p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin") and p.is_file()
    )
    if len(found) != 1:
        listed = ", ".join(p.name for p in found[:4]) or "none"
        raise CheckpointError(
            f"expected one weight file in {folder}, found {len(found)} ({listed}); name the file itself"
        )
    return found[0]


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({type(error).__name__})") from None
    outside = [name for name in names if Path(name).name != name or "\\" in name or name in ("", "..")]
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {outside[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing beside {index.name}: {missing[0]}"
        )
    return [index.parent / name for name in names]


def _part(path: Path) -> _Part:
    """By content, not by suffix."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _TorchPart(path)
    if head[8:9] == b"{":
        return _SafetensorsPart(path)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a bare pickle or a torch file from before version 1.6, which cannot be read without "
            "trusting it; save it again with a current torch.save where it came from"
        )
    raise CheckpointError(f"{path} is neither a safetensors nor a torch file")


class _SafetensorsPart:
    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, list[str]()
        self._file: Any = None

    def _handle(self) -> Any:
        if self._file is None:
            try:
                self._file = safe_open(self.path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path} is damaged or cut short: {_line(error)}") from None
        return self._file

    def scan(self) -> dict[str, tuple[int, ...]]:
        file = self._handle()
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle().get_tensor(name)
        return tensor.clone()

    def close(self) -> None:
        self._file = None


class _TorchPart:
    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, list[str]()
        self._state: dict[str, Tensor] | None = None
        _check_archive(path)
        _check_globals(path)

    def _load(self) -> dict[str, Tensor]:
        if self._state is None:
            try:
                with safe_globals(_allowed()):
                    content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                raise CheckpointError(f"{self.path} is damaged: {_line(error)}") from None
            self._state, self.notes = _state_dict(content, self.path)
        return self._state

    def scan(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._load().items()}

    def read(self, name: str) -> Tensor:
        return self._load()[name].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._state = None


def _check_archive(path: Path) -> None:
    """A torch file is a zip of stored entries; any other zip is refused before torch sees it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {_line(error)}") from None
    for entry in entries:
        if entry.filename.startswith("/") or ".." in entry.filename.split("/") or "\\" in entry.filename:
            raise CheckpointError(f"{path} holds an entry with a path of its own: {entry.filename[:80]!r}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path} is a compressed archive; torch.save writes uncompressed ones")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{path} has {entry.file_size:,} bytes of pickle, over the limit of {MAX_PICKLE_BYTES:,}"
            )
    if not any(entry.filename.endswith("/data.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a zip archive but not one that torch.save wrote")


def _allowed() -> list[Any]:
    numbers = np.float64(0).__reduce__()[0]  # what rebuilds a numpy number, wherever numpy keeps it
    return [
        argparse.Namespace,
        np.dtype,
        *NUMPY_NUMBERS,
        (numbers, "numpy.core.multiarray.scalar"),  # as written by numpy 1
        (numbers, "numpy._core.multiarray.scalar"),
    ]


def _check_globals(path: Path) -> None:
    try:
        with safe_globals(_allowed()):
            wanted = get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from None
    if wanted:
        raise CheckpointError(
            f"{path} wants to run {sorted(wanted)[0]!r} when opened, refused; "
            "keep only its tensors where it came from: torch.save(state_dict, path)"
        )


def _state_dict(content: object, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a container, and notes on what lay beside them."""
    notes: list[str] = []
    while isinstance(content, Mapping):
        name = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        others = sorted(str(key) for key in content if key != name)
        if others:
            notes.append(f"{path.name}: weights taken from {name!r}; not used: {', '.join(others)}")
        content = content[name]
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


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends, and vanishes if it fails.

    Whatever happens in between (disk full, a kill), `folder` is either as it was or complete. Raises
    FileExistsError when it holds files; with `overwrite` it is replaced, but only if it holds a model.
    """
    folder = Path(folder).absolute()
    _check_replaceable(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists() and any(folder.iterdir()):
            old = partial.with_name(partial.name + "-old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder or ask to overwrite it")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds other things than a model; it will not be replaced")


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 2_000_000_000
) -> dict[str, str]:
    """Names and tensors -> `model.safetensors`, or shards and their index. One shard is held in memory.

    Returns name -> file. A tensor larger than `max_shard_bytes` gets a shard of its own. Raises OSError.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        try:
            save_file(waiting, folder / f"{len(shards):05d}.part", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"could not write a shard to {folder.parent}: {_line(error)}") from None
        shards.append(list(waiting))
        waiting.clear()
        size = 0

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > max_shard_bytes:
            flush()
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        del tensor
    if waiting or not shards:
        flush()
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        os.rename(folder / f"{i:05d}.part", folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return weight_map
