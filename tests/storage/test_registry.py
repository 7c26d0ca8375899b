"""Which layers hold a matrix, and which storages there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from inlay.errors import StorageError, TargetError
from inlay.storage.dense import DenseConv1D, DenseEmbedding, DenseLinear
from inlay.storage.nf4 import NF4Linear
from inlay.storage.registry import STORAGES, frozen, kind, storage_class


def test_views_of_dense_layers() -> None:
    cases = [
        (nn.Linear(3, 5), DenseLinear, "linear"),
        (Conv1D(5, 3), DenseConv1D, "conv1d"),
        (nn.Embedding(3, 5), DenseEmbedding, "embedding"),
    ]
    for layer, view, name in cases:
        assert type(frozen(layer)) is view
        assert kind(layer) == name
        assert frozen(layer).shape == (5, 3)


def test_a_packed_layer_is_its_own_view() -> None:
    layer = NF4Linear.quantized(torch.randn(5, 3), None)
    assert frozen(layer) is layer
    assert kind(layer) == "linear"


def test_a_subclass_may_use_its_weight_otherwise() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for layer in (Scaled(3, 5), nn.Conv2d(1, 1, 1)):
        assert kind(layer) is None
        assert frozen(layer).by_weight
    for layer in (nn.ReLU(), nn.Embedding(3, 5, max_norm=1.0)):
        assert kind(layer) is None
        with pytest.raises(TargetError, match="holds no weight that can be adapted"):
            frozen(layer)


def test_a_subclass_with_the_plain_product_is_a_plain_layer() -> None:
    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    assert kind(Same(3, 5)) == "linear"
    assert type(frozen(Same(3, 5))) is DenseLinear


def test_names() -> None:
    assert set(STORAGES) == {"nf4", "int8"}
    assert storage_class("nf4") is NF4Linear
    with pytest.raises(StorageError, match=r"no storage 'nf5'.*dense, int8, nf4.*Did you mean"):
        storage_class("nf5")
