"""Trains the recipes of benchmarks/own_images on real images, and tells what each scored and cost.

python benchmarks/own_images.py train deeppcb deeppcb_apart --seeds 0 1        one after the other
python benchmarks/own_images.py table                                          of all runs that are done
python benchmarks/own_images.py curves boxes_ap50 curves.png deeppcb deeppcb_apart    while they learned

The recipes read data/, a folder or a link. A run lies in runs/own_images/RECIPE-SEED: what `stepwell train`
leaves there, with log.txt and measured.json beside it, which of a run that was taken up again counts the last
part alone. --together 2 --threads 1 trains two at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import machine
from PIL import Image

import stepwell
from stepwell.evaluate.report import as_markdown
from stepwell.flops.count import count_operations
from stepwell.train.results import read_metrics

RECIPES = Path(__file__).parent / "own_images"
RUNS = Path("runs/own_images")
SCORES = {
    "detection": ("ap50", "ap"),
    "segmentation": ("mean_iou", "pixel_accuracy"),
    "classification": ("top1", "top_k"),
}
"""Of each task, the score that a run is told by first."""


class Run(NamedTuple):
    """Scores in percent, by name; measured: what `train_one` wrote."""

    recipe: str
    seed: int
    scores: dict[str, float]
    measured: dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Trainings on real images, and a table of what they scored.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="recipes of benchmarks/own_images, one after the other")
    train.add_argument("recipes", nargs="+", choices=sorted(path.stem for path in RECIPES.glob("*.yaml")))
    train.add_argument("--seeds", type=int, nargs="+", default=[0])
    train.add_argument("--together", type=int, default=1, help="runs at a time, by default 1")
    train.add_argument("--threads", type=int, help="of each run, by default as many as there are cores")
    train.add_argument("--workers", type=int, default=0, help="of each run, to load its images, by default 0")
    commands.add_parser("table", help="Markdown, of all runs that are done")
    curves = commands.add_parser("curves", help="draws a score of the validation data while recipes learned")
    curves.add_argument("score", help="such as boxes_ap50, mean_iou or top1")
    curves.add_argument("picture", type=Path)
    curves.add_argument("recipes", nargs="+")
    given = parser.parse_args()
    if given.command == "table":
        print(table(sorted(runs(), key=lambda run: (run.recipe, run.seed))))
        return 0
    if given.command == "curves":
        draw_curves(given.picture, given.score, given.recipes)
        return 0
    threads = given.threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(given.together) as pool:
        runs_to_come = [
            pool.submit(train_one, recipe, seed, threads, given.workers)
            for recipe, seed in product(given.recipes, given.seeds)
        ]
        failed = [run.result() for run in runs_to_come]
    return int(any(failed))


def train_one(recipe: str, seed: int, threads: int, workers: int) -> bool:
    """Whether it failed. One that is done is left as it is."""
    name = f"{recipe}-{seed}"
    folder = RUNS / name
    if (folder / "measured.json").is_file():
        print(f"{name} is done")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"output": RUNS, "name": name, "seed": seed, "workers": workers}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "stepwell", "train", str(RECIPES / f"{recipe}.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = round(time.monotonic() - started)
    if status:
        print(f"{name} failed: {folder / 'log.txt'}", file=sys.stderr)
        return True
    model: Any = stepwell.load(folder / "model", device="cpu")
    measured = {
        "gflops": gflops(model),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "processor_seconds": round(usage.ru_utime + usage.ru_stime),
        "peak_mib": usage.ru_maxrss // 1024,
        "threads": threads,
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": date.today().isoformat(),
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    print(f"{name}: {seconds} s")
    return False


def runs() -> Iterator[Run]:
    for path in RUNS.glob("*/measured.json"):
        recipe, _, seed = path.parent.name.rpartition("-")
        scored = json.loads((path.parent / "scores" / "scores.json").read_text())
        of_kind = scored["scores"] if scored["task"] == "detection" else {"": scored["scores"]}
        scores = {
            f"{kind} {name}".strip(): 100 * value
            for kind, values in of_kind.items()
            for name in SCORES[scored["task"]]
            if (value := values[name]) is not None
        }
        yield Run(recipe, int(seed), scores, json.loads(path.read_text()))


@torch.no_grad()
def gflops(model: Any) -> float:
    """1e9 operations of one gray square as large as the model's images are, its head with them."""
    settings = model.config.image_settings if hasattr(model.config, "image_settings") else None
    side = getattr(settings, "long_limit", None) or getattr(settings, "window", None)
    side = side or model.config.settings.image_side
    pixels = model.image_processor()([Image.new("RGB", (side, side), "gray")], return_tensors="pt")
    return sum(count_operations(model, lambda: model(**pixels)).values()) / 1e9


def table(done: list[Run]) -> str:
    rows = [
        [
            run.recipe,
            str(run.seed),
            ", ".join(f"{name} {value:.1f}" for name, value in run.scores.items()),
            f"{run.measured['gflops']:.2f}",
            f"{run.measured['params'] / 1e6:.2f}",
            f"{run.measured['processor_seconds']}",
            f"{run.measured['seconds']}",
            f"{run.measured['peak_mib'] / 1024:.2f}",
            run.measured["gpu"] or "CPU",
        ]
        for run in done
    ]
    heads = ["recipe", "seed", "val, percent", "GFLOPs", "params M", "processor s", "s", "GiB", "on"]
    return "\n".join(as_markdown(heads, rows))


def draw_curves(picture: Path, score: str, recipes: list[str]) -> None:
    """A line a run, a colour a recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, recipe in enumerate(recipes):
        folders = sorted(path.parent for path in RUNS.glob(f"{recipe}-[0-9]*/measured.json"))
        for place, folder in enumerate(folders):
            (metrics,) = folder.glob("*/metrics.csv")
            steps, values = read_metrics(metrics)[f"eval_{score}"]
            label = recipe if place == 0 else None
            axes.plot(steps, [100 * value for value in values], f"C{number}.-", label=label)
    axes.set(xlabel="step", ylabel=f"{score}, percent of val")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
