"""A recipe from start to finish: stage after stage through transformers' Trainer, then the model as a folder.

Finished stages are kept as folders and taken up again, an unfinished one continues at its last checkpoint.
Heads and losses that only serve training never reach the final folder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from stepwell.data.sample import Source
from stepwell.language.labels import IGNORE
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.processor import StepwellProcessor
from stepwell.models.vision import build_geometry
from stepwell.train.collate import Collator
from stepwell.train.groups import freeze_all_but
from stepwell.train.line_head import LineHead, frame_loss
from stepwell.train.pointer import tap_attention
from stepwell.train.recipe import Recipe, Stage, load_recipe
from stepwell.train.stages import build_model, build_optimiser, build_sources, embedding_of, resized

__all__ = ["StageTrainer", "stage_losses", "train"]

_logger = logging.getLogger(__name__)


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains what a recipe (a shipped name or a path) describes; overrides read "a.b=c".

    Returns the folder of the finished model, output/name/model. Raises ValueError of one line for a wrong
    recipe, FileNotFoundError for data that is not there, ImportError where the [train] extra is missing.
    """
    settings = load_recipe(recipe, overrides)
    _require_accelerate()
    folder = settings.output / settings.name
    set_seed(settings.seed)
    model, processor = build_model(settings.model)
    if any(stage.auxiliary.frames for stage in settings.stages):
        model.add_module("line_head", LineHead(embedding_of(model).embedding_dim))
    sources = [build_sources(stage, seed=settings.seed + i) for i, stage in enumerate(settings.stages)]
    for i, (stage, source) in enumerate(zip(settings.stages, sources, strict=True)):
        stage_folder = folder / f"{i + 1}_{stage.name}"
        _run_stage(model, processor, settings, stage, source, stage_folder, seed=settings.seed + i)
    if hasattr(model, "line_head"):
        del model.line_head
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.to(getattr(torch, settings.save_dtype)).save_pretrained(folder / "model")
    # Stored small, computed in full: in half precision the answers of a batch may differ from single ones.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def _run_stage(
    model: StepwellForConditionalGeneration,
    processor: StepwellProcessor,
    recipe: Recipe,
    stage: Stage,
    source: Source,
    folder: Path,
    *,
    seed: int,
) -> None:
    finished = folder / "finished" / "model.safetensors"
    if recipe.resume and finished.is_file():
        _logger.info("stage %s is finished already", stage.name)
        load_model(model, finished)
        return
    freeze_all_but(model, (*stage.train, *(["line_head"] if stage.auxiliary.frames else [])))
    settings = resized(model.config.vision, stage.sizes)
    vision: Any = model.model.vision
    whole, vision.geometry = vision.geometry, build_geometry(settings)
    collator = Collator(
        _looking_at(processor, settings),
        max_length=stage.max_length,
        turns=stage.turns,
        frame_step=stage.auxiliary.frame_step if stage.auxiliary.frames else None,
    )
    trainer = StageTrainer(model, recipe, stage, source, collator, folder, seed=seed)
    last = get_last_checkpoint(str(folder)) if recipe.resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    vision.geometry = whole
    model.save_pretrained(folder / "finished")


def _looking_at(processor: StepwellProcessor, vision: Any) -> StepwellProcessor:
    """The same processor for views of other sizes."""
    return StepwellProcessor(
        type(processor.image_processor)(vision),
        processor.tokenizer,
        template=processor.template,
    )


class StageTrainer(Trainer):
    """transformers' Trainer with a stage's parameter groups and its auxiliary losses, each logged under its
    name.
    """

    def __init__(
        self,
        model: StepwellForConditionalGeneration,
        recipe: Recipe,
        stage: Stage,
        source: Source,
        collator: Collator,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            gradient_accumulation_steps=stage.accumulate,
            max_grad_norm=stage.optimiser.max_grad_norm,
            bf16=recipe.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            logging_steps=recipe.log_steps,
            save_steps=recipe.save_steps,
            save_total_limit=1,
            dataloader_num_workers=recipe.workers,
            dataloader_prefetch_factor=8 if recipe.workers else None,
            remove_unused_columns=False,
            report_to="none",
        )
        optimisers = build_optimiser(model, stage.optimiser, steps=stage.steps)
        super().__init__(
            model, arguments, data_collator=collator, train_dataset=source, optimizers=optimisers
        )
        self.stage = stage
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, accumulated as means
        self._sums: dict[str, Tensor] = {}
        self._counted = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the stage's losses."""
        weights = {
            "language": 1.0,
            "frames": self.stage.auxiliary.frames,
            "pointer": self.stage.auxiliary.pointer,
        }
        losses = stage_losses(self.accelerator.unwrap_model(model), inputs, self.stage)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + loss.detach().cpu()
        self._counted += 1
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return (total, None) if return_outputs else total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last time."""
        if self._counted:
            logs |= {
                f"loss_{name}": round(float(sum_ / self._counted), 4) for name, sum_ in self._sums.items()
            }
            self._sums, self._counted = {}, 0
        super().log(logs, start_time)


def stage_losses(model: Any, batch: dict[str, Any], stage: Stage) -> dict[str, Tensor]:
    """The losses of one batch of a Collator by name: "language", "frames", "pointer", those that the stage
    has.
    """
    pictures = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    losses: dict[str, Tensor] = {}
    if stage.language_loss:
        labels = batch["labels"][:, 1:]
        kept = (labels != IGNORE).any(0).nonzero()[:, 0]  # logits of the other positions are never made
        # in one conversation no mask is needed: padding stands right of all that a causal model looks at
        layers = model.model.language_model.layers if stage.auxiliary.pointer else []
        with tap_attention([layers[i] for i in stage.auxiliary.pointer_layers] if layers else []) as tap:
            text = {
                name: batch[name] for name in ("position_ids", "attention_mask") if "position_ids" in batch
            }
            output = model(batch["input_ids"], **text, **pictures, logits_to_keep=kept, use_cache=False)
        losses["language"] = F.cross_entropy(
            output.logits.float().flatten(0, 1), labels[:, kept].flatten(), ignore_index=IGNORE
        )
        if stage.auxiliary.pointer:
            losses["pointer"] = tap.loss(batch["pointers"], head=stage.auxiliary.pointer_head)
        features = output.image_hidden_states
    else:
        features = torch.cat(model.get_image_features(**pictures))
    if stage.auxiliary.frames and batch["frames"]:
        tokens = features.split([rows * cols for rows, cols in batch["grids"]])
        found = [
            frame_loss(model.line_head, visual, grid, frames)
            for visual, grid, frames in zip(tokens, batch["grids"], batch["frames"], strict=True)
            if len(frames.classes)
        ]
        losses["frames"] = torch.stack(found).mean() if found else features.sum() * 0.0
    return losses


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'stepwell[train]'") from error
