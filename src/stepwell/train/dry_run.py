"""What a recipe would train, before it does: parts, where they start, rates, tokens, memory, the first
sample.

Models are built on the meta device: nothing is loaded, and a language model of billions costs nothing here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from stepwell.flops.memory import peak_bytes
from stepwell.flops.text import aligned
from stepwell.folders import one_line
from stepwell.language.labels import IGNORE
from stepwell.models.adapters import add_adapters
from stepwell.models.config import StepwellConfig
from stepwell.models.published.papers import LANGUAGE_MODELS, find_published
from stepwell.structures import TokenLayout
from stepwell.train.arguments import check_arguments
from stepwell.train.chat import ChatTask, ChatTraining, longest_sample, wanted_adapters
from stepwell.train.groups import freeze_all_but, optimiser_groups, part_of
from stepwell.train.processes import processes
from stepwell.train.recipe import Recipe, Stage, load_recipe
from stepwell.train.run import check_stage, weights_of
from stepwell.train.tasks import find_task, where

__all__ = ["dry_run"]

_PART = re.compile(r"vision\.branches\.\d+|vision\.[^.]+|[^.]+")
_GIB = 2**30
_OPEN, _CLOSE = ">>>", "<<<"  # around what is supervised


class _Plan(NamedTuple):
    """A stage, its model without weights, and its task where all that it needs is on this machine."""

    stage: Any
    task: Any
    module: Any
    parts: Mapping[str, str]
    missing: str = ""  # what is not, and what is told in its place


def dry_run(recipe: str | Path, overrides: Sequence[str] = ()) -> str:
    """What `train` would do with these arguments, as text. Nothing is written; configurations and tokenizers
    are all that is fetched from the hub.

    Raises ValueError for a wrong recipe, as `train` does. Files and hub names that are not on this machine
    are named in the text, and what can be told without them is.
    """
    settings = load_recipe(recipe, overrides)
    texts = [_heading(settings)]
    for number, stage in enumerate(settings.stages):
        plan = _planned(settings, stage)
        if number == 0:
            texts.append(_model_table(settings, plan))
        texts.append("\n".join(_stage_text(settings, plan)))
    return "\n\n".join(texts)


def _planned(settings: Recipe, stage: Stage) -> _Plan:
    kind: Any = find_task(settings.task)
    try:
        task = kind(settings, stage)
    except OSError as error:
        return _without_files(kind, settings, stage, error)
    return _of_task(settings, stage, task)


def _of_task(settings: Recipe, stage: Any, task: Any, missing: str = "") -> _Plan:
    module = check_stage(settings, task)
    return _Plan(stage, task, module, task.parts(module), missing)


def _without_files(kind: Any, settings: Recipe, stage: Any, error: OSError) -> _Plan:
    """Of a published model, whose sizes are known although its language model, or its data, are not here.
    Raises the error where they are not known.
    """
    model: Any = settings.model
    if issubclass(kind, ChatTask):
        name = model.parts.get("language", "")
        text = LANGUAGE_MODELS.get(name)
        if text is None:
            raise error
        config = StepwellConfig(
            vision_config=model.vision.adjusted(stage.vision),
            text_config=AutoConfig.for_model(**text),
            image_token_id=text["vocab_size"],
            template=model.template,
        )
        with torch.device("meta"):
            module = ChatTraining(config)
            if model.lora is not None:
                add_adapters(module, wanted_adapters(module, settings))
        freeze_all_but(module, stage.train, module.parts)
        check_arguments(settings, stage)
        return _Plan(
            stage, None, module, module.parts, f"{name} is not on this machine: sizes are the published"
        )
    published = find_published(getattr(model, "published", None) or "")
    if published is None or model.classes:
        raise error
    count = len(published.classes) or published.num_classes or kind.fewest
    classes = published.classes or tuple(f"class {number}" for number in range(count))
    known = settings.model_copy(update={"model": model.model_copy(update={"classes": classes})})
    missing = f"{one_line(error)}: the model has {count} classes, as published"
    return _of_task(known, stage, kind(known, stage), missing)


def _heading(settings: Recipe) -> str:
    precision = "bf16 products, float32 weights" if settings.bf16 else "float32"
    return (
        f"recipe {settings.name}, task {settings.task}: {len(settings.stages)} stages into "
        f"{settings.output / settings.name}\n"
        f"{processes()} processes, seed {settings.seed}, {precision}; nothing is trained now"
    )


def _model_table(settings: Recipe, plan: _Plan) -> str:
    sources = _sources(settings)
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in plan.module.named_parameters():
        counts[_part(name, plan.parts)] += parameter.numel()
    rows = [[part, f"{count / 1e6:.2f}", _start(part, sources)] for part, count in counts.items()]
    rows.append(["all", f"{sum(counts.values()) / 1e6:.2f}", ""])
    text = aligned(["part", "parameters M", "starts from"], rows)
    unread = sorted(part for part in sources if part and not any(_within(name, part) for name in counts))
    for part in unread:
        text += f"\n{part} starts from {sources[part]}"
    if plan.missing:
        text += f"\n{plan.missing}"
    return text


def _sources(settings: Recipe) -> dict[str, str]:
    """Of parts; of all of the model under ""."""
    model = settings.model
    if (start := getattr(model, "start", None)) is not None:
        return {"": str(start)}
    return dict(model.sources if hasattr(model, "sources") else getattr(model, "parts", {}))


def _start(part: str, sources: Mapping[str, str]) -> str:
    """Of the source that fills all of a part."""
    fitting = [name for name in sources if not name or _within(part, name)]
    return sources[max(fitting, key=len)] if fitting else "random weights"


def _within(part: str, other: str) -> bool:
    return part == other or part.startswith(f"{other}.")


def _part(name: str, parts: Mapping[str, str]) -> str:
    match = _PART.match(part_of(name, parts))
    assert match is not None
    return match[0]


def _stage_text(settings: Recipe, plan: _Plan) -> list[str]:
    stage = plan.stage
    weights_of(stage)
    lengths = _lengths(plan, stage.data)
    lines = [f"stage {stage.name}: {_how_long(stage, lengths)}", _learning_table(plan)]
    for data, length in zip(stage.data, lengths, strict=True):
        what = " ".join(
            f"{name}={value}" for name, value in data.model_dump(exclude_none=True, mode="json").items()
        )
        lines.append(f"data: {what}: {_told(length)}")
    for data, length in zip(stage.validation, _lengths(plan, stage.validation), strict=True):
        lines.append(f"validation: {where(data)}: {_told(length)}")
    is_assistant = hasattr(plan.module, "model") and hasattr(plan.module.model, "vision")
    if is_assistant:
        lines += _assistant_text(settings, plan)
    return lines


def _told(length: int | str) -> str:
    return f"{length:,} samples" if isinstance(length, int) else length


def _lengths(plan: _Plan, entries: Sequence[Any]) -> list[int | str]:
    """Of data: samples, or why there are none."""
    lengths: list[int | str] = []
    for data in entries:
        try:
            path = getattr(data, "path", None)
            if plan.task is None:
                lengths.append("here" if path is None or Path(path).exists() else "not on this machine")
            else:
                lengths.append(len(plan.task.source(data)))
        except (OSError, ValueError) as error:
            lengths.append(one_line(error))
    return lengths


def _how_long(stage: Any, lengths: Sequence[int | str]) -> str:
    of_a_step = stage.batch * stage.accumulate * processes()
    step = f"of {of_a_step} samples ({stage.batch} x {stage.accumulate} x {processes()} processes)"
    rates = f"rates by {stage.schedule.name}"
    if stage.steps is not None:
        warmup = stage.schedule.warmup_of(stage.steps)
        return f"{stage.steps:,} steps {step}, {rates} behind {warmup} of warm-up"
    known = [length for length in lengths if isinstance(length, int)]
    if len(known) < len(lengths):
        return f"{stage.epochs:g} epochs, steps {step}, {rates}"
    steps = math.ceil(stage.epochs * sum(known) / of_a_step)
    behind = f"behind {stage.schedule.warmup_of(steps)} of warm-up"
    return f"{stage.epochs:g} epochs, {steps:,} steps {step}, {rates} {behind}"


def _learning_table(plan: _Plan) -> str:
    groups = optimiser_groups(plan.module, plan.parts, plan.stage.optimiser)
    settings = {id(parameter): group for group in groups for parameter in group["params"]}
    learning: dict[str, list[tuple[int, dict[str, Any] | None]]] = defaultdict(list)
    for name, parameter in plan.module.named_parameters():
        learning[_part(name, plan.parts)].append((parameter.numel(), settings.get(id(parameter))))
    rows = []
    for part, parameters in learning.items():
        moving = [(count, group) for count, group in parameters if group is not None]
        learns, all_of_it = (sum(count for count, _ in some) / 1e6 for some in (moving, parameters))
        rates = sorted({group["lr"] for _, group in moving})
        decays = sorted({group["weight_decay"] for _, group in moving})
        rows.append(
            [
                part,
                f"{learns:.2f} of {all_of_it:.2f}",
                _range(rates) if moving else "frozen",
                _range(decays) if moving else "",
            ]
        )
    return aligned(["part", "learning M", "rate", "weight decay"], rows)


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _assistant_text(settings: Recipe, plan: _Plan) -> list[str]:
    """Tokens, memory and the first sample."""
    config = plan.module.config
    side = config.vision.largest
    layout = plan.module.model.vision.geometry.layout((side, side))
    tokens = f"an image of {side} x {side} gives {layout.num_visual} visual tokens"
    length, row = longest_sample(plan.stage, config.text_config), None
    lines = [f"{tokens}; a sample has at most {length} tokens"]
    if plan.task is not None:
        try:
            source = plan.task.source(plan.stage.data[0])
            if not len(source):
                raise ValueError("there is none")
            prepared = plan.task.prepare(source[0])
            row = getattr(prepared, "example", prepared).row
            length = len(row.ids)
            learned = int((row.labels != IGNORE).sum())
            lines.append(f"the first sample has {length} tokens, of which {learned} are supervised")
        except Exception as error:  # of a sample anything may be wrong, and be told by any library
            lines.append(f"the first sample cannot be used: {one_line(error)}")
    lines.append(_memory_text(settings, plan, layout, length))
    if row is not None and plan.task is not None:
        lines += ["the first sample, what is supervised between >>> and <<<:", _rendered(row, plan.task)]
    return lines


def _memory_text(settings: Recipe, plan: _Plan, layout: TokenLayout, length: int) -> str:
    needed = _memory(settings, plan, layout, length)
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed.items())
    return (
        f"memory of a process, estimated for a batch of {plan.stage.batch} images of this size in samples of "
        f"{max(length, layout.num_visual + 1)} tokens: {sum(needed.values()) / _GIB:.2f} GiB ({parts})"
    )


def _memory(settings: Recipe, plan: _Plan, layout: TokenLayout, length: int) -> dict[str, int]:
    """Bytes of weights, states of an optimiser as Adam, and what a step holds at most; without what libraries
    and allocators take for themselves.
    """
    parameters = list(plan.module.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    if plan.stage.trainer.get("gradient_checkpointing"):
        enable = getattr(plan.module, "activation_checkpointing_enable", None)  # its name since version 5.2x
        (enable or plan.module.gradient_checkpointing_enable)()
    module = plan.module.train()
    half = settings.bf16
    if half:
        module.bfloat16()
    packed = plan.stage.packed
    step = peak_bytes(lambda: _loss(module, layout, plan.stage.batch, length, packed=packed))
    if half:
        step += 2 * weights + 2 * learning  # the weights' copies, and gradients in single precision
        module.float()
    needed = {"weights": 4 * weights, "optimiser": 8 * learning, "gradients and activations": step}
    if plan.stage.average is not None:
        needed["average"] = 4 * weights
    return needed


def _loss(module: Any, layout: TokenLayout, batch: int, length: int, *, packed: bool) -> Tensor:
    """Of a batch of samples of one image each, whose text is supervised."""
    weight = module.get_input_embeddings().weight
    inputs = [weight.new_empty(3, *size) for _ in range(batch) for size in layout.inputs]
    visual = torch.stack(module.model.vision(inputs, [layout] * batch))
    words = max(length - visual.shape[1], 1)
    text = F.embedding(torch.zeros(batch, words, dtype=torch.long, device="meta"), weight)
    samples = torch.cat([visual, text], 1)
    embeddings = samples.flatten(0, 1)[None] if packed else samples
    total = embeddings.shape[1]
    # A mask of four dimensions is taken as it is; any other is looked into, which the meta device cannot.
    mask = torch.ones(1, 1, total, total, dtype=torch.bool, device="meta")
    hidden = module.model.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    logits = module.lm_head(hidden.last_hidden_state.view_as(samples)[:, -words:]).float()
    wanted = torch.zeros(batch * words, dtype=torch.long, device="meta")
    return F.cross_entropy(logits.flatten(0, 1), wanted)


def _rendered(row: Any, task: Any) -> str:
    """The ids of a row as text, runs of placeholders told by their number."""
    tokenizer = task.collator.processor.tokenizer
    placeholder = task.collator.processor.image_token_id
    text, is_open = "", False
    run: list[int] = []

    def told() -> str:
        return str(tokenizer.decode(run)) if run else ""

    images = 0
    for token, label in zip(row.ids.tolist(), row.labels.tolist(), strict=True):
        if images and token != placeholder:
            text += f"<image: {images} tokens>"
            images = 0
        if token == placeholder:
            text += told()
            run, images = [], images + 1
            continue
        if (label != IGNORE) != is_open:
            text += told() + (_CLOSE if is_open else _OPEN)
            run, is_open = [], not is_open
        run.append(token)
    return text + told() + (_CLOSE if is_open else "")
