"""torch's linear layer, by the quickest product that the machine has; and which layers may be joined."""

from __future__ import annotations

from torch import Tensor, nn

from stepwell.ops.products import linear

__all__ = ["Linear", "is_plain"]


class Linear(nn.Linear):
    """`torch.nn.Linear`, and an instance of it: adapters and initialisers find it as they would."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether it is of exactly one of these kinds and its parameters say all that it does, so that its work
    may be done without a call of it: no adapter is around it, nobody hears or changes what goes in and comes
    out, nothing brings its weights, or the rest of them, when it is called or makes them anew, and none are
    quantised.

    Hooks of all modules alike, which torch calls global, do not count: they look on.
    """
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),  # old weight_norm, spectral_norm and pruning too
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return (
        type(module) in kinds
        and not any(map(len, hooks))
        and "forward" not in module.__dict__
        and not hasattr(module, "_hf_hook")
        and all(
            type(parameter) in (nn.Parameter, Tensor) and not hasattr(parameter, "ds_id")
            for parameter in module.parameters(recurse=False)
        )
        and not (isinstance(module, nn.Linear) and module.weight.ndim < 2)  # a part, as FSDP leaves it
    )
