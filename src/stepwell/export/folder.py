"""The folder `graphs` inside a model's: one file a graph, and graphs.json, which says what each takes.

    graphs/graphs.json              {"stepwell_graphs": 1, "weights": "...", "graphs": [...]}
    graphs/onnx/640x480.onnx        a graph for pictures of 640x480; -int8 behind the size for such weights

`weights` is a digest of the model's own weights: graphs of other weights are not run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from stepwell.evaluate.answers import digest_of_file
from stepwell.export.formats import Format
from stepwell.folders import ModelError, write_whole
from stepwell.models.vision import STRICT, first_complaint
from stepwell.structures import Size

__all__ = ["GRAPHS", "GraphFile", "graph_files", "keep_graph_file", "weights_digest"]

GRAPHS = "graphs"
_LIST = "graphs.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GraphFile:
    """picture: (width, height) that it was made for; sizes: (H, W) of the inputs, 3 channels each; image:
    (h, w) without padding, where the graph depends on it. largest_difference: from PyTorch with the weights
    that are in the graph, on the pictures that were tried, as a part of the largest output;
    rounding_difference: from the weights before they were rounded to eight bits.
    """

    format: Format
    file: str  # relative to the folder `graphs`
    kind: str
    picture: tuple[int, int]
    inputs: tuple[str, ...]
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]
    image: Size | None
    outputs: tuple[str, ...]
    maps: tuple[tuple[int, float], ...] = ()  # of an assistant's maps, number of the view and stride
    any_batch: bool
    int8: bool = False
    largest_difference: float
    rounding_difference: float | None = None
    mean: tuple[float, ...]  # of red, green and blue, for pixels in [0, 1]
    std: tuple[float, ...]


def graph_files(folder: Path) -> list[GraphFile]:
    """Those of a model's folder. Raises ModelError for a list that cannot be read, of a later version, or of
    other weights than lie beside it.
    """
    path = folder / GRAPHS / _LIST
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        version, weights = content["stepwell_graphs"], content["weights"]
        found = TypeAdapter(list[GraphFile]).validate_python(content["graphs"]) if version == _VERSION else []
    except ValidationError as error:
        raise ModelError(f"{path}: {first_complaint(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is no list of graphs: {type(error).__name__} {error}") from None
    if version != _VERSION:
        raise ModelError(f"{path} is of version {version}, this stepwell reads {_VERSION}: upgrade it")
    if weights != weights_digest(folder):
        raise ModelError(
            f"{folder} holds graphs of other weights than lie there now: remove {path.parent}, export again"
        )
    for graph in found:
        if not (path.parent / graph.file).resolve().is_relative_to(path.parent.resolve()):
            raise ModelError(f"{path} names a file outside of its folder: {graph.file}")
    return found


def keep_graph_file(folder: Path, graph: GraphFile) -> None:
    """Into the list, in place of one of the same file."""
    others = [other for other in graph_files(folder) if other.file != graph.file]
    content: dict[str, Any] = {"stepwell_graphs": _VERSION, "weights": weights_digest(folder)}
    content["graphs"] = [asdict(one) for one in (*others, graph)]
    write_whole(folder / GRAPHS / _LIST, json.dumps(content, indent=1))


def weights_digest(folder: Path) -> str:
    """Of the files of weights and their names."""
    digests = [f"{digest_of_file(path)} {path.name}" for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
