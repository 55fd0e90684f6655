"""Batch norms of several processes, against torch's of one process with all of the batch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from stepwell.layers.synchronised import SynchronisedBatchNorm2d, synchronised

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from stepwell.layers.synchronised import synchronised

dist.init_process_group("gloo")
rank = dist.get_rank()
given = torch.load(sys.argv[1])
norm = torch.nn.BatchNorm2d(given["channels"], momentum=0.3, eps=1e-3)
norm.load_state_dict(given["norm"])
synchronised(norm).train()
told = []
for step in given["steps"]:
    x = step[rank]["x"].requires_grad_()
    out = norm(x)
    norm.zero_grad()
    (out.double() * step[rank]["weights"]).sum().backward()
    of_parameters = [p.grad for p in norm.parameters()]
    for grad in of_parameters:
        dist.all_reduce(grad)
    told.append({"out": out.detach(), "grad": x.grad, "parameters": of_parameters})
norm.eval()
alone = norm(given["steps"][0][rank]["x"].detach())
torch.save({"told": told, "state": norm.state_dict(), "alone": alone}, f"{sys.argv[2]}/{rank}.pt")
dist.destroy_process_group()
"""


def parts_of(sizes, dtype=torch.float32):
    """A batch for each process, and what its outputs are weighed by."""
    generator = torch.Generator().manual_seed(sum(sum(size) for size in sizes))
    return [
        {
            "x": (torch.randn(size, generator=generator) * 3 + 5).to(dtype),
            "weights": torch.randn(size, generator=generator, dtype=torch.float64),
        }
        for size in sizes
    ]


@pytest.mark.slow
def test_two_processes_with_unequal_batches_are_one(tmp_path):
    """Of unlike numbers of images, and in the second step of unlike grids."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=0.3, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    steps = [parts_of([(3, 4, 5, 6), (1, 4, 5, 6)]), parts_of([(2, 4, 5, 6), (2, 4, 3, 3)])]
    given = {"channels": 4, "norm": norm.state_dict(), "steps": steps}
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(tmp_path / "script.py"), str(tmp_path / "given.pt"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    norm.train()
    for number, step in enumerate(steps):
        told = [their["told"][number] for their in theirs]
        # all positions of all images in a row: a batch norm does not ask where they lie
        x, weights, out, grad = (
            torch.cat([tensor.transpose(0, 1).flatten(1) for tensor in tensors], 1)[None, ..., None]
            for tensors in (
                [part["x"] for part in step],
                [part["weights"] for part in step],
                [each["out"] for each in told],
                [each["grad"] for each in told],
            )
        )
        x.requires_grad_()
        expected = norm(x)
        norm.zero_grad()
        (expected.double() * weights).sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
        for each in told:
            for ours, whole in zip(each["parameters"], norm.parameters(), strict=True):
                torch.testing.assert_close(ours, whole.grad, rtol=1e-4, atol=1e-4)
    norm.eval()
    for rank, their in enumerate(theirs):
        for name, tensor in norm.state_dict().items():
            torch.testing.assert_close(their["state"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(their["alone"], norm(steps[0][rank]["x"]), rtol=1e-5, atol=1e-5)


class TwoEqual:
    """A second process whose batch is the same: every sum is twice as large."""

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("torch.distributed.is_initialized", lambda: True)
        self.patch.setattr("torch.distributed.get_world_size", lambda: 2)
        self.patch.setattr("stepwell.layers.synchronised.all_reduce", lambda x: 2 * x)

    def __exit__(self, *error):
        self.patch.undo()


@pytest.mark.parametrize(
    ("dtype", "momentum"), [(torch.float32, 0.1), (torch.float32, None), (torch.bfloat16, 0.1)]
)
def test_the_sums_of_two_equal_batches(dtype, momentum):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.normal_(norm.weight)
    whole, part = copy.deepcopy(norm), synchronised(norm)
    x = (torch.randn(2, 3, 4, 5) * 2 + 7).to(dtype)
    with TwoEqual():
        part(x - 1)
        ours = part(x)
    whole(torch.cat([x - 1, x - 1]).float())
    expected = whole(torch.cat([x, x]).float())[:2]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(part.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_one_process_is_torchs_batch_norm():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 5)
    other = synchronised(copy.deepcopy(norm))
    assert torch.equal(other(x), norm(x))
    for name, tensor in norm.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    with TwoEqual():
        assert torch.equal(other.eval()(x), norm.eval()(x))


def test_only_norms_with_weights_and_running_statistics_are_changed():
    class Mine(nn.BatchNorm2d):
        pass

    module = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(2)),
        nn.BatchNorm2d(2, affine=False),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.GroupNorm(1, 2),
        Mine(2),
    )
    before = module.state_dict()
    after = synchronised(module)
    assert after is module
    assert type(module[0][0]) is SynchronisedBatchNorm2d
    assert [type(m) for m in module[1:]] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.GroupNorm, Mine]
    assert before.keys() == module.state_dict().keys()
