"""A method is one file: a toy method, written into a copy of the source, does what others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import TRAIN, command, python, with_file

METHOD = '''"""Toy: W' = diag(s) W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.errors import AdapterError
from inlay.methods.base import Kind, Params, WeightMethod, zeros
from inlay.storage.base import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class Toy(WeightMethod):
    """Scale every output by a learned number. Shapes: s (out,)."""

    start: float = 1.0

    name = "toy"
    paper = "0000.00000"
    learning_rate_factor = 10.0

    def __post_init__(self) -> None:
        if self.start <= 0:
            raise AdapterError(f"start must be a positive number, not {self.start!r}")

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        return Params({"s": zeros(base, base.shape[0]) + self.start})

    def count(self, shape: tuple[int, int]) -> int:
        return shape[0]

    def weight(self, p: Params, w: Tensor) -> Tensor:
        return p.s[..., None].to(w.dtype) * w

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        y = base.matmul(x) * p.s.to(x.dtype)
        return y if base.bias is None else y + base.bias
'''

LIFE = """
import torch, inlay
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)

torch.manual_seed(1)
x, y = torch.randn(8, 6), torch.randn(8, 3)
base = model()
tuned = model()
inlay.attach(tuned, inlay.Toy(), targets=["0", "2"])
assert torch.equal(tuned(x), base(x)), "attaching is a no-op"
trained = [p for p in tuned.parameters() if p.requires_grad]
assert sum(p.numel() for p in trained) == 8
optimiser = torch.optim.SGD(trained, 0.1)
before = None
for _ in range(5):
    loss = (tuned(x) - y).pow(2).mean()
    assert before is None or loss.item() < before
    before = loss.item()
    optimiser.zero_grad(); loss.backward(); optimiser.step()
out = tuned.eval()(x)
inlay.save_adapter(tuned, "saved")
again = model()
inlay.load_adapter(again, "saved")
assert torch.equal(again.eval()(x), out), "saved and loaded bit for bit"
report = inlay.merge(tuned, inputs=[{"input": x}])
assert report.surviving_fraction > 0.999
torch.testing.assert_close(tuned(x), out)
try:
    inlay.Toy(start=-1.0)
except inlay.AdapterError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_file(tmp_path_factory.mktemp("source"), "methods/toy.py", METHOD)


def test_attached_trained_saved_and_merged(source: Path, tmp_path: Path) -> None:
    assert (
        python(source, "-c", LIFE, folder=tmp_path) == "start must be a positive number, not -1.0\n"
    )


def test_listed_and_shown(source: Path, tmp_path: Path) -> None:
    listed = command(source, ["methods"], tmp_path)
    assert "Scale every output by a learned number." in listed
    [spec] = json.loads(command(source, ["methods", "toy", "--json"], tmp_path))
    assert (spec["class"], spec["equation"]) == ("inlay.Toy", "W' = diag(s) W")
    assert spec["hyperparameters"] == {
        "start": {"type": "float", "default": 1.0, "required": False}
    }
    assert "--start" in command(source, ["methods", "toy"], tmp_path)


def test_trained_by_the_command(source: Path, tmp_path: Path) -> None:
    command(source, [*TRAIN, "--method", "toy", "--start", "1.25"], tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["method"] == "toy"
    assert record["config"]["hyperparameters"] == {"start": 1.25}
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    command(source, ["merge", "--adapter", "run", "--output", "merged"], tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
