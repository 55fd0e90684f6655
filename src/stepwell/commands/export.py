"""`stepwell export`: a model as graphs for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stepwell.commands.loading import Revision, check_model, quieten
from stepwell.flops.text import parse_size

if TYPE_CHECKING:
    from stepwell.structures import Size

__all__ = ["export"]


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a shipped model or a hub name.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="A new folder for model and graphs. [default: MODEL itself]"),
    ] = None,
    form: Annotated[Literal["onnx", "openvino", "torch"], typer.Option("--format")] = "onnx",
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Of the pictures; a graph for each. [default: the square it is made for]",
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Store the weights of linear layers in eight bits.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a model as graphs of fixed sizes that run outside of PyTorch, compared with it first."""
    sizes: list[Size] = [parse_size(text) for text in size or []]
    check_model(model, None)
    quieten()

    from stepwell.export.folder import GRAPHS
    from stepwell.export.write import export as write

    for graph in write(model, out, form=form, sizes=sizes, int8=int8, revision=revision):
        takes = " + ".join(f"{width}x{height}" for height, width in graph.sizes)
        together = "any number at a time" if graph.any_batch else "one at a time"
        rounding = (
            "" if graph.rounding_difference is None else f", of rounding {graph.rounding_difference:.1e}"
        )
        print(
            f"{Path(GRAPHS) / graph.file}: {graph.kind}, takes {takes} ({together}), gives "
            f"{', '.join(graph.outputs)}; largest difference from PyTorch {graph.largest_difference:.1e} "
            f"of the largest output{rounding}"
        )
