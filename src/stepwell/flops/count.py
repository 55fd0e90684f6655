"""What a network costs, counted on a built one: on the meta device that takes neither memory nor time.

Two counts of one forward pass. *As the papers count* (PIIP, arXiv 2501.07783): multiply-accumulates that
hooks on module classes see under a `Convention`. *In truth*: the floating-point operations of every torch op,
two a multiply-accumulate, padding included; `operations` says what the ops without a product are charged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from stepwell.encoders.convnext import ConvNeXt
from stepwell.flops.outlines import Outlines
from stepwell.fuse.interaction import DeformableCrossAttention, Interaction, Message, RegularCrossAttention
from stepwell.layers.attention import SelfAttention
from stepwell.ops.choose import prefer
from stepwell.structures import Size

__all__ = [
    "Convention",
    "Part",
    "count",
    "count_macs",
    "count_operations",
    "count_params",
    "operations",
    "paper_macs",
    "part_of",
]

BACKBONE = re.compile(r"branches\.\d+|interactions|adapters|merges?|head")
"""Parts that the papers count; necks, projectors and language models they do not."""

Convention = Literal["A", "D", "L"]
"""The counters behind the printed figures. A: a classifier, in place of the model where that is another one
(Tables I, IV, VI, VIII, X, XIV to XVII, README); D: the model as it is (Table II); L: the branches and their
interactions, with deformable sampling charged on the grid of a branch's first interaction (XI, XIII).

All of them count linear layers without and convolutions with their bias, torch's LayerNorm and GroupNorm at 2
an element, ReLU modules at 1, attention products at 2 n m D (in windows n w^2 D, the padding left out),
deformable sampling at 5 n P D; nothing else. They count no norm of ConvNeXt.
"""

PADS_TOKENS = ("augreg",)
"""Families of plain transformers whose windows counter A pads before the qkv layer; others, after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a model: multiply-accumulates as the papers count (None: they do not), operations in truth.

    The part "other" is what happens between modules: resizing the image, adding positions.
    """

    name: str
    macs: int | None
    flops: int
    params: int


def count(model: nn.Module, run: Callable[[], object], convention: Convention) -> list[Part]:
    """The parts of `model`, and what each costs in `run`, which calls it once on one image."""
    macs = paper_macs(model, run, convention)
    flops = count_operations(model, run)
    params = count_params(model)
    names = [*dict.fromkeys(name for name in [*flops, *params] if name != "other"), "other"]
    return [
        Part(name=name, macs=macs.get(name), flops=flops[name], params=params[name])
        for name in names
        if flops[name] or params[name]
    ]


def part_of(path: str) -> str:
    """The part that a module or parameter belongs to: its path without containers, down to one branch."""
    names = [name for name in path.split(".") if name not in ("", "model", "vision", "encoder")]
    if not names:
        return "other"
    if names[:2] == ["head", "merge"]:
        return "merges"
    return ".".join(names[:2]) if names[0] == "branches" else names[0]


def count_params(model: nn.Module) -> Counter[str]:
    """Parameters of every part; shared ones belong to the first."""
    params: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        params[part_of(path)] += parameter.numel()
    return params


_aten = torch.ops.aten

# ---- as the papers count --------------------------------------------------------------------------------


def paper_macs(
    model: nn.Module, run: Callable[[], object], convention: Convention, *, rms_norm: int = 0
) -> dict[str, int]:
    """Multiply-accumulates of the parts that the papers count. rms_norm: charged an element of an RMSNorm."""
    macs: Counter[str] = Counter()
    for path, charge in count_macs(model, run, convention, rms_norm=rms_norm).items():
        macs[part_of(path)] += charge
    return {part: charge for part, charge in macs.items() if BACKBONE.fullmatch(part)}


def count_macs(
    model: nn.Module, run: Callable[[], object], convention: Convention, *, rms_norm: int = 0
) -> Counter[str]:
    """Multiply-accumulates charged to every module by its path, those of the modules inside it left out."""
    macs: Counter[str] = Counter()
    skipped = {m for net in model.modules() if isinstance(net, ConvNeXt) for m in net.modules()}
    skipped = {m for m in skipped if isinstance(m, nn.LayerNorm)}
    skipped |= {
        norm for m in model.modules() if isinstance(m, SelfAttention) for norm in (m.q_norm, m.k_norm)
    }
    readers = {m.injector.attn: m.target for m in model.modules() if isinstance(m, Message)}
    first_grids: list[Size] = []  # of all branches, at the first interaction

    def remember(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Interaction) and not first_grids:
            first_grids.extend(state.size for state in args[0])

    def add(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in skipped:
            return
        if isinstance(module, nn.RMSNorm):
            macs[path] += rms_norm * int(output.numel())
        elif isinstance(module, DeformableCrossAttention):
            query, size = args[:2]
            charged = first_grids[readers[module]] if convention == "L" else size
            macs[path] += 5 * prod(charged) * module.num_points * int(query.shape[-1])
        else:
            macs[path] += _macs(module, args, output)

    with torch.no_grad(), prefer("reference"), _hooks(model, remember, add), Outlines():
        run()
    return macs


def _macs(module: nn.Module, args: tuple[Any, ...], output: Any) -> int:
    if isinstance(module, nn.Linear):
        return int(output.numel()) * module.in_features
    if isinstance(module, nn.Conv2d):
        taps = module.weight[0].numel() + (module.bias is not None)
        return int(output.numel()) * taps
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        affine = module.elementwise_affine if isinstance(module, nn.LayerNorm) else module.affine
        return 2 * int(output.numel()) * affine
    if isinstance(module, nn.ReLU):
        return int(output.numel())
    if isinstance(module, SelfAttention):
        tokens, size = args
        cells: int = prod(size)
        return 2 * cells * (module.window**2 or cells) * int(tokens.shape[-1])
    if isinstance(module, RegularCrossAttention):
        query, size, _, feature_size, *_ = args
        return int(2 * prod(size) * prod(feature_size) * query.shape[-1])
    return 0


# ---- in truth -------------------------------------------------------------------------------------------

PER_OUTPUT: dict[Any, int] = {
    _aten.native_layer_norm: 7,  # sum, centre, square, sum, scale, weight, bias
    _aten.native_group_norm: 7,
    _aten._softmax: 5,  # maximum, difference, exponential, sum, quotient
    _aten._safe_softmax: 5,
    _aten.gelu: 5,  # scale, erf, sum, two products
    _aten.silu: 2,
    _aten.upsample_bilinear2d: 7,
    _aten.upsample_bicubic2d: 31,
    _aten.grid_sampler_2d: 7,
    _aten.addcmul_: 2,
    _aten.clone: 0,  # tagged pointwise, but no arithmetic
    _aten.where: 0,
}
REDUCTIONS = {
    *(_aten._adaptive_avg_pool2d, _aten.amax, _aten.max_pool2d_with_indices, _aten.mean, _aten.sum),
}
"""One operation an element that goes in."""


def operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Floating-point operations of one aten op.

    Matrix products, convolutions and fused attention: 2 a multiply-accumulate (torch's formulas), 1 a bias;
    weighted sums of rows (deformable attention): 2 an element read; norms, softmax, GELU and resizing: as in
    PER_OUTPUT; sums: 1 an element; any other pointwise op with a floating result: 1 an element, an elementary
    function being one operation. Copies, comparisons and integers: nothing.
    """
    from torch.utils.flop_counter import flop_registry  # imports triton, for which a plan need not wait

    packet = func._overloadpacket
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        return 0
    if packet in flop_registry:
        biased = packet is _aten.addmm or (packet is _aten.convolution and args[2] is not None)
        products = flop_registry[packet](*args, **kwargs, out_val=output)
        return int(products) + (first.numel() if biased else 0)
    if packet in PER_OUTPUT:
        return PER_OUTPUT[packet] * first.numel()
    if packet in (_aten._embedding_bag, _aten._embedding_bag_forward_only):
        rows, index = args[:2]
        return 2 * int(index.numel()) * int(rows.shape[1])
    if packet in REDUCTIONS:
        return int(args[0].numel())
    if torch.Tag.pointwise in func.tags and first.is_floating_point():
        return first.numel()
    return 0


class _Operations(Outlines):
    """Charges every op to the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = [""]
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops[part_of(self.running[-1])] += operations(func, args, kwargs or {}, output)
        return output


def count_operations(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """Floating-point operations of every part."""
    counter = _Operations()

    def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        counter.running.append(path)

    def leave(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counter.running.pop()

    with torch.no_grad(), _hooks(model, enter, leave), counter:
        run()
    return counter.flops


@contextmanager
def _hooks(
    model: nn.Module,
    before: Callable[[str, nn.Module, tuple[Any, ...]], None],
    after: Callable[[str, nn.Module, tuple[Any, ...], Any], None],
) -> Iterator[None]:
    """Calls before(path, module, arguments) and after(path, module, arguments, output) at every forward.

    By hooks of all modules: those of a module itself would have it called where its work is done otherwise.
    """
    paths = {module: path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in paths:
            before(paths[module], module, args)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in paths:
            after(paths[module], module, args, output)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
