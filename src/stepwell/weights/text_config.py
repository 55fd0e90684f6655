"""The language model inside a LLaVA checkpoint: what its tensors tell, and the rest from its config.json.

Released LLaVA models hold a Llama (Vicuna 1.5, arXiv 2306.05685). Sizes are read off the tensors; only
what has no shape (heads, epsilon, rotary base, special tokens) comes from the file beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

__all__ = ["VICUNA_DEPTHS", "llama_config", "read_config"]

VICUNA_DEPTHS = {4096: 32, 5120: 40}
"""Layers of Vicuna 7B and 13B, by width."""
_VICUNA: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "vocab_size": 32000}
_WITHOUT_SHAPE = (
    *(
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "max_position_embeddings",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json beside a checkpoint, empty where there is none. Raises ValueError where it is no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not settings")
    return config


def llama_config(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], *, dim: int
) -> LlamaConfig:
    """shapes: names and shapes of the checkpoint, LLaVA's names; config: its config.json or nothing.

    dim: width where the checkpoint holds no language model, whose sizes are then Vicuna's.
    """
    known = _VICUNA | {key: config[key] for key in _WITHOUT_SHAPE if key in config}
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None or len(embedding) != 2:
        heads = dim // 128
        hidden = {4096: 11008, 5120: 13824}.get(dim, 4 * dim)
        sizes = {"num_hidden_layers": VICUNA_DEPTHS.get(dim, 1), "intermediate_size": hidden}
        return LlamaConfig(**known | sizes, hidden_size=dim, num_attention_heads=heads)
    known["vocab_size"], dim = embedding
    layers = {int(m[1]) for name in shapes if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    heads = config.get("num_attention_heads") or max(1, dim // 128)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise ValueError(f"config.json says {heads} attention heads for a width of {dim}")
    key = shapes.get("model.layers.0.self_attn.k_proj.weight", (dim,))
    gate = shapes.get("model.layers.0.mlp.gate_proj.weight", (4 * dim,))
    return LlamaConfig(
        **known,
        hidden_size=dim,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=max(1, key[0] // (dim // heads)),
        intermediate_size=gate[0],
    )
