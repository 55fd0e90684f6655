"""A model of ours whose graphs are run by ONNX Runtime or OpenVINO, with the same answers.

What has no fixed sizes (proposals of R-CNN, boxes of a picture, words) stays in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

from stepwell.export.folder import GRAPHS, GraphFile, graph_files
from stepwell.export.formats import Run, Runtime, check_format, open_graph
from stepwell.folders import SHIPPED_MODELS, ModelError
from stepwell.models.ask import Assistant
from stepwell.models.perception import PyramidBackbone
from stepwell.models.predicting import Predicts
from stepwell.structures import FeatureMap, Size, TokenLayout, VisionFeatures
from stepwell.weights.load import load, model_folder

__all__ = ["Graphs", "load_on", "runtime_of"]


def load_on(model: str | Path, runtime: Runtime, *, int8: bool = False, revision: str | None = None) -> Any:
    """As `stepwell.load`, on the CPU in single precision, with the folder's graphs in place of its network.

    Raises ModelError for a folder without such graphs; ImportError without the runtime. Pictures of sizes
    that were not exported are refused when they come.
    """
    check_format(runtime, to_write=False)
    folder = model_folder(model, revision)
    kept = [graph for graph in graph_files(folder) if graph.format == runtime and graph.int8 == int8]
    if not kept:
        place = folder if folder == Path(model) and folder not in SHIPPED_MODELS.values() else f"{model} OUT"
        raise ModelError(
            f"{folder} has no {runtime} graphs{' in int8' if int8 else ''}: "
            f"stepwell export {place} --format {runtime}{' --int8' if int8 else ''}"
        )
    network = load(model, device="cpu", dtype="float32", revision=revision)
    graphs = Graphs(folder / GRAPHS, kept)
    if isinstance(network, Predicts):
        network.graph = graphs.score
    elif isinstance(network, Assistant):
        network.model.model.vision.encode = graphs.encode
    elif isinstance(network, PyramidBackbone):
        network.forward = graphs.maps
    network.runtime = f"{runtime}{' int8' if int8 else ''}"
    return network


def runtime_of(model: Any) -> str | None:
    """What runs the graphs of a model of `load_on`, such as "onnx int8"; None for one in PyTorch."""
    return getattr(model, "runtime", None)


class Graphs:
    """Opened when they are first needed."""

    def __init__(self, folder: Path, files: Sequence[GraphFile]) -> None:
        self.folder, self.files = folder, files
        self._by_sizes = {(file.sizes, file.image): file for file in files}
        self._opened: dict[str, Run] = {}

    def score(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
        """As `Predicts.score`."""
        given = ((pixels.shape[-2], pixels.shape[-1]),)
        file = self._by_sizes.get((given, None))
        if file is not None:
            return tuple(self._run(file, [pixels.float()]))
        alone = [
            self._run(self._found(given, size), [image[None].float()])
            for image, size in zip(pixels, sizes, strict=True)
        ]
        return tuple(map(torch.cat, zip(*alone, strict=True)))

    def maps(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        """As `PyramidBackbone.forward`, without hidden states."""
        given = ((pixel_values.shape[-2], pixel_values.shape[-1]),)
        found = self._run(self._found(given, None), [pixel_values.float()])
        return BackboneOutput(feature_maps=tuple(found))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        """As `VisionSystem.encode`."""
        features, given = [], iter(inputs)
        for layout in layouts:
            if layout.region is not None:
                raise ValueError("graphs look at whole images: ask about a region in PyTorch")
            file = self._found(layout.inputs, layout.image_size)
            tokens, *maps = self._run(file, [next(given).float() for _ in layout.inputs])
            found = tuple(
                FeatureMap(map, layout.views[view], stride)
                for map, (view, stride) in zip(maps, file.maps, strict=True)
            )
            features.append(VisionFeatures(tokens, found, layout))
        return features

    def _found(self, sizes: tuple[Size, ...], image: Size | None) -> GraphFile:
        file = self._by_sizes.get((sizes, image))
        if file is None:
            there = ", ".join("{}x{}".format(*file.picture) for file in self.files)
            height, width = image or sizes[0]
            raise ValueError(
                f"no graph was exported for a picture that the network sees at {width}x{height}; "
                f"there are those for pictures of {there}"
            )
        return file

    def _run(self, file: GraphFile, inputs: Sequence[Tensor]) -> list[Tensor]:
        if file.file not in self._opened:
            path = self.folder / file.file
            if not path.is_file():
                raise ModelError(f"no such file: {path}, which {self.folder.parent} should hold")
            self._opened[file.file] = open_graph(path, file.format)
        return self._opened[file.file](inputs)
