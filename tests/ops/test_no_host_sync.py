"""A vision system never waits for its device: no value is read back, and nothing is made beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.vision import VisionConfig

SYSTEMS: dict[str, VisionConfig] = {
    "plain": PlainConfig(encoder="clip_b", size=224),
    "plain, windows and sines": PlainConfig(
        encoder="vit_nano", size=128, framing="aspect", arguments={"windows": 3}
    ),
    "piip": PiipConfig(
        branches=(
            BranchConfig(encoder="beitv2_b", size=448, interactions=((0, 5), (6, 11))),
            BranchConfig(encoder="convnext_nano", size=896, interactions=((0, 4), (5, 7))),
        )
    ),
}
READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class _OnDevice(TorchDispatchMode):
    """Refuses what reads a value, what indexes by truth values, and tensors of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(READS), f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), f"{name} has a tensor on the host"
        if name.startswith("index"):
            assert not any(tensor.dtype == torch.bool for tensor in tensors), f"{name} by truth values"
        return out


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("grad", [False, True])
def test_encoding_reads_nothing_back_from_its_device(name: str, grad: bool) -> None:
    config = SYSTEMS[name]
    with torch.device("meta"):
        system = config.build(32).train(grad)
    layouts = [system.geometry.layout(size) for size in ((300, 400), (400, 300), (300, 400))]
    inputs = [torch.empty(3, *layout.inputs[0], device="meta") for layout in layouts]
    with torch.set_grad_enabled(grad), _OnDevice():
        tokens = system(inputs, layouts)
        if grad:
            torch.stack([each.sum() for each in tokens]).sum().backward()
    assert [each.shape[0] for each in tokens] == [layout.runs[0].count for layout in layouts]


@pytest.mark.parametrize(
    "reading", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0]).to(x.device)]
)
def test_what_waits_is_noticed(reading: Any) -> None:
    with pytest.raises((AssertionError, NotImplementedError)), _OnDevice():
        reading(torch.ones(3, device="meta"))
