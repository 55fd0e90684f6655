"""The linear layer is torch's own but for its product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from stepwell.layers import linear
from stepwell.layers.linear import Linear, is_plain


def test_it_is_torchs_own_layer():
    layer = Linear(3, 5, bias=False)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == repr(nn.Linear(3, 5, bias=False))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert type(pickle.loads(pickle.dumps(copy.deepcopy(layer)))) is Linear


def test_its_product_is_chosen(monkeypatch):
    layer, x = Linear(3, 5), torch.randn(2, 3)
    monkeypatch.setattr(linear, "linear", lambda *given: given)
    assert all(a is b for a, b in zip(layer(x), (x, layer.weight, layer.bias), strict=True))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: weight_norm(layer),
        lambda layer: spectral_norm(layer),
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: add_hook_to_module(layer, AlignDevicesHook("cpu")),
        lambda layer: setattr(layer, "forward", lambda x: x),
        lambda layer: setattr(layer.weight, "ds_id", 0),
        lambda layer: setattr(layer, "weight", type("Quantised", (nn.Parameter,), {})(layer.weight.data)),
    ],
)
def test_a_layer_that_somebody_changed_or_hears_is_not_plain(change):
    layer = Linear(4, 4)
    assert is_plain(layer, Linear)
    assert is_plain(nn.Identity(), Linear, nn.Identity)
    assert not is_plain(layer, nn.Identity, nn.Linear)
    change(layer)
    assert not is_plain(layer, Linear)
