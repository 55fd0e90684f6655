"""A stage of a recipe -> what transformers' Trainer is told."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from stepwell.folders import one_line
from stepwell.models.vision import first_complaint
from stepwell.train.recipe import Optimiser, Recipe, Stage
from stepwell.train.schedules import SCHEDULES, checked_arguments

__all__ = ["check_arguments", "optimiser_class", "training_arguments"]

OPTIMISERS = {"adam": "torch.optim:Adam", "nadam": "torch.optim:NAdam", "lamb": "timm.optim:Lamb"}
"""Those that TrainingArguments has no name for."""


_EPOCHS = "counts epochs in another way; give steps"
REFUSED = {
    "label_smoothing_factor": "has no effect on the losses here",
    "num_train_epochs": "is the stage's own field epochs",
    "per_device_eval_batch_size": "is the stage's own field batch",
    "train_sampling_strategy": "is the stage's own field sampling",
    "save_strategy": _EPOCHS,
    "eval_strategy": _EPOCHS,
    "logging_strategy": _EPOCHS,
}
"""Fields of TrainingArguments that would do nothing, or something else, and why."""


def optimiser_class(optimiser: Optimiser) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """What Trainer makes it of, None where TrainingArguments knows its name. Raises ImportError for one of
    timm's where that is missing.
    """
    place = OPTIMISERS.get(optimiser.name)
    if place is None:
        return None
    module, _, name = place.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except ImportError as error:
        raise ImportError(f"optimiser {optimiser.name} needs timm: pip install 'stepwell[timm]'") from error
    return kind, {"lr": optimiser.lr, "betas": optimiser.betas}


def _score(stage: Stage) -> str | None:
    """By which weights are the best; None: by the smallest loss."""
    score: str | None = getattr(stage, "best_by", None)
    return score


def _schedule_arguments(stage: Stage) -> dict[str, Any]:
    """Of TrainingArguments. Raises ValueError for arguments that a schedule of ours has not."""
    name, arguments = stage.schedule.name, stage.schedule.arguments
    if name == "reduce_lr_on_plateau":
        arguments = {"mode": "min" if _score(stage) is None else "max", **arguments}
    if name not in SCHEDULES:
        return {"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments}
    try:
        checked_arguments(name, arguments)
    except ValidationError as error:
        where = f"stages.{stage.name}.schedule.arguments"
        raise ValueError(f"{where}: {first_complaint(error)}") from None
    return {"lr_scheduler_type": "constant"}


def _steps_between_validations(stage: Stage, steps: int) -> int:
    """steps: of the whole stage."""
    if stage.validate_steps is not None:
        return stage.validate_steps
    return 500 if stage.epochs is None else max(round(steps / stage.epochs), 100)


def check_arguments(recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError as `training_arguments` does, but for what hangs on the machine and the processes:
    for a stage that is not to be trained yet.
    """
    told = _told(recipe, stage, recipe.output, steps=1, seed=0)
    try:
        OptimizerNames(told["optim"])
        SchedulerType(told["lr_scheduler_type"])
    except ValueError as error:
        raise ValueError(f"stages.{stage.name}: TrainingArguments: {one_line(error)}") from None
    if unknown := sorted(told.keys() - {field.name for field in fields(TrainingArguments)}):
        raise ValueError(f"stages.{stage.name}: TrainingArguments has no {unknown[0]!r}")


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, *, steps: int, seed: int
) -> TrainingArguments:
    """Raises ValueError for a field of `stage.trainer` that is said elsewhere or does not exist."""
    told = _told(recipe, stage, folder, steps=steps, seed=seed)
    try:
        arguments = TrainingArguments(**told)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).removeprefix("TrainingArguments.__init__() ")
        raise ValueError(f"stages.{stage.name}: TrainingArguments: {reason}") from None
    of_deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    if of_deepspeed is not None and of_deepspeed.is_zero3():
        raise ValueError(
            f"stages.{stage.name}.trainer.deepspeed: models here are not built in parts, as stage 3 of ZeRO "
            "has them; set its stage to 2, or have weights in parts by fsdp"
        )
    return arguments


def _told(recipe: Recipe, stage: Stage, folder: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """What TrainingArguments is given. Raises ValueError for a field that is said elsewhere, or refused."""
    optimiser = stage.optimiser
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": stage.batch,
        "gradient_accumulation_steps": stage.accumulate,
        "optim": "adamw_torch" if optimiser.name in OPTIMISERS else optimiser.name,
        "learning_rate": optimiser.lr,
        "adam_beta1": optimiser.betas[0],
        "adam_beta2": optimiser.betas[1],
        "weight_decay": optimiser.weight_decay,
        "max_grad_norm": optimiser.max_grad_norm,
        **_schedule_arguments(stage),
        "warmup_steps": stage.schedule.warmup_of(steps),
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
    # Two, since the one before is removed before the last is marked as whole.
    defaults: dict[str, Any] = {"save_total_limit": 2, "report_to": "none"}
    if find_spec("tensorboard") is not None:
        defaults["report_to"] = "tensorboard"
    if recipe.workers:
        defaults["dataloader_prefetch_factor"] = 8
    asks_trainer = stage.schedule.name == "reduce_lr_on_plateau" or "load_best_model_at_end" in stage.trainer
    if asks_trainer and (score := _score(stage)) is not None:
        ours |= {"metric_for_best_model": f"eval_{score}", "greater_is_better": True}
    if stage.validation:
        ours |= {"eval_strategy": "steps", "eval_steps": _steps_between_validations(stage, steps)}
    if said := sorted(ours.keys() & stage.trainer.keys()):
        raise ValueError(f"stages.{stage.name}.trainer.{said[0]} is set by another field of the recipe")
    for name, reason in REFUSED.items():
        value = stage.trainer.get(name)
        if value is not None and (reason != _EPOCHS or value == "epoch"):
            raise ValueError(f"stages.{stage.name}.trainer.{name}: {value} {reason}")
    return {**ours, **defaults, **stage.trainer}
