"""One stage of a recipe, through transformers' Trainer: its losses by name, its validation, its weights."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from stepwell.data.mixture import Drawn, InOrder, Mixture
from stepwell.folders import one_line
from stepwell.layers.synchronised import synchronised
from stepwell.train.arguments import optimiser_class, training_arguments
from stepwell.train.averaging import Averaging
from stepwell.train.bad_samples import BadSamples
from stepwell.train.examination import Examination
from stepwell.train.groups import freeze_all_but, frozen_norms, optimiser_groups
from stepwell.train.metrics import MetricsFile
from stepwell.train.processes import processes
from stepwell.train.recipe import Optimiser, Recipe
from stepwell.train.results import Results
from stepwell.train.schedules import SCHEDULES, Run, build_schedule, checked_arguments
from stepwell.train.sharding import sharding_units
from stepwell.train.tasks import Task, sources_of

__all__ = ["WHOLE", "StageTrainer", "progress_bars", "put"]

BAD = "bad_samples"  # of a batch
BEST = "best"  # of a stage: the weights that were best on its validation data so far
WHOLE = "whole"  # an empty file, the last that a checkpoint gets


def put(part: Path, folder: Path) -> None:
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
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


class _ClippingAtFirst(TrainerCallback):
    """Gradients are clipped in the first steps of a stage, and left alone after them."""

    def __init__(self, optimiser: Optimiser) -> None:
        self.steps, self.norm = optimiser.clip_steps, optimiser.max_grad_norm

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.max_grad_norm = self.norm if self.steps is None or state.global_step < self.steps else 0.0


def progress_bars(trainer: Trainer) -> Iterator[Any]:
    """tqdm's, of a training that is going on."""
    bars = (getattr(callback, "training_bar", None) for callback in trainer.callback_handler.callbacks)
    return filter(None, bars)


class _Collate:
    """A batch, and the bad samples met while it was drawn, of which a worker has no other way to tell. It has
    nothing else where a source has no good one.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        missing = [each for each in drawn if each.sample is None]
        bad = [sample for each in (*missing, *drawn) for sample in each.bad]
        if missing:
            return {BAD: bad}
        return {**self.task.collate([each.sample for each in drawn]), BAD: bad}


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
        freeze_all_but(module, task.learning, self.parts, task.frozen)
        follow = task.stage.batch_statistics
        follow = getattr(recipe.model, "start", None) is None if follow is None else follow
        self._frozen_norms = frozen_norms(module, all_norms=not follow)
        if processes() > 1:
            synchronised(module)
        self.averaging = None if task.stage.average is None else Averaging(module, task.stage.average)
        sources = sources_of(task, "validation")
        validation: Any = InOrder(sources, task.prepare) if sources else None
        callbacks = [MetricsFile(folder), Results(folder), _ClippingAtFirst(task.stage.optimiser)]
        bad_samples = BadSamples(
            folder,
            [*source.sources, *sources],
            refuse=recipe.bad_samples == "refuse",
            limit=recipe.bad_samples_limit,
        )
        of_a_step = task.stage.batch * task.stage.accumulate * processes()
        steps = len(source) // of_a_step
        self._epoch_steps = sum(map(len, source.sources)) / of_a_step  # of all samples of all sources
        super().__init__(
            module,
            training_arguments(recipe, task.stage, folder, steps=steps, seed=seed),
            data_collator=_Collate(task),
            train_dataset=source,
            eval_dataset=validation,
            callbacks=[bad_samples, *filter(None, [self.averaging]), _Sealing(), *callbacks],
            optimizer_cls_and_kwargs=optimiser_class(task.stage.optimiser),
        )
        self.bad_samples = bad_samples
        self.task, self.stage = task, task.stage
        if self.args.fsdp:
            self._shard(module)
        self.model_accepts_loss_kwargs = False  # what Trainer counts is one number, and labels only
        self._validated = -1  # the last step at which it was
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | int] = {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser by its name, over the stage's parameter groups."""
        if self.optimizer is None:  # type: ignore[has-type]
            named = self.optimizer_cls_and_kwargs
            kind, arguments = named or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimiser_groups(self.model, self.parts, self.stage.optimiser)
            self.optimizer = kind(groups, **arguments)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _shard(self, module: nn.Module) -> None:
        """Raises ValueError where accelerate would train whole copies, and not say so, and for what processes
        would do unequally often, or on whole weights.
        """
        for field in ("validation", "average"):
            if getattr(self.task.stage, field):
                raise ValueError(
                    f"stages.{self.task.stage.name}.{field} wants whole weights in every process, which fsdp "
                    "does not leave there: leave one of both out"
                )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            raise ValueError(
                f"stages.{self.stage.name}.trainer.fsdp: weights are sharded over GPUs, one a process; "
                "here it would have no effect: leave it out"
            )
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = sharding_units(module)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's schedule, one of ours or by its name in transformers."""
        schedule = self.stage.schedule
        if schedule.name not in SCHEDULES:
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except (TypeError, ValueError) as error:
                where = f"stages.{self.stage.name}.schedule.arguments"
                raise ValueError(f"{where}, of {schedule.name}: {one_line(error)}") from None
        if self.lr_scheduler is None:  # type: ignore[has-type]
            run = Run(
                steps=num_training_steps,
                epoch_steps=self._epoch_steps,
                warmup=schedule.warmup_of(num_training_steps),
                in_epochs=self.stage.epochs is not None,
            )
            ours = checked_arguments(schedule.name, schedule.arguments)
            self.lr_scheduler = build_schedule(optimizer or self.optimizer, ours, run)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The task's order, the same in every process and after a resume, or that of the mixture, which is
        shuffled.
        """
        batches = self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = self.task.order(self.train_dataset, batches=batches, seed=seed)
        return range(len(self.train_dataset)) if order is None else order

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one step; and what each loss is a mean over in all of them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            bad = batch.pop(BAD)
            self.bad_samples.add(bad, step=self.state.global_step + 1)
            if not batch:
                self.bad_samples.write()
                raise ValueError(
                    f"no sample of a source can be used; the first, {bad[0].where}: {bad[0].reason}"
                )
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(self.task.counts(batch))
        here = torch.tensor([float(counts[name]) for name in self.task.losses], device=device)
        everywhere = self.accelerator.gather(here).view(-1, len(here)).sum(0)
        return batches, dict(zip(self.task.losses, everywhere, strict=True))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: dict[str, Tensor] | None = None,
    ) -> Any:
        """The weighted sum of the stage's losses: as the part of a step that `num_items_in_batch` counts."""
        for norm in self._frozen_norms:
            norm.eval()
        losses, counts = model(**inputs), self.task.counts(inputs)
        total = 0.0
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach() * counts[name]
            self._counts[name] = self._counts.get(name, 0) + counts[name]
            if num_items_in_batch is not None:
                # Trainer divides by the number of batches, and processes average their gradients.
                parts = self.current_gradient_accumulation_steps * self.args.world_size
                loss = loss * (parts * counts[name] / num_items_in_batch[name].clamp(min=1))
            total = total + self.task.losses[name] * loss
        return (total, None) if return_outputs else total

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What the stage is watched by on its validation data: means of losses and scores, or the scores of a
        task that examines its model. The weights of the smallest loss, or of the largest score, are kept in
        `best`.
        """
        examination = self.task.examination(self._judged)
        if examination is None:
            metrics, judged_by, sign = self._means_of_validation(), "eval_loss", -1
        else:
            metrics, judged_by, sign = self._scores(examination), f"eval_{examination.best}", 1
        super().log(metrics)
        for bar in progress_bars(self):
            bar.set_postfix({judged_by.removeprefix("eval_"): f"{metrics[judged_by]:.4g}"})
        self._validated = self.state.global_step
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        best = self.state.best_metric
        if best is None or math.isnan(best) or sign * metrics[judged_by] > sign * best:
            self.state.best_metric = metrics[judged_by]
            self.state.best_global_step = self.state.global_step
            self._keep(Path(self.args.output_dir) / BEST)
        self._stop_early()
        return metrics

    @property
    def _judged(self) -> nn.Module:
        """What is scored and kept: the module, or the average of its weights."""
        if self.averaging is None or not self.averaging.settings.use:
            module: nn.Module = self.model
            return module
        return self.averaging.model

    def _stop_early(self) -> None:
        """Ends the stage where it has become no better for as many validations as it has patience."""
        waited = (self.state.global_step - (self.state.best_global_step or 0)) / self.args.eval_steps
        if self.stage.patience is not None and waited >= self.stage.patience:
            self.control.should_training_stop = True

    def _scores(self, examination: Examination) -> dict[str, float]:
        """Every process looks at every n-th batch of images, and all know the scores."""
        model = self._judged
        was_training = model.training
        model.eval()
        places, batch = range(len(examination)), self.stage.batch
        rank, count = self.args.process_index, self.args.world_size
        found: dict[int, Any] = {}
        behind = len(self.train_dataset.sources)  # by which the numbers of validation sources are larger
        for start in range(rank * batch, len(places), batch * count):
            of_batch, bad = examination.found(places[start : start + batch])
            found |= of_batch
            bad = [sample._replace(source=sample.source + behind) for sample in bad]
            self.bad_samples.add(bad, step=self.state.global_step)
        model.train(was_training)
        for others in gather_object([found]):
            found |= others
        if not found:
            raise ValueError(f"stages.{self.stage.name}.validation has no image that can be used")
        return {
            f"eval_{name}": value for name, value in examination.scores(dict(sorted(found.items()))).items()
        }

    def _means_of_validation(self) -> dict[str, float]:
        means = self._validation_means()
        metrics = {f"eval_loss_{name}": means[name] for name in self.task.losses}
        metrics["eval_loss"] = sum(weight * means[name] for name, weight in self.task.losses.items())
        return metrics | {f"eval_{name}": means[name] for name in self.task.scores}

    @torch.no_grad()
    def _validation_means(self) -> dict[str, float]:
        """Every process takes every n-th batch, so that no sample counts twice."""
        assert self.eval_dataset is not None
        rank, processes = self.args.process_index, self.args.world_size
        places = range(len(self.eval_dataset))
        behind = len(self.train_dataset.sources)  # by which the numbers of validation sources are larger
        batches = [places[i : i + self.stage.batch] for i in places[:: self.stage.batch]][rank::processes]
        names = [*self.task.losses, *self.task.scores]
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.args.device)
        model = self._judged
        was_training = model.training
        model.eval()
        for batch in batches:
            drawn = [self.eval_dataset[i] for i in batch]
            bad = [bad._replace(source=bad.source + behind) for sample in drawn for bad in sample.bad]
            self.bad_samples.add(bad, step=self.state.global_step)
            good = [sample.sample for sample in drawn if sample.sample is not None]
            if not good:
                continue
            inputs = self._prepare_inputs(self.task.collate(good))
            counts = self.task.counts(inputs)
            with self.accelerator.autocast():
                means = model(**inputs)
            for total, name in zip(totals, names, strict=True):
                total += torch.stack([means[name] * counts[name], torch.as_tensor(counts[name]).to(total)])
        model.train(was_training)
        totals = self.accelerator.reduce(totals)
        if not totals[:, 1].any():
            raise ValueError(f"stages.{self.stage.name}.validation has no sample that can be used")
        return {
            name: float(total / count.clamp(min=1))
            for name, (total, count) in zip(names, totals, strict=True)
        }

    def _keep(self, folder: Path) -> None:
        """The weights of now, there as a whole or not at all; an older folder is replaced."""
        self._write(self._judged, folder)

    def _write(self, module: nn.Module, folder: Path) -> None:
        part = folder.with_name(f"{folder.name}.part")
        if module is self.model:
            self.save_model(str(part))
        elif self.is_world_process_zero():
            part.mkdir(parents=True, exist_ok=True)
            save_model(module, part / SAFE_WEIGHTS_NAME)
        if self.is_world_process_zero():
            put(part, folder)
        self.accelerator.wait_for_everyone()

    def finish(self, folder: Path) -> None:
        """Leaves the stage's weights, the best or the last, in `folder`; and both where they differ."""
        best = Path(self.args.output_dir) / BEST
        if self.averaging is not None and not self.averaging.settings.use:
            self._write(self.averaging.model, folder.with_name("average"))
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
        self.state.epoch = self.state.global_step / self._epoch_steps  # Trainer's is the share of the stage
        super().log(logs, start_time)
