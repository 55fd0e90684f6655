"""A recipe from start to finish: stage after stage through transformers' Trainer, then the model as a folder.

Every stage builds its module anew and takes over the weights of the one before, so that a resumed run goes
the way of an uninterrupted one. Finished stages are taken up again, an unfinished one continues at its last
checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from stepwell.data.mixture import Mixture
from stepwell.train.groups import freeze_all_but, parameter_groups
from stepwell.train.recipe import Recipe, Stage, load_recipe
from stepwell.train.tasks import Task, find_task

__all__ = ["StageTrainer", "mixture", "train"]

_logger = logging.getLogger(__name__)
_RECORD = "recipe.json"
_WITHOUT_EFFECT = {"name", "output", "save_steps", "log_steps", "workers", "resume", "save_dtype"}
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
    sources = [mixture(task, seed=settings.seed + i) for i, task in enumerate(tasks)]
    folder = settings.output / settings.name
    stages = [folder / f"{i + 1}_{stage.name}" for i, stage in enumerate(settings.stages)]
    resume = settings.resume
    for i, stage_folder in enumerate(stages):
        if resume:
            _refuse_another_recipe(stage_folder, _what_matters(settings, i))
    weights: Path | None = None
    for i, (task, source, stage_folder) in enumerate(zip(tasks, sources, stages, strict=True)):
        finished = stage_folder / "finished"
        if resume and finished.is_dir():
            _logger.info("stage %s is finished already", task.stage.name)
        else:
            trainer = StageTrainer(
                _built(task, settings, weights), task, settings, source, stage_folder, seed=settings.seed + i
            )
            last = get_last_checkpoint(str(stage_folder)) if resume and stage_folder.is_dir() else None
            trainer.accelerator.wait_for_everyone()  # all have looked before anything is removed
            if trainer.is_world_process_zero():
                if last is None:
                    shutil.rmtree(stage_folder, ignore_errors=True)
                _write(stage_folder / _RECORD, _what_matters(settings, i))
            trainer.train(resume_from_checkpoint=last)
            trainer.save_model(str(stage_folder / "unfinished"))
            if trainer.is_world_process_zero():
                (stage_folder / "unfinished").replace(finished)
            trainer.accelerator.wait_for_everyone()
            resume = False  # what later stages made of other weights
        weights = finished / "model.safetensors"
    assert weights is not None  # a recipe has a stage
    set_seed(settings.seed)
    tasks[-1].save(weights, folder / "model")
    return folder / "model"


def _built(task: Task, recipe: Recipe, weights: Path | None) -> nn.Module:
    set_seed(recipe.seed)
    module = task.build()
    if weights is not None:
        load_model(module, weights)
    return module


def mixture(task: Task, *, seed: int) -> Mixture:
    """All samples of a stage, as many as its steps take."""
    stage = task.stage
    length = stage.steps * stage.batch * stage.accumulate
    sources = [task.source(data) for data in stage.data]
    return Mixture(sources, [data.weight for data in stage.data], length=length, seed=seed)


def _what_matters(recipe: Recipe, stage: int) -> Any:
    """The fields that the weights of a stage depend on, all of them, as JSON."""
    fields = recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    fields["stages"] = fields["stages"][: stage + 1]
    for each in fields["stages"]:
        for name in [name for name in each["trainer"] if name.startswith(_TRAINER_WITHOUT_EFFECT)]:
            del each["trainer"][name]
    return fields


def _refuse_another_recipe(folder: Path, recipe: Any) -> None:
    """Raises ValueError naming the first field in which a stage's folder was trained otherwise."""
    record = folder / _RECORD
    if not record.is_file():  # nothing is there, or a run of 0.1
        return
    theirs, ours = (dict(_leaves(fields)) for fields in (json.loads(record.read_text("utf-8")), recipe))
    for field in theirs | ours:
        if (before := theirs.get(field)) != (now := ours.get(field)):
            raise ValueError(
                f"{folder} was trained with {field} {before!r}, and the recipe says {now!r}; choose another "
                "output or name, delete that folder, or start anew with resume=false"
            )


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


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's parameter groups, and its losses weighed, added and logged."""

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        recipe: Recipe,
        source: Mixture,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self.parts = task.parts(module)
        freeze_all_but(module, task.learning, self.parts)
        super().__init__(
            module,
            _training_arguments(recipe, task.stage, folder, seed=seed),
            data_collator=task.collate,
            train_dataset=source,
        )
        self.task, self.stage = task, task.stage
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, accumulated as means
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser by its name, over the stage's parameter groups."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimiser = self.stage.optimiser
            groups = parameter_groups(
                self.model,
                self.parts,
                lr=optimiser.lr,
                part_lrs=optimiser.part_lrs,
                weight_decay=optimiser.weight_decay,
            )
            self.optimizer = kind(groups, **arguments)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the stage's losses."""
        losses = self.task.losses(model, inputs)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + loss.detach().cpu()
        self._batches += 1
        total = torch.stack([self.stage.losses[name] * loss for name, loss in losses.items()]).sum()
        return (total, None) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last time."""
        if self._batches:
            logs |= {
                f"loss_{name}": round(float(total / self._batches), 4) for name, total in self._sums.items()
            }
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)


def _training_arguments(recipe: Recipe, stage: Stage, folder: Path, *, seed: int) -> TrainingArguments:
    """Raises ValueError for a field of `stage.trainer` that is said elsewhere or does not exist."""
    optimiser = stage.optimiser
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch,
        "gradient_accumulation_steps": stage.accumulate,
        "optim": optimiser.name,
        "learning_rate": optimiser.lr,
        "adam_beta1": optimiser.betas[0],
        "adam_beta2": optimiser.betas[1],
        "weight_decay": optimiser.weight_decay,
        "max_grad_norm": optimiser.max_grad_norm,
        "lr_scheduler_type": stage.schedule.name,
        "lr_scheduler_kwargs": stage.schedule.arguments,
        "warmup_steps": stage.schedule.warmup_steps,
        "bf16": recipe.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "logging_steps": recipe.log_steps,
        "save_steps": recipe.save_steps,
        "dataloader_num_workers": recipe.workers,
        "remove_unused_columns": False,
        "accelerator_config": {
            "dispatch_batches": False
        },  # rows of pixel_values are no samples: never cut a batch
    }
    defaults = {"save_total_limit": 1, "report_to": "none"}
    if recipe.workers:
        defaults["dataloader_prefetch_factor"] = 8
    if said := sorted(fields.keys() & stage.trainer.keys()):
        raise ValueError(f"stages.{stage.name}.trainer.{said[0]} is set by another field of the recipe")
    try:
        return TrainingArguments(**{**fields, **defaults, **stage.trainer})
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("TrainingArguments.__init__() ")
        raise ValueError(f"stages.{stage.name}: TrainingArguments: {reason}") from None


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'stepwell[train]'") from error
