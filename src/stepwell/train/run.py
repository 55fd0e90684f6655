"""A recipe from start to finish: stage after stage through transformers' Trainer, then the model as a folder.

Every stage builds its module anew and takes over the weights of the one before, so that a resumed run goes
the way of an uninterrupted one. Finished stages are taken up again, an unfinished one continues at its last
checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from stepwell.data.mixture import Mixture
from stepwell.models.register import register
from stepwell.train.groups import freeze_all_but, parameter_groups
from stepwell.train.recipe import Recipe, Stage, load_recipe
from stepwell.train.tasks import Task, find_task

__all__ = ["StageTrainer", "mixture", "train"]

_logger = logging.getLogger(__name__)


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains what a recipe (a shipped name or a path) describes; overrides read "a.b=c".

    Returns the folder of the finished model, output/name/model. Raises ValueError of one line for a wrong
    recipe, FileNotFoundError for data that is not there, ImportError where the [train] extra is missing.
    """
    settings = load_recipe(recipe, overrides)
    _require_accelerate()
    register()
    tasks = [find_task(settings.task)(settings, stage) for stage in settings.stages]
    sources = [
        mixture(task, stage, seed=settings.seed + i) for i, (task, stage) in _numbered(tasks, settings)
    ]
    folder = settings.output / settings.name
    before: Path | None = None
    for i, (task, stage) in _numbered(tasks, settings):
        stage_folder = folder / f"{i + 1}_{stage.name}"
        finished = stage_folder / "finished" / "model.safetensors"
        if settings.resume and finished.is_file():
            _logger.info("stage %s is finished already", stage.name)
        else:
            module = _built(task, settings, before)
            trainer = StageTrainer(
                module, task, settings, stage, sources[i], stage_folder, seed=settings.seed + i
            )
            last = settings.resume and stage_folder.is_dir() and get_last_checkpoint(str(stage_folder))
            trainer.train(resume_from_checkpoint=last or None)
            trainer.save_model(str(finished.parent))
        before = finished
    tasks[-1].save(_built(tasks[-1], settings, before), folder / "model")
    return folder / "model"


def _numbered(tasks: list[Task], recipe: Recipe) -> list[tuple[int, tuple[Task, Stage]]]:
    return list(enumerate(zip(tasks, recipe.stages, strict=True)))


def _built(task: Task, recipe: Recipe, weights: Path | None) -> nn.Module:
    set_seed(recipe.seed)
    module = task.build()
    if weights is not None:
        load_model(module, weights)
    return module


def mixture(task: Task, stage: Stage, *, seed: int) -> Mixture:
    """All samples of a stage, as many as its steps take."""
    length = stage.steps * stage.batch * stage.accumulate
    sources = [task.source(data) for data in stage.data]
    return Mixture(sources, [data.weight for data in stage.data], length=length, seed=seed)


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's parameter groups, and its losses weighed, added and logged."""

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        recipe: Recipe,
        stage: Stage,
        source: Mixture,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self.parts = task.parts(module)
        freeze_all_but(module, task.learning, self.parts)
        super().__init__(
            module,
            _training_arguments(recipe, stage, folder, seed=seed),
            data_collator=task.collate,
            train_dataset=source,
        )
        self.task, self.stage = task, stage
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
