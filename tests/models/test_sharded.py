"""Parameters in shards, a part of each in every process: torch's FSDP around a vision system or its parts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from stepwell.fuse.dual import DualEnhancement, EnhancementConfig
from stepwell.layers.linear import Linear, is_plain
from stepwell.models.uhd import UhdV2Config

ENCODER = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8, "position_grid": [6, 6]}
FUSIONS = ("bottleneck", "linear_concat", "conv3x3", "multiplication", "weighted_addition", "max", "addition")


def test_no_parameter_is_a_scalar_which_fsdp_refuses():
    modules: list[nn.Module] = [UhdV2Config(arguments=ENCODER, levels=(0, 1, 2, 3)).build(32)]
    modules += [DualEnhancement(32, EnhancementConfig(fusion=fusion)) for fusion in FUSIONS]
    for module in modules:
        assert [name for name, parameter in module.named_parameters() if not parameter.ndim] == []


def test_a_weight_of_which_a_part_is_here_is_not_joined_with_others():
    layer = Linear(4, 6)
    assert is_plain(layer, Linear)
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:12])  # as FSDP1 leaves it between calls
    assert not is_plain(layer, Linear)


SCRIPT = """
import copy
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from stepwell.encoders.vit import TransformerBlock
from stepwell.fuse.upsample import Correction, GuidedStage, InversePyramid
from stepwell.fuse.windows import WindowAttention, WindowConfig
from stepwell.models.uhd import UhdV2Config, UhdVision

UNITS = [(UhdVision,), (UhdVision, TransformerBlock), (InversePyramid, WindowAttention)]
UNITS += [(Correction, GuidedStage, TransformerBlock), (nn.Linear,)]


class Whole(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.vision = vision

    def forward(self, images, layout):
        return self.vision(images, [layout])[0]


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for levels in ((0, 1, 2), (0, 1, 2, 3)):
    torch.manual_seed(0)
    sizes = {"arguments": %s, "size": 48, "max_slices": 4, "windows": WindowConfig(grid=(3, 3))}
    whole = Whole(UhdV2Config(levels=levels, **sizes).build(64)).eval()
    layout = whole.vision.geometry.layout((90, 120))
    images = [torch.randn(3, *size) for size in layout.inputs]
    for units in UNITS:
        sharded = copy.deepcopy(whole)
        whole.zero_grad()
        for module in reversed(list(sharded.modules())):
            if isinstance(module, units):
                fully_shard(module, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        outs = [model(images, layout) for model in (whole, sharded)]
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        for out in outs:
            out.square().mean().backward()
        for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(other.grad.full_tensor(), one.grad, atol=1e-5, rtol=1e-3, msg=name)
        with torch.no_grad():
            torch.testing.assert_close(sharded(images, layout), outs[0], atol=1e-5, rtol=1e-5)
os._exit(0)  # a thread of gloo that drops a tensor after the interpreter's end aborts the process
"""


@pytest.mark.slow
def test_two_processes_with_a_part_of_the_weights_each_compute_what_one_does(tmp_path):
    (tmp_path / "sharded.py").write_text(SCRIPT % ENCODER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "sharded.py")], capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
