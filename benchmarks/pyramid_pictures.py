"""Pictures of up-samplers: their maps in colours, and how they learned.

maps   a row a picture, cut to a square: the picture, the encoder's map, the map 4x by bilinear interpolation
       and by each up-sampler, as in figure 11 of LLaVA-UHD v2 (arXiv 2412.13871). The colours are the first
       three principal components of all maps of the row together.
loss   how runs of the task `upsampler` learned: the reconstruction loss, a sum over the levels that are
       supervised and so of another size for every kind of run; and the errors of maps on validation images,
       in shares of what the encoder sees, which compare runs

python benchmarks/pyramid_pictures.py maps OUT.jpg PICTURE... --encoder-weights dinov2/model.safetensors \\
    --upsampler "last level only=runs/last_only/model" --upsampler "hierarchical=runs/official/model"
python benchmarks/pyramid_pictures.py loss OUT.png "hierarchical=runs/official/1_upsampler/metrics.csv" ...

The second draws with matplotlib: pip install 'stepwell[train]'.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from frozen_maps import Enlarge, add_models, bilinear, guided, load_models, named_paths
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepwell.folders import one_line
from stepwell.images.open import open_image
from stepwell.train.multiview import HiddenMap
from stepwell.views.preprocess import resize_short_side_and_crop, to_tensor

SIDE, SCALE = 336, 4
PANEL, GAP, CAPTION = 240, 6, 26  # pixels
METRICS = ("loss_reconstruction", "eval_error_1x", "eval_error_2x", "eval_error_4x")


def main() -> int:
    parser = argparse.ArgumentParser(description="Pictures of up-samplers.")
    kinds = parser.add_subparsers(required=True)
    maps = kinds.add_parser("maps", help="maps in colours")
    maps.set_defaults(run=run_maps)
    maps.add_argument("out", type=Path)
    maps.add_argument("pictures", type=Path, nargs="+")
    add_models(maps)
    loss = kinds.add_parser("loss", help="how runs learned")
    loss.set_defaults(run=run_loss)
    loss.add_argument("out", type=Path)
    loss.add_argument("runs", nargs="+", metavar="NAME=METRICS.CSV")
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"pyramid_pictures.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run_maps(arguments: argparse.Namespace) -> None:
    encoder, upsamplers = load_models(arguments.encoder_weights, arguments.upsampler)
    ways = {"bilinear, 4x": bilinear} | {f"{name}, 4x": guided(each) for name, each in upsamplers.items()}
    rows = [row(encoder, open_image(path), ways) for path in arguments.pictures]
    draw_table(["picture", "map of the encoder", *ways], rows).save(arguments.out, quality=88)


@torch.inference_mode()
def row(encoder: HiddenMap, picture: Image.Image, ways: Mapping[str, Enlarge]) -> list[Image.Image]:
    square = resize_short_side_and_crop(picture, SIDE)
    spec = encoder.encoder.spec
    image = to_tensor(square, (SIDE, SIDE), spec.mean, spec.std)[None]
    map = encoder(image)
    maps = [map, *(way(map, image, SCALE) for way in ways.values())]
    return [square, *colours([each[0] for each in maps])]


def colours(maps: Sequence[Tensor]) -> list[Image.Image]:
    """(C, H, W) of any sizes -> the first three principal components of all their cells as red, green and
    blue, from the 1st to the 99th of a hundred cells.
    """
    cells = torch.cat([map.flatten(1).double() for map in maps], 1)
    centred = cells - cells.mean(1, keepdim=True)
    axes = torch.linalg.eigh(centred @ centred.T).eigenvectors.flip(1)[:, :3]
    # an axis has two directions; which of them is found depends on the machine
    longest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    parts = (axes * longest.sign()).T @ centred
    order = parts.sort(1).values
    low, high = (order[:, [round(share * (order.shape[1] - 1))]] for share in (0.01, 0.99))
    pixels = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().byte()
    pieces = pixels.split([map[0].numel() for map in maps], 1)
    return [
        Image.fromarray(piece.unflatten(1, map.shape[1:]).permute(1, 2, 0).contiguous().numpy())
        for piece, map in zip(pieces, maps, strict=True)
    ]


def draw_table(captions: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """A caption over every column; each cell of a small map is a square."""
    step = PANEL + GAP
    table = Image.new("RGB", (len(captions) * step - GAP, CAPTION + len(rows) * step - GAP), "white")
    draw, font = ImageDraw.Draw(table), ImageFont.load_default(16)
    for column, caption in enumerate(captions):
        draw.text((column * step + PANEL // 2, CAPTION // 2), caption, "black", font, anchor="mm")
    for top, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            shrinks = panel.width > PANEL
            resample = Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST
            table.paste(panel.resize((PANEL, PANEL), resample), (column * step, CAPTION + top * step))
    return table


def run_loss(arguments: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    losses.set(title="training", ylabel="reconstruction loss", xlabel="step")
    errors.set(title="validation images", ylabel="error of a map", xlabel="step")
    for name, path in named_paths(arguments.runs).items():
        curves = read_curves(path)
        (line,) = losses.plot(*curves["loss_reconstruction"])
        for metric, style in (("eval_error_2x", "--"), ("eval_error_4x", "-")):
            label = f"{name}, {metric[-2:]}"
            errors.plot(*curves[metric], style, color=line.get_color(), label=label, marker=".")
    errors.plot(*curves["eval_error_1x"], ":", color="grey", label="map of the encoder")
    for axes in (losses, errors):
        axes.spines[["top", "right"]].set_visible(False)
    errors.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # of both: colours tell runs
    figure.savefig(arguments.out, dpi=100)


def read_curves(path: str) -> dict[str, tuple[list[int], list[float]]]:
    """Of a metrics.csv: steps and values of each metric that is drawn. Raises ValueError where one lacks."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    curves = {}
    for metric in METRICS:
        points = [(int(line["step"]), float(line["value"])) for line in lines if line.get("metric") == metric]
        if not points:
            raise ValueError(f"{path} has no {metric}; it should be of the task `upsampler`, validated")
        curves[metric] = ([step for step, _ in points], [value for _, value in points])
    return curves


if __name__ == "__main__":
    raise SystemExit(main())
