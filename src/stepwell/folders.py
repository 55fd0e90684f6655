"""A model's folder before anything in it is opened: found by a name, fetched from the Hugging Face hub, its
settings read.

Weights and settings are fetched, never code, and a folder that asks for code of its own is refused. What
goes wrong is one line. Needs no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "SHIPPED",
    "SHIPPED_DETECTOR",
    "SHIPPED_MODELS",
    "HubError",
    "ModelError",
    "cache_folder",
    "check_format",
    "check_hub_name",
    "commit_of",
    "download",
    "find_folder",
    "is_url",
    "locked",
    "model_type",
    "one_line",
    "read_config",
    "share",
    "whole_file",
    "write_whole",
]

SHIPPED_MODELS = {name: Path(__file__).parent / "assets" / name for name in ("reader_tiny", "boards_tiny")}
"""The models that travel with the package, by name."""
SHIPPED = SHIPPED_MODELS["reader_tiny"]
"""The one that answers questions."""
SHIPPED_DETECTOR = SHIPPED_MODELS["boards_tiny"]
"""The one that finds objects: defects of circuit boards."""

FORMAT = 1
"""Of a model's folder, docs/model_folder.md: what is written as `stepwell_format` into config.json, and the
newest that is read.
"""

OURS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


class ModelError(ValueError):
    """A model that is not there, is not one, or whose weights do not fit. One line."""


class HubError(OSError):
    """A download that did not happen. One line."""


def download(
    repository: str,
    patterns: Sequence[str] = OURS,
    *,
    revision: str | None = None,
    advice: str = "download it elsewhere and name its folder",
) -> Path:
    """The folder that holds a repository's files of these patterns, fetched or from the hub's cache.

    revision: a commit, branch or tag; by default the newest. Raises HubError, which ends in `advice` where
    the hub cannot be reached, or which says that the hub has no such repository or revision for this user.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fetch: Callable[..., Any] = partial(
        snapshot_download, repository, revision=revision, allow_patterns=list(patterns)
    )
    try:
        return Path(fetch())
    except GatedRepoError:
        raise HubError(
            f"{repository} asks for a licence first: accept it on the hub, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(f"the hub has no {repository}, or it is private: `hf auth login`") from None
    except RevisionNotFoundError:
        raise HubError(f"{repository} has no revision {revision} on the hub") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        with suppress(HfHubHTTPError, OSError, ValueError):  # a commit that lies here is what it is
            return Path(fetch(local_files_only=True))
        reason = type(error.__cause__ or error).__name__
        what = repository if revision is None else f"{repository} at revision {revision}"
        raise HubError(
            f"{what} is not on this machine and the hub cannot be reached ({reason}); {advice}"
        ) from None


def commit_of(path: str | Path) -> str | None:
    """The commit on the hub that a folder or file is, or that a folder was converted from.

    The hub's cache names its folders by commits; `stepwell convert` writes down what it read. None for what
    did not come from the hub.
    """
    snapshot = re.search(r"/models--[^/]+/snapshots/([0-9a-f]{40})(/|$)", Path(path).absolute().as_posix())
    if snapshot is not None:
        return snapshot[1]
    commit = _read_json(Path(path) / "conversion.json").get("commit")
    return commit if isinstance(commit, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json in a folder, empty where there is none. Raises ValueError where it is no JSON object."""
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: not JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: it holds a {type(config).__name__}, not settings")
    return config


def one_line(error: BaseException) -> str:
    """What an error says, short enough to end a line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_folder(model: str | Path) -> Path | None:
    """The folder that `model` names, or that of the shipped model of that name; None where there is none.
    Raises ModelError for a file.
    """
    if model in SHIPPED_MODELS:
        return SHIPPED_MODELS[str(model)]
    folder = Path(model).expanduser()
    if folder.is_file():
        raise ModelError(f"{model} is a file; convert it into a model folder first: stepwell convert --help")
    return folder if str(model) and folder.is_dir() else None


def check_format(settings: Mapping[str, Any]) -> None:
    """Raises ModelError for a config.json of a newer format than is known here; one that says none is of
    format 1.
    """
    number = settings.get("stepwell_format", 1)
    if type(number) is not int or number < 1:
        raise ModelError(f"stepwell_format in config.json is a whole number from 1 on, got {number!r}")
    if number > FORMAT:
        raise ModelError(
            f"the model is saved in format {number}, and this version knows formats up to {FORMAT}: "
            "upgrade stepwell"
        )


def model_type(folder: Path) -> str:
    """What kind of model a folder says it holds. Raises ModelError without settings or without weights, for a
    folder that asks for code, or for weights, which lie elsewhere, and for one of a newer format.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" ({pickles[0]} is a pickle, which is not opened: stepwell convert)" if pickles else ""
        raise ModelError(f"{folder} holds no weights: no *.safetensors beside its config.json{hint}")
    if (folder / "adapter_config.json").is_file():  # transformers would load the model that it names
        raise ModelError(f"{folder} holds an adapter, not a whole model: merge it into its model first")
    try:
        for path in sorted(folder.glob("*config.json")):
            _refuse_code(path, _read_json(path))
        settings = read_config(folder)
        check_format(settings)
        return str(settings["model_type"])
    except KeyError:
        raise ModelError(f"{config} cannot be read: it says no model_type") from None
    except ValueError as error:
        raise ModelError(str(error)) from None


def _refuse_code(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises ModelError where settings, however deep, name code beside them (`auto_map`) or on the hub (an
    attention's kernel, as owner/name).
    """
    values: list[Any] = [settings]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            for key, entry in value.items():
                is_kernel = key.endswith("attn_implementation") and "/" in str(entry)
                if key == "auto_map" or is_kernel:
                    raise ModelError(f"{path} asks for code of its own ({key}), which is never run")
            values += value.values()
        elif isinstance(value, list):
            values += value


def share(path: Path) -> None:
    """Gives a file the permissions of any other new one: safetensors writes for the owner alone."""
    other = path.with_name(f".{path.name}.new")
    other.touch()
    path.chmod(other.stat().st_mode & 0o777)
    other.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write meanwhile, a name of the same ending: the file is there whole, or as it was before."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text file that is there whole, or as it was before. What is no character is written as an escape."""
    with whole_file(path) as draft:
        draft.write_text(text, "utf-8", errors="backslashreplace")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Meanwhile no other process works on the folder, where its file system can tell. Raises ValueError where
    one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process works on {path}: wait for its end, or name another folder"
            ) from None
        except OSError:  # some network file systems know no locks
            pass
        yield
    finally:
        os.close(folder)


def is_url(name: str) -> bool:
    """Whether a name is an address in the network, not one on this machine."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE) is not None


def check_hub_name(name: str) -> None:
    """Raises ModelError unless `name` is owner/name, as the hub spells repositories."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return
    if is_url(name):
        raise ModelError(f"unknown model {name}: it is a URL, and names on the hub look like owner/name")
    raise ModelError(
        f"unknown model {name}: no such folder, not the shipped {' or '.join(SHIPPED_MODELS)}, "
        f"and hub names look like owner/name{', with the revision given apart' if '@' in name else ''}"
    )


def cache_folder(name: str) -> Path:
    """Where a converted release is kept: beside the hub's own cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "stepwell" / re.sub(r"[^\w.-]+", "--", name)
