"""CONTRIBUTING's example method is a real one: it keeps the first laws as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.methods.base import Params, WeightMethod, zeros
from inlay.model.adapters.registry import adapter_places
from inlay.storage.base import FrozenLinear, Kind

ROOT = Path(__file__).parents[2]


def example() -> type[WeightMethod]:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"dataclass": dataclass, "WeightMethod": WeightMethod}
    names |= {"Params": Params, "zeros": zeros, "FrozenLinear": FrozenLinear, "Kind": Kind}
    names |= {"torch": torch, "Tensor": Tensor}
    exec(code, names)
    return names["Scale"]


def test_the_example_is_a_no_op_at_first_then_forward_is_weight_is_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    x = torch.randn(4, 6)
    before = model(x)
    inlay.attach(model, example()())
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            params.s.normal_()
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    report = inlay.merge(model, inputs=[{"input": x}])
    assert report.surviving_fraction > 0.999
    torch.testing.assert_close(model(x), adapted)
