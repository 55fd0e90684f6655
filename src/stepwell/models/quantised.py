"""Linear layers whose weights are stored in 8 or 4 bits, by bitsandbytes, while adapters beside them learn.

LLM.int8 (Dettmers et al., arXiv 2208.07339) and QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["Bits", "quantise"]

Bits = Literal[4, 8]


def quantise(model: nn.Module, pattern: str, *, bits: Bits, dtype: torch.dtype = torch.float32) -> None:
    """Puts layers of bitsandbytes in the place of all linear layers whose name the pattern matches.

    What is rounded stays as it is, and is in no state dict: whoever starts from the same weights has it.
    dtype: in which layers of 4 bits compute. Raises ImportError without bitsandbytes, ValueError where it
    does not run on this machine.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(
            f'weights of {bits} bits need bitsandbytes: pip install "stepwell[quantised]"'
        ) from None
    _check(bitsandbytes, bits, dtype)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    ]
    for name in names:
        model.set_submodule(name, _quantised(bitsandbytes, model.get_submodule(name), bits, dtype))


def _quantised(bitsandbytes: Any, layer: Any, bits: Bits, dtype: torch.dtype) -> nn.Module:
    sizes = (layer.in_features, layer.out_features)
    small: nn.Module
    if bits == 4:
        small = bitsandbytes.nn.Linear4bit(
            *sizes, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
    else:
        small = bitsandbytes.nn.Linear8bitLt(*sizes, layer.bias is not None, has_fp16_weights=False)
    small.load_state_dict(layer.state_dict())
    small.to(layer.weight.device)  # rounds
    small.requires_grad_(False)
    small.register_state_dict_post_hook(_leave_out)
    small.register_load_state_dict_post_hook(_miss_nothing)
    return small


def _leave_out(module: nn.Module, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]


def _miss_nothing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys.clear()


def _check(bitsandbytes: Any, bits: Bits, dtype: torch.dtype) -> None:
    layer = _quantised(bitsandbytes, nn.Linear(64, 64), bits, dtype)
    x = torch.ones(1, 64, dtype=dtype, requires_grad=True)
    try:
        layer(x).sum().backward()
    except Exception as error:
        raise ValueError(
            f"bitsandbytes {bitsandbytes.__version__} does not run layers of {bits} bits on this machine "
            f"({str(error).splitlines()[0]}); leave out model.lora.bits"
        ) from error
