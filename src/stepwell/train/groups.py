"""Which parameters learn, how fast, and with what decay, by the names of a model's parts.

A part is a dotted name as a reader of a recipe would say it (`vision.branches.0`, `projector`, `language`);
`parts` maps the names that a task and its model know to prefixes of parameters. The longest prefix names a
parameter. What no image reaches never learns, whatever part it belongs to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from stepwell.flops.outlines import outlines
from stepwell.fuse.upsample import InversePyramid
from stepwell.models.vision import VisionSystem

if TYPE_CHECKING:
    from stepwell.train.layer_decay import LayerDecay
    from stepwell.train.recipe import Optimiser

__all__ = [
    "Decayed",
    "freeze_all_but",
    "frozen_norms",
    "idle_parameters",
    "optimiser_groups",
    "parameter_groups",
    "part_of",
]

Decayed = Literal["matrices", "tables", "all"]
"""What weight decay is of: matrices and tables of more than one dimension; those and single numbers, but no
vectors and biases, as MMDetection's layer-wise optimisers do; or every parameter.
"""

_ADAPTER = ".lora_"  # in the names of parameters

SEEN = ((256, 256), (256, 1024))
"""Height and width of the images by which a vision system tells what it needs: a square and a strip."""


def part_of(name: str, parts: Mapping[str, str]) -> str:
    """A parameter's name -> its name by parts; itself where it belongs to none."""
    matches = [(prefix, part) for part, prefix in parts.items() if _within(name, prefix)]
    prefix, part = max(matches, key=lambda match: len(match[0]), default=(name, name))
    return part + name.removeprefix(prefix)


def freeze_all_but(
    module: nn.Module,
    learning: Sequence[str],
    parts: Mapping[str, str],
    frozen: Sequence[str] = (),
) -> None:
    """Parameters of the parts in `learning` learn, but for those of `frozen` parts and those that no image
    reaches; all others do not. Of a part with adapters, they alone learn. Raises ValueError for a part that
    has none, and where nothing learns.
    """
    named, idle = dict(module.named_parameters()), idle_parameters(module)
    names = {name: part_of(name, parts) for name in named}
    _refuse_unknown([*learning, *frozen], names.values(), "of the model")
    reached = [names[name] for name, parameter in named.items() if parameter not in idle]
    _refuse_unknown(learning, reached, "of the model that an image reaches")
    adapters = [part for name, part in names.items() if _ADAPTER in name]
    in_full = [part for part in learning if not any(_within(adapter, part) for adapter in adapters)]
    for name, parameter in named.items():
        learns = any(_within(names[name], part) for part in (learning if _ADAPTER in name else in_full))
        learns = learns and not any(_within(names[name], part) for part in frozen)
        parameter.requires_grad_(learns and parameter not in idle)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"nothing learns: {', '.join(frozen)} of {', '.join(learning)} are frozen")


def frozen_norms(module: nn.Module, *, all_norms: bool = False) -> list[nn.Module]:
    """Batch norms whose weights do not learn, or all. In training mode they would follow the batches."""
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.affine]
    return [norm for norm in norms if all_norms or not any(each.requires_grad for each in norm.parameters())]


def idle_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Those of vision systems and up-samplers that no training step reads, such as layers behind the hidden
    state that is wanted. Checkpoints hold them; processes that train together would wait for their gradients.
    """
    idle: set[nn.Parameter] = set()
    for part in module.modules():
        if isinstance(part, VisionSystem):
            idle |= _unreached(part)
        elif isinstance(part, InversePyramid) and part.is_chained:
            idle |= set(part.corrections[-1].parameters())  # of `forward` alone
    return idle


def _unreached(vision: VisionSystem) -> set[nn.Parameter]:
    """Parameters that are not in the graph of the visual tokens, which is drawn without memory."""
    named = dict(vision.named_parameters())
    with outlines(), torch.enable_grad():
        stand_ins = {
            name: torch.empty_like(x, device="meta").requires_grad_(name in named and x.is_floating_point())
            for name, x in [*named.items(), *vision.named_buffers()]
        }
        layouts = [vision.geometry.layout(size) for size in SEEN]
        inputs = [torch.empty(3, *size) for layout in layouts for size in layout.inputs]
        leaves = _leaves(functional_call(vision, stand_ins, (inputs, layouts)))
    return {parameter for name, parameter in named.items() if id(stand_ins[name]) not in leaves}


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """The ids of the tensors that a gradient of `outputs` ends at."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    leaves, known = set(), set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        further = {behind for behind, _ in node.next_functions if behind is not None} - known
        known |= further
        nodes += further
    return leaves


def parameter_groups(
    module: nn.Module,
    parts: Mapping[str, str],
    *,
    lr: float,
    part_lrs: Mapping[str, float],
    weight_decay: float,
    decayed: Decayed = "matrices",
    layer_decay: LayerDecay | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: every parameter that learns is in exactly one.

    part_lrs gives parts a rate of their own, the longest matching name counts; layer_decay slows layers of
    it. Raises ValueError for a rate of what does not learn, and for a layer_decay that slows nothing.
    """
    learning = {part_of(name, parts): p for name, p in module.named_parameters() if p.requires_grad}
    _refuse_unknown(part_lrs, learning, "of the model that learns")
    if layer_decay is not None:
        layer_decay.refuse_nothing_slowed(learning)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        matches = [part for part in part_lrs if _within(name, part)]
        rate = part_lrs[max(matches, key=len)] if matches else lr
        if layer_decay is not None:
            rate *= layer_decay.factor(name)
        decay = weight_decay if _is_decayed(name, parameter, decayed) else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def optimiser_groups(
    module: nn.Module, parts: Mapping[str, str], optimiser: Optimiser
) -> list[dict[str, Any]]:
    """`parameter_groups`, as a recipe's optimiser says. Raises ValueError as that does."""
    return parameter_groups(
        module,
        parts,
        lr=optimiser.lr,
        part_lrs=optimiser.part_lrs,
        weight_decay=optimiser.weight_decay,
        decayed=optimiser.decayed,
        layer_decay=optimiser.layer_decay,
    )


def _is_decayed(name: str, parameter: Tensor, decayed: Decayed) -> bool:
    match decayed:
        case "matrices":
            return parameter.ndim > 1  # norms, biases, gates and scales are vectors
        case "tables":
            is_vector = parameter.ndim == 1 and not name.endswith(".weights")  # of a merge: a number a branch
            return not is_vector and not name.endswith(".bias")
        case _:
            return True


def _refuse_unknown(parts: Iterable[str], names: Collection[str], whose: str) -> None:
    for part in parts:
        if not any(_within(name, part) for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"no part {whose} is called {part!r}; its parts are {', '.join(known)}")


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
