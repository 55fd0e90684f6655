"""A plain Llama that decodes greedily, for the command that must answer before a library is imported.

Touvron et al., LLaMA, arXiv 2302.13971: RMSNorm, rotary positions, SwiGLU; grouped queries as in Llama 2,
arXiv 2307.09288. Parameters are named as transformers names them, and values are equal to its own. What is
not exactly this network goes the way through transformers: `plain_llama` reads every field.
Letters: B batch, L tokens that come in, T tokens seen so far, D width, K heads of keys, d their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.layers.linear import Linear

__all__ = ["LlamaDecoder", "LlamaSettings", "decode_greedily", "plain_llama", "positions_of"]


@dataclass(frozen=True, kw_only=True)
class LlamaSettings:
    """Fields of transformers' LlamaConfig, by its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)
_MUST_BE: dict[str, Any] = {  # which is what transformers takes where a field is not there
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "use_cache": True,
}
_SAY_NOTHING = frozenset(  # of training, of classifiers, of files
    {
        *("_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id"),
        *(
            "id2label",
            "initializer_range",
            "label2id",
            "pad_token_id",
            "problem_type",
            "transformers_version",
        ),
    }
)


def plain_llama(config: Mapping[str, Any]) -> LlamaSettings | None:
    """The text_config of a config.json as settings of this network; None where any field says otherwise."""
    fields = {name: value for name, value in config.items() if name not in _SAY_NOTHING}
    rope = fields.pop("rope_parameters", None)
    if not isinstance(rope, Mapping) or rope.keys() != {"rope_theta", "rope_type"}:
        return None
    if rope["rope_type"] != "default" or not {*_SIZES, "model_type"} <= fields.keys():
        return None
    others = {name: value for name, value in fields.items() if name not in _SIZES}
    if any(
        name not in _MUST_BE or type(value) is not type(_MUST_BE[name]) or value != _MUST_BE[name]
        for name, value in others.items()
    ):
        return None
    return LlamaSettings(rope_theta=float(rope["rope_theta"]), **{name: fields[name] for name in _SIZES})


class LlamaDecoder(nn.Module):
    """Embeddings (B, L, D) -> hidden states (B, L, D) behind the last norm."""

    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.num_hidden_layers))
        self.norm = _RmsNorm(settings.hidden_size, settings.rms_norm_eps)

    def new_cache(self, x: Tensor, length: int) -> list[Tensor]:
        """Room for the keys and values of `length` tokens: (2, B, K, length, d) a layer, made like x."""
        s = self.settings
        shape = (2, len(x), s.num_key_value_heads, length, s.head_dim)
        return [x.new_zeros(shape) for _ in range(s.num_hidden_layers)]

    def forward(self, x: Tensor, positions: Tensor, is_text: Tensor, cache: Sequence[Tensor]) -> Tensor:
        """positions (B, L) of the tokens; is_text (B, T): False is padding; cache: of `new_cache`.

        The tokens are the last of the T.
        """
        seen, count = is_text.shape[1], x.shape[1]
        reach = torch.ones(count, seen, dtype=torch.bool, device=x.device).tril(seen - count)
        mask = torch.where(reach & is_text[:, None, None], 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        turns = _turns(positions, self.settings, x.dtype)
        for layer, keys_values in zip(self.layers, cache, strict=True):
            x = layer(x, turns, mask, keys_values[..., :seen, :])
        hidden: Tensor = self.norm(x)
        return hidden


class _Layer(nn.Module):
    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.input_layernorm = _RmsNorm(settings.hidden_size, settings.rms_norm_eps)
        self.self_attn = _Attention(settings)
        self.post_attention_layernorm = _RmsNorm(settings.hidden_size, settings.rms_norm_eps)
        self.mlp = _Mlp(settings)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, keys_values: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns, mask, keys_values)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Attention(nn.Module):
    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        dim, self.head_dim = settings.hidden_size, settings.head_dim
        heads, key_heads = settings.num_attention_heads, settings.num_key_value_heads
        self.q_proj = Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = Linear(dim, key_heads * self.head_dim, bias=False)
        self.v_proj = Linear(dim, key_heads * self.head_dim, bias=False)
        self.o_proj = Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, keys_values: Tensor) -> Tensor:
        """keys_values (2, B, K, T, d): the last L of the T are written here."""
        q, k, v = (
            layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = keys_values
        keys[:, :, -x.shape[1] :], values[:, :, -x.shape[1] :] = _turned(k, *turns), v
        # Heads that share keys stand in line like more tokens, so that keys are not copied for each.
        q = _turned(q, *turns).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        mask = mask.repeat(1, 1, q.shape[2] // x.shape[1], 1)
        answer = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        answer = answer.unflatten(2, (-1, x.shape[1])).flatten(1, 2)
        out: Tensor = self.o_proj(answer.transpose(1, 2).flatten(2))
        return out


class _Mlp(nn.Module):
    def __init__(self, settings: LlamaSettings) -> None:
        super().__init__()
        self.gate_proj = Linear(settings.hidden_size, settings.intermediate_size, bias=False)
        self.up_proj = Linear(settings.hidden_size, settings.intermediate_size, bias=False)
        self.down_proj = Linear(settings.intermediate_size, settings.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _RmsNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()  # squares overflow in half precision
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


def _turns(positions: Tensor, settings: LlamaSettings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, L, d) of the rotary embedding."""
    exponents = torch.arange(0, settings.head_dim, 2, device=positions.device).float() / settings.head_dim
    angles = positions[:, None, :, None].float() * (1.0 / settings.rope_theta**exponents)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, heads, L, d), its first half of channels turned against its second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def positions_of(is_text: Tensor) -> Tensor:
    """(B, L), False for padding on the left -> positions (B, L) of the tokens, from 0 on."""
    return (is_text.cumsum(1) - 1).clamp(min=0)


def decode_greedily(
    decoder: LlamaDecoder,
    head: nn.Module,
    embeddings: Tensor,
    is_text: Tensor,
    *,
    max_new_tokens: int,
    end: Sequence[int],
    never: Sequence[int] = (),
    pad: int = 0,
    each: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Prompts of embeddings (B, L, D), padded on the left where is_text (B, L) is False -> new ids (B, n).

    An answer ends with an id of `end`, and is padded with `pad` behind it; ids of `never` are not chosen.
    `each` is called with every column (B,) of ids.
    """
    batch, length = is_text.shape
    cache = decoder.new_cache(embeddings, length + max_new_tokens)
    positions = positions_of(is_text)
    is_over = torch.zeros(batch, dtype=torch.bool, device=is_text.device)
    ids = []
    for _ in range(max_new_tokens):
        hidden = decoder(embeddings, positions, is_text, cache)[:, -1]
        logits = head(hidden).float()
        logits[:, list(never)] = -torch.inf
        tokens = logits.argmax(-1).masked_fill(is_over, pad)
        ids.append(tokens)
        if each is not None:
            each(tokens)
        is_over |= torch.isin(tokens, tokens.new_tensor(list(end)))
        if bool(is_over.all()):
            break
        embeddings = decoder.embed_tokens(tokens[:, None])
        positions = positions[:, -1:] + 1
        is_text = F.pad(is_text, (0, 1), value=True)
    return torch.stack(ids, 1)
