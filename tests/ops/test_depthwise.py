"""A depthwise convolution by torch's own kernels: the same values and gradients, and cuDNN left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.encoders.convnext import ConvNeXt
from stepwell.fuse.interaction import ConvFfn
from stepwell.layers.depthwise import DepthwiseConv
from stepwell.ops import depthwise as module
from stepwell.ops.depthwise import depthwise, depthwise_fast, depthwise_reference


def inputs(kernel: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, 5, 7), (3, 1, kernel, kernel), (3,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [3, 7])
def test_values_and_derivatives_are_those_of_a_convolution(kernel: int, bias: bool) -> None:
    x, weight, shift = inputs(kernel)
    arguments = (x, weight, shift if bias else None)
    expected = nn.Conv2d(3, 3, kernel, padding=kernel // 2, groups=3, bias=bias).double()
    expected.load_state_dict({"weight": weight, **({"bias": shift} if bias else {})})
    torch.testing.assert_close(depthwise_fast(*arguments), expected(x))
    torch.testing.assert_close(depthwise_reference(*arguments), expected(x))
    assert gradcheck(depthwise_fast, arguments)
    assert gradgradcheck(depthwise_fast, arguments)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight, shift = inputs(3)
    depthwise_fast(x.detach(), weight, shift.detach()).sum().backward()
    assert x.grad is None
    assert shift.grad is None
    assert weight.grad.abs().min() > 0


def test_autocast_computes_in_half_precision_and_keeps_gradients_single() -> None:
    x, weight, shift = inputs(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_fast(x, weight, shift)
        expected = F.conv2d(x, weight, shift, padding=1, groups=3)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    out.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32


class Watch(TorchDispatchMode):
    """What runs, and whether cuDNN may be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append((str(op), torch.backends.cudnn.enabled))
        return op(*args, **(kwargs or {}))


def test_cudnn_is_off_in_both_directions_and_nowhere_else() -> None:
    x, weight, shift = inputs(3)
    with Watch() as watch:
        depthwise_fast(x * 2, weight, shift).square().sum().backward()
    convolutions = {name.split(".")[1]: enabled for name, enabled in watch.seen if "convolution" in name}
    assert convolutions == {"convolution": False, "convolution_backward": False}
    assert all(enabled for name, enabled in watch.seen if "convolution" not in name)
    with pytest.raises(RuntimeError):
        depthwise_fast(x, weight[:, :, :, :2, None], shift)
    assert torch.backends.cudnn.enabled


def test_no_images_give_nothing_and_gradients_of_zero() -> None:
    x, weight, shift = inputs(3)
    out = depthwise_fast(x[:0], weight, shift)
    assert out.shape == (0, 3, 5, 7)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(shift.grad, torch.zeros_like(shift))


def test_on_a_cpu_it_is_torchs_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "depthwise_fast", None)
    x, weight, shift = inputs(3)
    torch.testing.assert_close(depthwise(x, weight, shift), depthwise_reference(x, weight, shift))


@pytest.mark.parametrize(
    "network", [ConvNeXt(dims=(4, 8), depths=(1, 1), strides=(4, 2)), ConvFfn(8, hidden_dim=4)]
)
def test_every_depthwise_convolution_of_ours_is_one_of_these(network: nn.Module) -> None:
    found = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert found
    assert all(isinstance(convolution, DepthwiseConv) for convolution in found)


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        DepthwiseConv(3, 4)
