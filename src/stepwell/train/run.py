"""A recipe from start to finish: stage after stage through transformers' Trainer, then the model as a folder.

Every stage builds its module anew and takes over the weights of the one before, so that a resumed run goes
the way of an uninterrupted one. Finished stages are taken up again, an unfinished one continues at its last
checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from stepwell.data.mixture import Mixture
from stepwell.train.groups import freeze_all_but, parameter_groups
from stepwell.train.metrics import MetricsFile
from stepwell.train.recipe import Recipe, Stage, load_recipe
from stepwell.train.tasks import Task, find_task

__all__ = ["StageTrainer", "mixture", "train"]

_logger = logging.getLogger(__name__)
BEST = "best"  # of a stage: the weights with the lowest loss on its validation data so far
_RECORD = "recipe.json"
_WHOLE = "whole"  # an empty file, the last that a checkpoint gets
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
            last = _last_checkpoint(stage_folder) if resume else None
            trainer.accelerator.wait_for_everyone()  # all have looked before anything is removed
            if trainer.is_world_process_zero():
                if last is None:
                    shutil.rmtree(stage_folder, ignore_errors=True)
                _write(stage_folder / _RECORD, _what_matters(settings, i))
            trainer.train(resume_from_checkpoint=last)
            trainer.finish(finished)
            trainer.accelerator.wait_for_everyone()
            resume = False  # what later stages made of other weights
        weights = finished / "model.safetensors"
    assert weights is not None  # a recipe has a stage
    set_seed(settings.seed)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one writes
        part = folder / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        tasks[-1].save(weights, part)
        _put(part, folder / "model")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder / "model"


def _built(task: Task, recipe: Recipe, weights: Path | None) -> nn.Module:
    set_seed(recipe.seed)
    module = task.build()
    if weights is not None:
        load_model(module, weights)
    return module


def mixture(task: Task, *, seed: int) -> Mixture:
    """All samples of a stage, as many as its steps or epochs take in all processes."""
    stage, sources = task.stage, [task.source(data) for data in task.stage.data]
    of_a_step = stage.batch * stage.accumulate * _processes()
    steps = stage.steps or math.ceil(stage.epochs * sum(map(len, sources)) / of_a_step)
    length = steps * of_a_step
    return Mixture(sources, [data.weight for data in stage.data], length=length, seed=seed)


def _processes() -> int:
    """That train together, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _last_checkpoint(stage_folder: Path) -> str | None:
    """The last that was written to its end."""
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in stage_folder.glob("checkpoint-*")}
    checkpoints = [folder for folder, step in steps.items() if step.isdecimal()]
    for folder in sorted(checkpoints, key=lambda folder: int(steps[folder]), reverse=True):
        if (folder / _WHOLE).is_file():
            return str(folder)
        _logger.warning("%s was not written to its end; it is passed over", folder)
    return None


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


def _put(part: Path, folder: Path) -> None:
    """`part` takes the place of a folder, which is replaced."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


class _Sealing(TrainerCallback):
    """Marks a checkpoint once every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if args.should_save:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


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
        sources = [task.source(data) for data in task.stage.validation]
        validation: Any = ConcatDataset(cast("list[Dataset[Any]]", sources)) if sources else None
        steps = len(source) // (task.stage.batch * task.stage.accumulate * _processes())
        super().__init__(
            module,
            _training_arguments(recipe, task.stage, folder, steps=steps, seed=seed),
            data_collator=task.collate,
            train_dataset=source,
            eval_dataset=validation,
            callbacks=[_Sealing(), MetricsFile(folder)],
        )
        self.task, self.stage = task, task.stage
        self.model_accepts_loss_kwargs = False  # what Trainer counts is one number, and labels only
        self._validated = -1  # the last step at which it was
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | int] = {}

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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step; and what each loss is a mean over in all of them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(self.task.counts(batch))
        here = torch.tensor([int(counts[name]) for name in self.stage.losses], device=device)
        everywhere = self.accelerator.gather(here).view(-1, len(here)).sum(0)
        return batches, dict(zip(self.stage.losses, everywhere, strict=True))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Any:
        """The weighted sum of the stage's losses: as the part of a step that `num_items_in_batch` counts."""
        losses, counts = model(**inputs), self.task.counts(inputs)
        total = 0.0
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach() * counts[name]
            self._counts[name] = self._counts.get(name, 0) + counts[name]
            if num_items_in_batch is not None:
                # Trainer divides by the number of batches, and processes average their gradients.
                parts = self.current_gradient_accumulation_steps * self.args.world_size
                loss = loss * (parts * counts[name] / num_items_in_batch[name].clamp(min=1))
            total = total + self.stage.losses[name] * loss
        return (total, None) if return_outputs else total

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Means of losses and scores over the validation data; the weights of the smallest loss are kept in
        `best`.
        """
        means = self._validation_means()
        metrics = {f"eval_loss_{name}": means[name] for name in self.stage.losses}
        metrics["eval_loss"] = sum(weight * means[name] for name, weight in self.stage.losses.items())
        metrics |= {f"eval_{name}": means[name] for name in self.task.scores}
        super().log(metrics)
        self._validated = self.state.global_step
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        best = self.state.best_metric
        if best is None or math.isnan(best) or metrics["eval_loss"] < best:
            self.state.best_metric = metrics["eval_loss"]
            self._keep(Path(self.args.output_dir) / BEST)
        return metrics

    @torch.no_grad()
    def _validation_means(self) -> dict[str, float]:
        """Every process takes every n-th batch, so that no sample counts twice."""
        assert self.eval_dataset is not None
        rank, processes = self.args.process_index, self.args.world_size
        places = range(len(self.eval_dataset))
        batches = [places[i : i + self.stage.batch] for i in places[:: self.stage.batch]][rank::processes]
        names = [*self.stage.losses, *self.task.scores]
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.args.device)
        model = self.model.eval()
        for batch in batches:
            inputs = self._prepare_inputs(self.task.collate([self.eval_dataset[i] for i in batch]))
            counts = self.task.counts(inputs)
            with self.accelerator.autocast():
                means = model(**inputs)
            for total, name in zip(totals, names, strict=True):
                total += torch.stack([means[name] * counts[name], torch.as_tensor(counts[name]).to(total)])
        model.train()
        totals = self.accelerator.reduce(totals)
        return {
            name: float(total / count.clamp(min=1))
            for name, (total, count) in zip(names, totals, strict=True)
        }

    def _keep(self, folder: Path) -> None:
        """The weights of now, there as a whole or not at all; an older folder is replaced."""
        part = folder.with_name(f"{folder.name}.part")
        self.save_model(str(part))
        if self.is_world_process_zero():
            _put(part, folder)
        self.accelerator.wait_for_everyone()

    def finish(self, folder: Path) -> None:
        """Leaves the stage's weights, the best or the last, in `folder`; and both where they differ."""
        best = Path(self.args.output_dir) / BEST
        if self.eval_dataset is not None and self._validated != self.state.global_step:
            self.evaluate()
        if self.stage.keep == "last" or not best.is_dir():
            self._keep(folder)
            return
        self._keep(folder.with_name("last"))
        if self.is_world_process_zero():
            shutil.copytree(best, folder.with_name("finished.part"), dirs_exist_ok=True)
            folder.with_name("finished.part").replace(folder)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last time, in this process."""
        logs |= {
            f"loss_{name}": round(float(self._sums[name] / count), 4)
            for name, count in self._counts.items()
            if count
        }
        self._sums, self._counts = {}, {}
        super().log(logs, start_time)


def _training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, *, steps: int, seed: int
) -> TrainingArguments:
    """Raises ValueError for a field of `stage.trainer` that is said elsewhere or does not exist."""
    optimiser = stage.optimiser
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
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
    # Two, since the one before is removed before the last is marked as whole.
    defaults = {"save_total_limit": 2, "report_to": "none"}
    if recipe.workers:
        defaults["dataloader_prefetch_factor"] = 8
    if stage.validation:
        fields |= {"eval_strategy": "steps", "eval_steps": stage.validate_steps}
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
