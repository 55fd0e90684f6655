"""The drawn pages that readers are measured on, and pictures of what a reader makes of its questions.

python benchmarks/reading.py draw FOLDER               draws the pages; are they the recorded ones?
python benchmarks/reading.py pictures RUN IMAGES FILE  ten right and ten wrong answers of an evaluation
python benchmarks/reading.py curves RUN FILE           the losses of a training, stage after stage
python benchmarks/reading.py together RUNS FILE        one loss of several trainings of the same stages
python benchmarks/reading.py exchange QUESTIONS FILE   each question on the image of another of its type
python benchmarks/reading.py parts FOLDER              the shipped reader's encoders and language model, apart
python benchmarks/reading.py between MODEL MODEL FRACTION FOLDER
                                                       a model so far on the way from the first to the second

benchmarks/reading holds the questions and the digests of the images, as they were before any reader was
trained that is measured on them. Another Pillow or NumPy may draw other pixels, and the first that differ are
named.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from stepwell.evaluate.answers import digest_of_file
from stepwell.evaluate.drawing import write_figure
from stepwell.evaluate.metrics import spelled_alike
from stepwell.folders import share, write_whole
from stepwell.images.open import open_image
from stepwell.reader.drawn import DrawnPages
from stepwell.reader.drawn_set import write_drawn
from stepwell.views.region import region_in_words

RECORDED = Path(__file__).parent / "reading"
LONG_SIDES = (800, 1280)
SHOWN, WIDTH, LINE, TEXT, ROOM = 10, 560, 44, 22, 8
LOSSES = ("loss_ctc", "loss_language", "loss_pointer")


def draw(folder: Path) -> int:
    pages = DrawnPages(
        count=500, seed=7, sides=LONG_SIDES, aspect=(0.8, 2.4), text=(8, 40), reads=8, held_out=True
    )
    write_drawn(pages, folder, view=LONG_SIDES[1])
    recorded = (line.split() for line in (RECORDED / "drawn_images.sha256").read_text().splitlines())
    differing = [name for digest, name in recorded if digest_of_file(folder / name) != digest]
    # Training draws its boxes otherwise since then; what is asked stays as it was recorded.
    write_whole(folder / "questions.jsonl", (RECORDED / "drawn_questions.jsonl").read_text("utf-8"))
    print(f"{len(pages)} pages in {folder}; {len(differing)} files differ {' '.join(differing[:5])}")
    return int(bool(differing))


def pictures(run: Path, images: Path, file: Path) -> int:
    """Two columns, chosen by chance among the questions that tell a box: right and wrong. images: the folder
    that the questions' paths start from.
    """
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text("utf-8").splitlines()]
    answers = [answer for answer in answers if region_in_words(answer["question"])]
    random.Random(0).shuffle(answers)
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for answer in answers:
        sides[bool(spelled_alike(answer["prediction"], answer["answers"]))].append(answer)
    rows = LINE + 2 * TEXT + ROOM
    sheet = Image.new("RGB", (2 * WIDTH + 3 * ROOM, SHOWN * rows + ROOM), "white")
    for column, of_column in enumerate(sides.values()):
        for row, answer in enumerate(of_column[:SHOWN]):
            at = (ROOM + column * (WIDTH + ROOM), ROOM + row * rows)
            _draw(sheet, at, answer, images)
    sheet.save(file)
    print(f"{len(sides[True])} right, {len(sides[False])} wrong: {file}")
    return 0


def _draw(sheet: Image.Image, at: tuple[int, int], answer: Any, folder: Path) -> None:
    box = region_in_words(answer["question"])
    assert box is not None
    image = open_image(folder / answer["image"][0])
    line = image.crop(
        tuple(round(edge * side) for edge, side in zip(box, (*image.size, *image.size), strict=True))
    )
    scale = min(WIDTH / line.width, LINE / line.height)
    sheet.paste(line.resize((max(1, int(line.width * scale)), max(1, int(line.height * scale)))), at)
    said, right = answer["prediction"], answer["answers"][0]
    lines = [said] if spelled_alike(said, answer["answers"]) else [said, f"is: {right}"]
    font = ImageFont.load_default(14)
    for i, text in enumerate(lines):
        ImageDraw.Draw(sheet).text((at[0], at[1] + LINE + i * TEXT), text, fill="black", font=font)


def exchange(questions: Path, file: Path) -> int:
    """What a reader that looks at its image can answer only by chance."""
    rows = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    by_type: dict[str, list[str]] = {}
    for row in rows:
        images = by_type.setdefault(row["type"], [])
        if row["image"] not in images:
            images.append(row["image"])
    for row in rows:
        images = by_type[row["type"]]
        row["image"] = images[(images.index(row["image"]) + 1) % len(images)]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{len(rows)} questions: {file}")
    return 0


def parts(folder: Path) -> int:
    """What the recipes of benchmarks/reading/systems start from."""
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    import stepwell

    model: Any = stepwell.load("reader_tiny").model
    causal = AutoModelForCausalLM.from_config(model.config.text_config)
    causal.base_model.load_state_dict(model.model.language_model.state_dict())
    causal.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    causal.save_pretrained(folder / "language")
    for name, encoder in zip(("vit", "resnet"), model.model.vision.encoders, strict=True):
        save_model(encoder, str(folder / f"{name}.safetensors"))
    print(f"vit, resnet and language: {folder}")
    return 0


def between(first: Path, second: Path, fraction: float, folder: Path) -> int:
    """Weights (1 - fraction) * first + fraction * second: of a model, and of what it became when it learned
    more, one that can do what both can (Wortsman et al., arXiv 2109.01903). Written as the second is.
    """
    from safetensors.torch import load_file, save_file

    if folder.exists():
        raise ValueError(f"{folder}: is there already, and is not written over")
    weights = [load_file(model / "model.safetensors") for model in (first, second)]
    if weights[0].keys() != weights[1].keys():
        raise ValueError(f"{first} and {second} have different weights")
    mixed = {
        name: torch.lerp(weights[0][name].float(), tensor.float(), fraction).to(tensor.dtype)
        for name, tensor in weights[1].items()
    }
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(second, part, ignore=shutil.ignore_patterns("model.safetensors", "origin.json"))
    save_file(mixed, part / "model.safetensors", metadata={"format": "pt"})
    share(part / "model.safetensors")
    part.rename(folder)
    print(f"{fraction:g} of the way from {first} to {second}: {folder}")
    return 0


def curves(run: Path, file: Path) -> int:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(LOSSES)}
    for i, (stage, begun, losses) in enumerate(_stages(run)):
        for name, colour in colours.items():
            if losses[name]:
                axes.plot(*zip(*losses[name], strict=True), color=colour)
        _begin(axes, stage, begun, i)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, label=name.removeprefix("loss_"))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 4))
    axes.legend(loc="center right")
    write_figure(file, figure)
    return 0


def together(runs: Path, file: Path) -> int:
    """runs: a folder of trainings of the same stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(sorted(path for path in runs.iterdir() if path.is_dir())):
        for j, (stage, begun, losses) in enumerate(_stages(run)):
            axes.plot(*zip(*losses["loss_ctc"], strict=True), color=f"C{i}", label=None if j else run.name)
            if i == 0:
                _begin(axes, stage, begun, j)
    axes.set(xlabel="step", ylabel="loss of lines (CTC), a character", ylim=(0, 4))
    axes.legend(loc="lower left")
    write_figure(file, figure)
    return 0


def _stages(run: Path) -> Iterator[tuple[str, int, dict[str, list[tuple[int, float]]]]]:
    """Of each stage its name, the step that it begins at, and the losses of LOSSES: step and value."""
    begun = 0
    for stage in sorted(run.glob("[0-9]*_*"), key=lambda path: int(path.name.partition("_")[0])):
        with (stage / "metrics.csv").open(encoding="utf-8") as rows:
            found = [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(rows)]
        losses = {
            name: [(begun + step, value) for step, metric, value in found if metric == name]
            for name in LOSSES
        }
        yield stage.name, begun, losses
        begun += max(step for step, *_ in found)


def _begin(axes: Any, stage: str, begun: int, number: int) -> None:
    axes.axvline(begun, color="0.8")
    place = begun, 0.99 - 0.05 * (number % 2)  # names of short stages do not lie on each other
    axes.text(*place, f" {stage}", transform=axes.get_xaxis_transform(), va="top", fontsize=8)


COMMANDS = {
    "draw": draw,
    "pictures": pictures,
    "curves": curves,
    "together": together,
    "exchange": exchange,
    "parts": parts,
    "between": between,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in COMMANDS.items():
        command = commands.add_parser(name)
        for parameter in inspect.signature(run, eval_str=True).parameters.values():
            command.add_argument(parameter.name, type=parameter.annotation)
    given = vars(parser.parse_args())
    sys.exit(COMMANDS[given.pop("command")](**given))
