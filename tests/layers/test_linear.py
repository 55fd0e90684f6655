"""The linear layer is torch's own but for its product."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from stepwell.layers import linear
from stepwell.layers.linear import Linear


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
