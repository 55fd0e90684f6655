"""Published: one configuration of a paper or of its release, as a paper's file describes it.

A file of this room holds one paper, with what its checkpoints do not: the settings, the names of the tensors,
the place of the weights, and where the released code does something else than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stepwell.encoders.catalogue import ENCODERS, encoder_arguments
from stepwell.heads.upernet import UperNetConfig
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import Rule
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.dense_heads import DetectionImages, DetectionSettings, SegmentationImages
from stepwell.models.vision import VisionConfig

__all__ = [
    "LLAMA3_8B",
    "MISTRAL_7B",
    "QWEN2_7B",
    "VICUNA_7B",
    "VICUNA_13B",
    "Published",
    "Task",
    "clip_rules",
]

Task = Literal["detection", "segmentation", "classification", "chat", "part"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One configuration. `file`: its weights in `repository`, None where that holds nothing else; `parts`: of
    the vision system, that these are, where they are no whole model.
    """

    name: str
    task: Task
    settings: DenseSettings | ClassifierSettings | VisionConfig
    rules: Callable[[Any], list[Rule]]  # `settings` -> the key table of the whole checkpoint
    classes: tuple[str, ...] = ()  # names, where they are known
    head: DetectionSettings | UperNetConfig | None = (
        None  # of a detector or segmenter, and how its images are
    )
    images: DetectionImages | SegmentationImages | None = None
    num_classes: int | None = None
    parts: tuple[str, ...] = ()
    text_config: Mapping[str, Any] | None = None  # of transformers, for weights without a config.json
    template: str | None = None  # of a chat, in language/templates
    repository: str | None = None
    file: str | None = None
    quirk: str = ""  # where the released code builds something else than its configuration

    @property
    def released(self) -> str | None:
        """What `stepwell.load` takes: `repository`, or `repository:file`."""
        if self.repository is None or self.file is None:
            return self.repository
        return f"{self.repository}:{self.file}"


VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
"""Vicuna 1.5, arXiv 2306.05685, the language model of several papers."""
QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
"""Qwen2-7B-Instruct, arXiv 2407.10671."""
VICUNA_13B: dict[str, Any] = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
"""Meta-Llama-3-8B-Instruct, arXiv 2407.21783."""
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
"""Mistral-7B-Instruct-v0.2, arXiv 2310.06825."""


def clip_rules(encoder: str, arguments: Mapping[str, Any]) -> list[Rule]:
    """The key table of a CLIP tower, as a settings' `encoder` with its `arguments` builds it."""
    assert ENCODERS[encoder].family == "clip"
    built = encoder_arguments(encoder, arguments)
    names = {key: built[key] for key in ("class_token", "class_slot", "final_norm") if key in built}
    return backbone_rules("clip", **names)
