"""A recipe from start to finish: stage after stage through transformers' Trainer, then the model as a folder.

Every stage builds its module anew and takes over the weights of the one before, so that a resumed run goes
the way of an uninterrupted one. Finished stages are taken up again, an unfinished one continues at its last
checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_model
from torch import nn
from transformers import Trainer, set_seed

from stepwell.data.files import read_json
from stepwell.data.mixture import PATIENCE, Mixture
from stepwell.folders import write_whole
from stepwell.train.arguments import check_arguments
from stepwell.train.groups import freeze_all_but, optimiser_groups
from stepwell.train.processes import is_first, leave_at_exit, processes, tell
from stepwell.train.recipe import Recipe, load_recipe
from stepwell.train.stage_trainer import WHOLE, StageTrainer, progress_bars, put
from stepwell.train.tasks import Task, find_task, sources_of

__all__ = ["RECIPE", "check_stage", "mixture", "train", "weights_of"]

_logger = logging.getLogger(__name__)
RECIPE = "recipe.yaml"
"""In a run's folder: what was trained, its bases and overrides in it."""
_RECORD = "recipe.json"
_PROCESSES = "processes"
_WITHOUT_EFFECT = {"name", "output", "save_steps", "log_steps", "workers", "resume", "save_dtype"}
_WITHOUT_EFFECT |= {"bad_samples", "bad_samples_limit"}
_TRAINER_WITHOUT_EFFECT = ("dataloader_", "disable_tqdm", "log", "report_to", "run_name", "save_")


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains what a recipe (a shipped name or a path) describes; overrides read "a.b=c".

    Returns the folder of the finished model, output/name/model. Raises ValueError of one line for a wrong
    recipe, and where the folder holds what another recipe trained; FileNotFoundError for data that is not
    there, ImportError where the [train] extra is missing.
    """
    settings = load_recipe(recipe, overrides)
    _require_accelerate()
    tasks = [find_task(settings.task)(settings, stage) for stage in settings.stages]
    patience = PATIENCE if settings.bad_samples == "skip" else 1
    sources = [mixture(task, seed=settings.seed + i, patience=patience) for i, task in enumerate(tasks)]
    for task in tasks[1:]:  # of the first, what is wrong is told before anything is trained
        check_stage(settings, task)
    folder = settings.output / settings.name
    stages = [folder / f"{i + 1}_{stage.name}" for i, stage in enumerate(settings.stages)]
    resume = settings.resume
    records = [_what_matters(settings, i, task, sources[i]) for i, task in enumerate(tasks)]
    for stage_folder, record in zip(stages, records, strict=True):
        if resume:
            _refuse_another(stage_folder, record, settings)
    _begin(settings, tasks, folder)
    weights: Path | None = None
    for i, (task, source, stage_folder) in enumerate(zip(tasks, sources, stages, strict=True)):
        finished = stage_folder / "finished"
        if resume and finished.is_dir():
            tell(f"stage {task.stage.name} was finished before, and is taken as it is: {finished}")
        else:
            trainer = StageTrainer(
                _built(task, settings, weights), task, settings, source, stage_folder, seed=settings.seed + i
            )
            last = _last_checkpoint(stage_folder) if resume else None
            trainer.accelerator.wait_for_everyone()  # all have looked before anything is removed
            if trainer.is_world_process_zero():
                if last is None:
                    shutil.rmtree(stage_folder, ignore_errors=True)
                _write(stage_folder / _RECORD, records[i])
            _train(trainer, checkpoint=last)
            trainer.finish(finished)
            trainer.accelerator.wait_for_everyone()
            resume = False  # what later stages made of other weights
        weights = finished / "model.safetensors"
    assert weights is not None  # a recipe has a stage
    set_seed(settings.seed)
    if is_first():
        part = folder / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        tasks[-1].save(weights, part)
        put(part, folder / "model")
        tasks[-1].report(folder / "model", folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        leave_at_exit()
    return folder / "model"


def check_stage(recipe: Recipe, task: Task) -> nn.Module:
    """The stage's outline, of which what learns requires gradients. Raises ValueError for parts, optimisers,
    schedules and further fields that there are not.
    """
    module = task.outline()
    parts = task.parts(module)
    freeze_all_but(module, task.learning, parts, task.frozen)
    optimiser_groups(module, parts, task.stage.optimiser)
    check_arguments(recipe, task.stage)
    return module


def _begin(recipe: Recipe, tasks: Sequence[Task], folder: Path) -> None:
    """The first process leaves the recipe in the run's folder, and tells what the data hold."""
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    write_whole(folder / RECIPE, yaml.safe_dump({"task": recipe.task, **fields}, sort_keys=False))
    if recipe.bf16 and not torch.cuda.is_available() and not _computes_bf16():
        tell("bf16: this processor has no instructions for it and is many times faster with bf16=false")
    for task in tasks:
        if text := task.introduction():
            tell(text)


def _computes_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _train(trainer: Trainer, *, checkpoint: str | None) -> None:
    """To its end; of what fails, the error is the last that is printed, and not the progress bar."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        for bar in progress_bars(trainer):
            bar.close()
        raise


def _built(task: Task, recipe: Recipe, weights: Path | None) -> nn.Module:
    set_seed(recipe.seed)
    module = task.build()
    if weights is not None:
        load_model(module, weights)
    return module


def mixture(task: Task, *, seed: int, patience: int = PATIENCE) -> Mixture:
    """All samples of a stage, as many as its steps or epochs take in all processes; patience: with bad ones
    in a row.
    """
    stage = task.stage
    sources = sources_of(task, "data")
    of_a_step = stage.batch * stage.accumulate * processes()
    steps = stage.steps or math.ceil(stage.epochs * sum(map(len, sources)) / of_a_step)
    length = steps * of_a_step
    return Mixture(
        sources,
        weights_of(stage),
        length=length,
        even=stage.batch if stage.even else None,
        prepare=task.prepare,
        seed=seed,
        patience=patience,
    )


def weights_of(stage: Any) -> list[float] | None:
    """Of a stage's data. Raises ValueError where some have one and some have none."""
    told = [data.weight for data in stage.data if data.weight is not None]
    if told and len(told) < len(stage.data):
        raise ValueError(f"stages.{stage.name}.data: give a weight to every entry, or to none")
    return told or None


def _last_checkpoint(stage_folder: Path) -> str | None:
    """The last that was written to its end."""
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in stage_folder.glob("checkpoint-*")}
    checkpoints = [folder for folder, step in steps.items() if step.isdecimal()]
    for folder in sorted(checkpoints, key=lambda folder: int(steps[folder]), reverse=True):
        if (folder / WHOLE).is_file():
            return str(folder)
        _logger.warning("%s was not written to its end; it is passed over", folder)
    return None


def _what_matters(recipe: Recipe, stage: int, task: Task, source: Mixture) -> Any:
    """All that the weights of a stage depend on, as JSON: fields of the recipe, the data, the processes."""
    fields = recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    fields["stages"] = fields["stages"][: stage + 1]
    for each in fields["stages"]:
        for name in [name for name in each["trainer"] if name.startswith(_TRAINER_WITHOUT_EFFECT)]:
            del each["trainer"][name]
    fields["samples"] = [len(each) for each in source.sources]
    return {**fields, **task.record(), _PROCESSES: processes()}


def _refuse_another(folder: Path, now: Any, recipe: Recipe) -> None:
    """Raises ValueError naming the first thing by which a stage's folder was trained otherwise. Of a stage
    that is finished, it does not matter how many processes there are now; and of a recipe, fields that there
    were not yet, where they say nothing new.
    """
    record = folder / _RECORD
    if not record.is_file():  # nothing is there, or a run of 0.1
        return
    before = read_json(record)
    if (folder / "finished").is_dir():
        before[_PROCESSES] = now[_PROCESSES]
    theirs, ours = dict(_leaves(before)), dict(_leaves(now))
    silent = _left_as_they_are(recipe)
    for field in theirs | ours:
        is_new = field in silent and not any(name in theirs for name in _names_above(field))
        if not is_new and theirs.get(field) != ours.get(field):
            raise ValueError(
                f"{folder} was trained with {field} {theirs.get(field)!r}, which is {ours.get(field)!r} now; "
                "choose another output or name, delete that folder, or start anew with resume=false"
            )


def _left_as_they_are(recipe: Recipe) -> set[str]:
    """Fields, by their dotted names, that have their defaults."""
    told = dict(_leaves(recipe.model_dump(mode="json", exclude_defaults=True)))
    return dict(_leaves(recipe.model_dump(mode="json"))).keys() - told.keys()


def _names_above(field: str) -> Iterator[str]:
    """A dotted name, and those that it begins with."""
    parts = field.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what JSON holds."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}".removeprefix("."))
    else:
        yield name, value


def _write(file: Path, fields: Any) -> None:
    """The file is there as a whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(fields, indent=2), "utf-8")
    part.replace(file)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'stepwell[train]'") from error
