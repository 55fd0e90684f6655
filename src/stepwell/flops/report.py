"""What a model of ours costs, part by part: built on the meta device and counted twice (flops/count.py).

As the papers count: `Part.macs`, in the convention of the tables that such a model would stand in. In truth:
`Part.flops`. A language model is charged for reading the visual tokens of one picture, its attention whole,
as if it were not causal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from stepwell.flops.cost import CONVENTIONS
from stepwell.flops.count import Part, count
from stepwell.flops.outlines import outlines
from stepwell.flops.pyramid import PyramidCost, as_counted
from stepwell.flops.shapes import shape_of
from stepwell.flops.text import aligned
from stepwell.models.piip import PyramidClassifier, PyramidFeatures
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.models.settings import ClassifierSettings, DenseSettings, PiipConfig, PlainConfig, VisionConfig
from stepwell.models.vision import build_classifier, build_features, build_vision
from stepwell.structures import Size, TokenLayout
from stepwell.views.pyramid import scaled_size

if TYPE_CHECKING:  # transformers takes longer to import than a pyramid to count: only assistants wait for it
    from stepwell.models.config import StepwellConfig

__all__ = ["Report", "Subject", "find_subject", "report", "report_as_json", "report_as_table"]

Subject: TypeAlias = "StepwellConfig | VisionConfig | DenseSettings | ClassifierSettings"
"""What can be counted: an assistant, a vision system alone, a dense backbone, a classifier."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sizes are (height, width): of the picture, and of the views, branch 1 first.

    tokens: visual tokens, None where no text follows. printed_gflops: what PIIP's tables print for such a
    model, and `printed_why` it is not `gmacs`; None where it is.
    """

    size: Size
    views: tuple[Size, ...]
    convention: str
    tokens: int | None
    parts: tuple[Part, ...]
    printed_gflops: float | None = None
    printed_why: str = ""

    @property
    def gmacs(self) -> float:
        """As the papers count, in 1e9."""
        return sum(part.macs or 0 for part in self.parts) / 1e9

    @property
    def gflops(self) -> float:
        """In truth, in 1e9."""
        return sum(part.flops for part in self.parts) / 1e9

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)


def find_subject(name: str) -> Subject:
    """A folder with a config.json of ours, or a name of models/published. Raises ValueError otherwise."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return _subject_in(folder)
    published = find_published(name)
    if published is None:
        raise ValueError(
            f"unknown model {name!r}: no folder with a config.json, no recipe, and none of the published "
            f"configurations, such as {next(iter(PUBLISHED))}"
        )
    return published.settings


def _subject_in(folder: Path) -> Subject:
    from stepwell.models.config import StepwellConfig
    from stepwell.models.perception import PyramidBackboneConfig, PyramidClassifierConfig

    kinds = {kind.model_type: kind for kind in (PyramidBackboneConfig, PyramidClassifierConfig)}
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == StepwellConfig.model_type:
        config: StepwellConfig = StepwellConfig.from_pretrained(folder)
        return config
    if kind not in kinds:
        ours = ", ".join([StepwellConfig.model_type, *kinds])
        raise ValueError(f"{folder} holds a {kind!r} model, not one of ours ({ours})")
    settings: DenseSettings | ClassifierSettings = kinds[kind].from_pretrained(folder).settings
    return settings


def report(subject: Subject, *, size: Size | None = None, out_dim: int = 4096) -> Report:
    """Counts one picture of `size` (height, width), by default a square as large as the largest view.

    out_dim: width of the language model, for a vision system alone. Raises ValueError for a size that the
    model cannot take.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"a picture needs at least one pixel each way, got {size[0]}x{size[1]}")
    if isinstance(subject, DenseSettings | ClassifierSettings):
        return _pyramid(subject, size)
    if isinstance(subject, PlainConfig | PiipConfig):
        return _vision(subject, size, out_dim)
    return _assistant(subject, size)


def _pyramid(settings: DenseSettings | ClassifierSettings, size: Size | None) -> Report:
    side = settings.branches[-1].size
    size = size or (side, side)
    with outlines():
        image = torch.empty(1, 3, *size)
        if isinstance(settings, ClassifierSettings):
            model: PyramidClassifier | PyramidFeatures = build_classifier(settings, num_classes=1000)
        else:
            model = build_features(settings)
    sizes = tuple(scaled_size(size, ratio) for ratio in model.ratios)
    return Report(
        size=size,
        views=sizes,
        convention="A" if isinstance(settings, ClassifierSettings) else "D",
        tokens=None,
        parts=tuple(count(model.eval(), partial(model, image), CONVENTIONS["D"])),
        printed_gflops=_as_printed(settings, sizes),
        printed_why="they count a classifier's merging and head in place of the detector's",
    )


def _as_printed(settings: DenseSettings | ClassifierSettings, sizes: tuple[Size, ...]) -> float | None:
    """What Tables I, IV, VI and XIV to XVII print for a dense pyramid: its classifier's cost, not its own."""
    if not isinstance(settings, DenseSettings) or settings.merge != "dense" or settings.merge_branches:
        return None
    branches = [as_counted(branch, "A") for branch in settings.branches]
    cost = PyramidCost(branches, settings.interaction, CONVENTIONS["A"], merge="linear", num_classes=1000)
    return cost.cost(sizes).macs / 1e9


def _vision(config: PlainConfig | PiipConfig, size: Size | None, out_dim: int) -> Report:
    with outlines():
        vision = build_vision(config, out_dim=out_dim)
    layout = vision.layout(size or _square(config))
    return _read(vision, partial(vision, _inputs(layout)), layout, config)


def _assistant(config: StepwellConfig, size: Size | None) -> Report:
    from stepwell.models.assistant import StepwellForConditionalGeneration

    with outlines():
        model = StepwellForConditionalGeneration(config)
    vision, language = model.model.vision, model.model.language_model
    layout = vision.layout(size or _square(config.vision))

    # A mask of four dimensions is taken as it is; any other is looked into, which the meta device cannot.
    mask = torch.ones(1, 1, layout.num_tokens, layout.num_tokens, dtype=torch.bool, device="meta")

    def read() -> None:
        tokens = vision(_inputs(layout)).tokens
        hidden = language(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, -1:])

    return _read(model, read, layout, config.vision)


def _square(config: VisionConfig) -> Size:
    side = config.size if isinstance(config, PlainConfig) else config.sizes[-1]
    return side, side


def _inputs(layout: TokenLayout) -> list[Tensor]:
    return [torch.empty(1, 3, *size, device="meta") for size in layout.inputs]


def _read(model: nn.Module, run: Callable[[], object], layout: TokenLayout, config: VisionConfig) -> Report:
    printed = None
    if isinstance(config, PlainConfig) and config.select_layer != -1:
        shape = shape_of(config.encoder, config.arguments)
        printed = shape.cost(layout.inputs[0], CONVENTIONS["L"]).macs / 1e9
    return Report(
        size=layout.image_size,
        views=tuple(view.size for view in layout.views),
        convention="L",
        tokens=layout.num_tokens,
        parts=tuple(count(model.eval(), run, CONVENTIONS["L"])),
        printed_gflops=printed,
        printed_why="they count all layers, also those behind the one that is read",
    )


# ---- how reports are shown --------------------------------------------------------------------------------


def report_as_table(found: Report) -> str:
    rows = [
        [
            part.name,
            "-" if part.macs is None else f"{part.macs / 1e9:.2f}",
            f"{part.flops / 1e9:.2f}",
            f"{part.params / 1e6:.2f}",
        ]
        for part in found.parts
    ]
    rows.append(["total", f"{found.gmacs:.2f}", f"{found.gflops:.2f}", f"{found.params / 1e6:.2f}"])
    heads = ["part", f"GFLOPs as papers count ({found.convention})", "GFLOPs in truth", "params M"]
    views = ", ".join(f"{height}x{width}" for height, width in found.views)
    lines = [f"picture {found.size[0]}x{found.size[1]}, views {views} (height x width)"]
    lines += ["", aligned(heads, rows), ""]
    if found.tokens is not None:
        lines.append(f"{found.tokens} visual tokens, read once by the language model where there is one")
    if found.printed_gflops is not None:
        lines.append(
            f"{found.printed_gflops:.2f} GFLOPs as PIIP's tables print it: with a classifier's merging"
        )
    return "\n".join(lines).rstrip()


def report_as_json(found: Report) -> str:
    """One object; sizes are [height, width]; paper_gflops are 1e9 multiply-accumulates."""
    entry = {
        "size": found.size,
        "views": found.views,
        "convention": found.convention,
        "visual_tokens": found.tokens,
        "paper_gflops": found.gmacs,
        "printed_gflops": found.printed_gflops,
        "true_gflops": found.gflops,
        "params_M": found.params / 1e6,
        "parts": [
            {
                "name": part.name,
                "paper_gflops": None if part.macs is None else part.macs / 1e9,
                "true_gflops": part.flops / 1e9,
                "params_M": part.params / 1e6,
            }
            for part in found.parts
        ],
    }
    return json.dumps(entry, indent=2)
