"""A stage of a recipe -> what transformers' Trainer is told."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import TrainingArguments

from stepwell.models.vision import first_complaint
from stepwell.train.recipe import Optimiser, Recipe, Stage
from stepwell.train.schedules import SCHEDULES, checked_arguments

__all__ = ["optimiser_class", "training_arguments"]

OPTIMISERS = {"adam": "torch.optim:Adam", "nadam": "torch.optim:NAdam", "lamb": "timm.optim:Lamb"}
"""Those that TrainingArguments has no name for."""


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


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, *, steps: int, seed: int
) -> TrainingArguments:
    """Raises ValueError for a field of `stage.trainer` that is said elsewhere or does not exist."""
    optimiser = stage.optimiser
    fields: dict[str, Any] = {
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
    # Two, since the one before is removed before the last is marked as whole.
    defaults: dict[str, Any] = {"save_total_limit": 2, "report_to": "none"}
    if find_spec("tensorboard") is not None:
        defaults["report_to"] = "tensorboard"
    if recipe.workers:
        defaults["dataloader_prefetch_factor"] = 8
    asks_trainer = stage.schedule.name == "reduce_lr_on_plateau" or "load_best_model_at_end" in stage.trainer
    if asks_trainer and (score := _score(stage)) is not None:
        fields |= {"metric_for_best_model": f"eval_{score}", "greater_is_better": True}
    if stage.validation:
        fields |= {"eval_strategy": "steps", "eval_steps": _steps_between_validations(stage, steps)}
    if said := sorted(fields.keys() & stage.trainer.keys()):
        raise ValueError(f"stages.{stage.name}.trainer.{said[0]} is set by another field of the recipe")
    try:
        arguments = TrainingArguments(**{**fields, **defaults, **stage.trainer})
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
