"""What a model of ours costs, part by part: built on the meta device and counted twice (flops/count.py).

As the papers count: `Part.macs`, in the convention of the tables that such a model would stand in. In truth:
`Part.flops`. A language model is charged for reading the visual tokens of one image and what separates them
(a text as one token), its attention whole, as if it were not causal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from stepwell.encoders.catalogue import ENCODERS
from stepwell.encoders.vit import VisionTransformer
from stepwell.flops.count import PADS_TOKENS, Convention, Part, count, paper_macs
from stepwell.flops.outlines import outlines
from stepwell.flops.text import aligned
from stepwell.folders import SHIPPED_MODELS
from stepwell.models.dense import ClassifierSettings, DenseSettings, PyramidClassifier, PyramidFeatures
from stepwell.models.published.papers import PUBLISHED, find_published
from stepwell.models.pyramid import BranchConfig
from stepwell.models.vision import VisionConfig, VisionSystem
from stepwell.structures import Region, Size, TokenLayout
from stepwell.views.pyramid import scaled_size

if TYPE_CHECKING:  # transformers takes longer to import than a pyramid to count: only assistants wait for it
    from transformers import PreTrainedConfig

    from stepwell.models.config import StepwellConfig

__all__ = [
    "Report",
    "Subject",
    "build_outlined",
    "find_subject",
    "report",
    "report_as_json",
    "report_as_table",
    "subject_of",
]

Subject: TypeAlias = "StepwellConfig | VisionConfig | DenseSettings | ClassifierSettings"
"""What can be counted: an assistant, a vision system alone, a dense backbone, a classifier."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sizes are (height, width): of the image, and of the views, branch 1 first.

    tokens: visual tokens, None where no text follows. printed_gflops: what PIIP's tables print for such a
    model, and `printed_why` it is not `gmacs`; None where it is.
    """

    size: Size
    views: tuple[Size, ...]
    convention: Convention
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
    """A folder with a config.json of ours, or a name of models/published; of a detector or segmenter its
    backbone. Raises ValueError otherwise.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = SHIPPED_MODELS.get(name, folder)
    if (folder / "config.json").is_file():
        return _subject_in(folder)
    published = find_published(name)
    if published is None:
        raise ValueError(
            f"unknown model {name!r}: no folder with a config.json, no recipe, and none of the published "
            f"configurations, such as {next(iter(PUBLISHED))}"
        )
    if published.text_config is None or not isinstance(published.settings, VisionConfig):
        return published.settings
    from stepwell.models.config import StepwellConfig

    return StepwellConfig(vision_config=published.settings, text_config=dict(published.text_config))


def _subject_in(folder: Path) -> Subject:
    from stepwell.models.config import StepwellConfig
    from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
    from stepwell.models.perception import PyramidBackboneConfig, PyramidClassifierConfig

    kinds = {
        kind.model_type: kind
        for kind in (
            PyramidBackboneConfig,
            PyramidClassifierConfig,
            StepwellDetectorConfig,
            StepwellSegmenterConfig,
        )
    }
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == StepwellConfig.model_type:
        config: StepwellConfig = StepwellConfig.from_pretrained(folder)
        return config
    if kind not in kinds:
        ours = ", ".join([StepwellConfig.model_type, *kinds])
        raise ValueError(f"{folder} holds a {kind!r} model, not one of ours ({ours})")
    return subject_of(kinds[kind].from_pretrained(folder), str(folder))


def subject_of(config: PreTrainedConfig, name: str) -> Subject:
    """What is counted of a model with this configuration: of a detector or segmenter its backbone.

    name: of the model, in the ValueError for a backbone that is no pyramid of ours.
    """
    from stepwell.models.config import StepwellConfig

    if isinstance(config, StepwellConfig):
        return config
    found: Any = getattr(
        config, "backbone_config", config
    )  # what a head costs depends on what there is to find
    if not hasattr(found, "settings"):
        raise ValueError(f"{name} has a {found.model_type!r} backbone; only pyramids of ours are counted")
    settings: DenseSettings | ClassifierSettings = found.settings
    return settings


def report(
    subject: Subject, *, size: Size | None = None, region: Region | None = None, out_dim: int = 4096
) -> Report:
    """Counts one image of `size` (height, width), by default a square as large as the largest view.

    region: that a vision system alone looks at closely, in pixels. out_dim: width of the language model, for
    a vision system alone. Raises ValueError for a size or region that the model cannot take.
    """
    if size is not None and min(size) < 1:
        raise ValueError(f"an image needs at least one pixel each way, got {size[0]}x{size[1]}")
    if isinstance(subject, DenseSettings | ClassifierSettings):
        return _count_pyramid(subject, size)
    if isinstance(subject, VisionConfig):
        with outlines():
            vision = subject.build(out_dim)
        layout, see = _sight(vision, subject, size, region)
        return _count_reader(vision, see, layout, subject)
    return _count_assistant(subject, size)


def build_outlined(
    settings: DenseSettings | ClassifierSettings, size: Size | None = None
) -> tuple[PyramidFeatures | PyramidClassifier, Callable[[], object]]:
    """A model without memory, with 1000 classes if it is a classifier, and what runs it on an image."""
    side = settings.image_side
    with outlines():
        image = torch.empty(1, 3, *(size or (side, side)))
        if isinstance(settings, ClassifierSettings):
            model: PyramidFeatures | PyramidClassifier = settings.build(num_classes=1000)
        else:
            model = settings.build()
    return model.eval(), partial(model, image)


def _count_pyramid(settings: DenseSettings | ClassifierSettings, size: Size | None) -> Report:
    model, run = build_outlined(settings, size)
    printed = None
    if isinstance(settings, DenseSettings) and settings.merge == "dense" and not settings.merge_branches:
        branches = tuple(map(_as_classified, settings.branches))
        classifier = ClassifierSettings(
            branches=branches,
            interaction=settings.interaction,
            head="merge",
            image_branch=settings.image_branch,
        )
        printed = sum(paper_macs(*build_outlined(classifier, size), "A").values()) / 1e9
    size = size or (settings.image_side,) * 2
    convention: Convention = "A" if isinstance(settings, ClassifierSettings) else "D"
    return Report(
        size=size,
        views=tuple(scaled_size(size, ratio) for ratio in model.ratios),
        convention=convention,
        tokens=None,
        parts=tuple(count(model, run, convention)),
        printed_gflops=printed,
        printed_why="with a classifier's merging and head in place of the detector's",
    )


def _as_classified(branch: BranchConfig) -> BranchConfig:
    """The branch as the classifier had it that was counted in the detector's place."""
    entry = ENCODERS.get(branch.encoder)
    if entry is None or entry.build is not VisionTransformer or entry.family in PADS_TOKENS:
        return branch
    return replace(branch, arguments={**branch.arguments, "window_padding": "qkv"})


def _count_assistant(config: StepwellConfig, size: Size | None) -> Report:
    from stepwell.models.assistant import StepwellForConditionalGeneration

    with outlines():
        model = StepwellForConditionalGeneration(config)
    layout, see = _sight(model.model.vision, config.vision, size)
    separators = sum(len(run.ids or [run.text]) for run in layout.runs if not run.count)
    length = layout.num_visual + separators
    # A mask of four dimensions is taken as it is; any other is looked into, which the meta device cannot.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")

    def read() -> None:
        visual = see()
        tokens = torch.cat([visual, visual.new_empty(1, separators, visual.shape[-1])], 1)
        text = model.model.language_model(inputs_embeds=tokens, attention_mask=mask, use_cache=False)
        model.lm_head(text.last_hidden_state[:, -1:])

    return _count_reader(model, read, layout, config.vision)


def _sight(
    vision: VisionSystem, config: VisionConfig, size: Size | None, region: Region | None = None
) -> tuple[TokenLayout, Callable[[], Tensor]]:
    """The layout of one image of `size`, and what turns it into visual tokens (1, N, D)."""
    layout = vision.geometry.layout_of(size or (config.largest, config.largest), region)
    inputs = [torch.empty(3, *shape, device="meta") for shape in layout.inputs]
    return layout, lambda: vision(inputs, [layout])[0][None]


def _count_reader(
    model: nn.Module, run: Callable[[], object], layout: TokenLayout, config: VisionConfig
) -> Report:
    printed = None
    whole = config.as_papers_count()
    if whole != config:
        with outlines():
            vision = whole.build(out_dim=1)
        see = _sight(vision, whole, layout.image_size, layout.region)[1]
        printed = sum(paper_macs(vision, see, "L").values()) / 1e9
    return Report(
        size=layout.image_size,
        views=tuple(view.size for view in layout.views),
        convention="L",
        tokens=layout.num_visual,
        parts=tuple(count(model.eval(), run, "L")),
        printed_gflops=printed,
        printed_why="with all layers, also those behind the one that is read",
    )


# ---- how reports are shown --------------------------------------------------------------------------------


def report_as_table(report: Report) -> str:
    rows = [
        [
            part.name,
            "-" if part.macs is None else f"{part.macs / 1e9:.2f}",
            f"{part.flops / 1e9:.2f}",
            f"{part.params / 1e6:.2f}",
        ]
        for part in report.parts
    ]
    rows.append(["total", f"{report.gmacs:.2f}", f"{report.gflops:.2f}", f"{report.params / 1e6:.2f}"])
    heads = ["part", f"GFLOPs as papers count ({report.convention})", "GFLOPs in truth", "params M"]
    views = ", ".join(f"{height}x{width}" for height, width in report.views)
    lines = [f"image {report.size[0]}x{report.size[1]}, views {views} (height x width)"]
    lines += ["", aligned(heads, rows), ""]
    if report.tokens is not None:
        lines.append(f"{report.tokens} visual tokens, read once by the language model where there is one")
    if report.printed_gflops is not None:
        lines.append(f"{report.printed_gflops:.2f} GFLOPs as PIIP's tables print it: {report.printed_why}")
    return "\n".join(lines).rstrip()


def report_as_json(report: Report) -> str:
    """One object; sizes are [height, width]; paper_gflops are 1e9 multiply-accumulates."""
    entry = {
        "size": report.size,
        "views": report.views,
        "convention": report.convention,
        "visual_tokens": report.tokens,
        "paper_gflops": report.gmacs,
        "printed_gflops": report.printed_gflops,
        "true_gflops": report.gflops,
        "params_M": report.params / 1e6,
        "parts": [
            {
                "name": part.name,
                "paper_gflops": None if part.macs is None else part.macs / 1e9,
                "true_gflops": part.flops / 1e9,
                "params_M": part.params / 1e6,
            }
            for part in report.parts
        ],
    }
    return json.dumps(entry, indent=2)
