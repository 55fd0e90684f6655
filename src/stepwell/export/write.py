"""`stepwell export`: a model as graphs, each compared with PyTorch before it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Images
from PIL.Image import Image
from torch import Tensor

from stepwell.export.folder import GRAPHS, GraphFile, graph_files, keep_graph_file
from stepwell.export.formats import FORMATS, Format, check_format, open_graph, write_graph
from stepwell.export.graphs import Exported, default_size, exported
from stepwell.export.int8 import store_in_int8
from stepwell.folders import SHIPPED_MODELS, locked
from stepwell.models.ask import Assistant
from stepwell.ops.choose import prefer
from stepwell.structures import Size
from stepwell.weights.load import load, model_folder
from stepwell.weights.write import new_folder

__all__ = ["export", "pictures"]

TRIED = 3
MOST = 1e-3  # a difference from PyTorch, as a part of the largest output

Outputs = Sequence[Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of pixels."""


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    form: Format = "onnx",
    sizes: Sequence[Size] = (),
    int8: bool = False,
    revision: str | None = None,
) -> list[GraphFile]:
    """Graphs of a model for pictures of these sizes, height first; none: the square that it is made for.

    out: a new folder, which gets the model too, so that it can be asked by itself, and is there when all its
    graphs are; None: they go into the folder that is named as the model. int8: linear layers store their
    weights in eight bits. Everything is in single precision, on the CPU. Raises ValueError for a model
    without a graph, for a folder that is in use or that another export works on, and where a graph gives
    something else than PyTorch: it is not kept then. Raises ImportError without the format's libraries.
    """
    check_format(form, to_write=True)
    source = model_folder(model, revision)
    is_shipped = source.resolve() in {folder.resolve() for folder in SHIPPED_MODELS.values()}
    if out is None and (is_shipped or not Path(model).is_dir()):
        raise ValueError(f"{model} is no folder of yours: name a new one, stepwell export {model} OUT")
    if out is not None and (target := Path(out)).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} is there already; to add graphs to a model's folder: stepwell export {target}"
        )
    network = load(model, device="cpu", dtype="float32", revision=revision)
    graphs = [_Tried(exported(network, size), size) for size in sizes or [default_size(network)]]
    if int8:
        for graph in graphs:
            graph.unrounded = graph.outputs()
        if not store_in_int8(network.model.model.vision if isinstance(network, Assistant) else network):
            raise ValueError(f"{model} has no linear layer to store in eight bits")
    statistics = _statistics(network)
    if out is None:
        with locked(source):
            graph_files(source)  # of other weights, they are refused before any work
            for draft in (source / GRAPHS).glob("*/.*-*/"):  # of exports that were killed
                shutil.rmtree(draft)
            return [_write(graph, source, form, statistics) for graph in graphs]
    with new_folder(Path(out)) as folder:
        for path in source.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        return [_write(graph, folder, form, statistics) for graph in graphs]


class _Tried:
    """A graph to be, with the pictures that it is tried on."""

    def __init__(self, exported: Exported, size: Size) -> None:
        self.exported, self.size = exported, size
        self.inputs = [exported.prepare(picture) for picture in pictures(size)]
        self.unrounded: list[Outputs] | None = None  # before weights were stored in eight bits

    def outputs(self) -> list[Outputs]:
        """PyTorch's, of each picture."""
        with torch.no_grad(), prefer("reference"):
            return [self.exported.module(*inputs) for inputs in self.inputs]


def _write(tried: _Tried, folder: Path, form: Format, statistics: Statistics) -> GraphFile:
    graph, size, int8 = tried.exported, tried.size, tried.unrounded is not None
    name = f"{size[1]}x{size[0]}{'-int8' if int8 else ''}"
    place = folder / GRAPHS / form
    place.mkdir(parents=True, exist_ok=True)
    example = [torch.cat([x, x]) for x in tried.inputs[0]] if graph.any_batch else tried.inputs[0]
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{name}-") as draft:
        file = Path(draft) / f"{name}{FORMATS[form]}"
        write_graph(
            graph.module,
            example,
            form,
            file,
            inputs=graph.inputs,
            outputs=graph.outputs,
            any_batch=graph.any_batch,
        )
        run = open_graph(file, form)
        found = [run(inputs) for inputs in tried.inputs]
        difference = _difference(found, tried.outputs(), form)
        if not difference <= MOST:
            raise ValueError(
                f"the {form} graph for {size[1]}x{size[0]} differs from PyTorch by {difference:.2g} "
                f"of the largest output, more than {MOST:g}: it is not kept"
            )
        for path in sorted(Path(draft).iterdir(), key=lambda path: path == file):  # the graph last of all
            path.replace(place / path.name)
    mean, std = statistics
    kept = GraphFile(
        format=form,
        file=f"{form}/{file.name}",
        kind=graph.kind,
        picture=(size[1], size[0]),
        inputs=graph.inputs,
        sizes=graph.sizes,
        image=graph.image,
        outputs=graph.outputs,
        maps=graph.maps,
        any_batch=graph.any_batch,
        int8=int8,
        largest_difference=difference,
        rounding_difference=None if tried.unrounded is None else _difference(found, tried.unrounded, form),
        mean=mean,
        std=std,
    )
    keep_graph_file(folder, kept)
    return kept


def _difference(found: Sequence[Outputs], wanted: Sequence[Outputs], form: Format) -> float:
    """The largest of all outputs of all pictures, as a part of the output's largest value."""
    worst = 0.0
    for of_graph, of_torch in zip(found, wanted, strict=True):
        for x, y in zip(of_graph, of_torch, strict=True):
            if x.shape != y.shape:
                raise ValueError(
                    f"the {form} graph gives {tuple(x.shape)} where PyTorch gives {tuple(y.shape)}"
                )
            if y.numel():
                apart = (x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-12)
                worst = max(worst, float(apart.nan_to_num(nan=float("inf"))))
    return worst


def pictures(size: Size) -> list[Image]:
    """Three pictures that are the same on every machine: bright shapes on shades, with noise."""
    found, (height, width) = [], size
    for seed in range(TRIED):
        chance = np.random.default_rng(seed)
        across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
        shades = [np.outer(down, np.ones(width)), across + 0 * down, across * down]
        image = np.stack([chance.permutation(shades)[0] * 160 for _ in range(3)], -1)
        for _ in range(8):
            top, left = chance.integers(height), chance.integers(width)
            image[top : top + max(1, height // 5), left : left + max(1, width // 5)] = chance.integers(
                0, 256, 3
            )
        image += chance.normal(0, 12, image.shape)
        found.append(Images.fromarray(image.clip(0, 255).astype(np.uint8)))
    return found


def _statistics(network: Any) -> Statistics:
    if isinstance(network, Assistant):
        geometry: Any = network.engine.geometry
        return tuple(geometry.mean), tuple(geometry.std)
    processor = network.image_processor()
    return tuple(processor.image_mean), tuple(processor.image_std)
