"""A storage is one file: a toy storage, written into a copy of the source, does what others do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import TRAIN, command, python, with_file

STORAGE = '''"""4 bits a weight with one scale a row: `W[i, j] = (c[i, j] - 8) * scale_i`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from inlay.kernels.formats import FORMATS, Format
from inlay.storage.quantized import QuantizedLinear, checked_finite, checked_matrix


class ToyLinear(QuantizedLinear):
    """A linear layer held in 4 bits with one scale a row."""

    storage = "toy"
    bytes_per_weight = 0.5
    tensor_names = ("weight", "scale")
    scale: Tensor

    @classmethod
    def quantized(
        cls, w: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        full = checked_matrix(w, cls.storage).float()
        scale = full.abs().amax(1).clamp(min=1e-30) / 7
        checked_finite(scale, cls.storage)
        codes = (full / scale[:, None]).round().add(8).to(torch.uint8)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        return cls(tuple(w.shape), dtype or w.dtype, bias, weight=packed, scale=scale)

    @classmethod
    def unfilled(
        cls, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None, **options: Any
    ) -> Self:
        packed = torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8)
        return cls(shape, dtype, bias, weight=packed, scale=torch.empty(shape[0]))

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        packed, bias = tensors["weight"], tensors.get("bias")
        shape = (packed.shape[0], 2 * packed.shape[1])
        return cls(shape, dtype or torch.float32, bias, weight=packed, scale=tensors["scale"])

    def serialized(self) -> dict[str, Tensor]:
        return {"weight": self.packed_weight.detach(), "scale": self.scale}

    def parts(self) -> list[Tensor]:
        return [self.packed_weight, self.scale]

    def dequantized_rows(self, rows: Tensor) -> Tensor:
        return self.dequantize()[rows]


def dequantized(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    rows = slice(first, first + len(out))
    packed, scale = parts[0][rows], parts[1][rows]
    codes = torch.stack([packed >> 4, packed & 15], 2).flatten(1)
    out.copy_((codes.float() - 8) * scale[:, None])


FORMATS[ToyLinear.storage] = Format(dequantized)
'''

LIFE = """
import copy, torch, inlay
from torch import nn

torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32)).requires_grad_(False)
held = inlay.quantize(copy.deepcopy(dense), "toy")
assert held[0].storage == "toy" and held[0].packed_weight.nbytes == 64 * 48 // 2
w = held[0].dequantize()
assert 0 < (w - dense[0].weight).abs().max() < w.abs().max() / 7

x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48)
y = held[0](x)
torch.testing.assert_close(y, x @ w.T + held[0].bias)
y.backward(g)
torch.testing.assert_close(x.grad, g @ w)
assert torch.equal(held[0].dequantize(slice(2, 9)), w[2:9])

other = inlay.quantize(copy.deepcopy(dense).apply(lambda m: m), "toy")
with torch.no_grad():
    other[0].scale.zero_()
other.load_state_dict(held.state_dict())
assert torch.equal(other(x), held(x)), "saved and loaded bit for bit"

inlay.attach(held, inlay.LoRA(rank=4), targets=["0", "2"])
optimiser = torch.optim.SGD([p for p in held.parameters() if p.requires_grad], 0.5)
for _ in range(3):
    loss = held(x.detach()).pow(2).mean()
    optimiser.zero_grad(); loss.backward(); optimiser.step()
out = held.eval()(x)
inlay.save_adapter(held, "saved")
inlay.load_adapter(other, "saved")
assert torch.equal(other.eval()(x), out)
inlay.merge(held, inputs=[{"input": x.detach()}])
torch.testing.assert_close(held(x), out)
assert type(held[0]) is nn.Linear
try:
    inlay.quantize(dense, "toyy")
except inlay.StorageError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_file(tmp_path_factory.mktemp("source"), "storage/toy.py", STORAGE)


def test_quantised_multiplied_saved_and_merged(source: Path, tmp_path: Path) -> None:
    said = python(source, "-c", LIFE, folder=tmp_path)
    assert said == (
        "there is no storage 'toyy'; there are dense, int8, nf4, toy. Did you mean 'toy'?\n"
    )


def test_planned_and_trained_by_the_command(source: Path, tmp_path: Path) -> None:
    assert "--storage dense|nf4|toy|int8\n" in command(source, ["train", "--help"], tmp_path)
    words = ["plan", *TRAIN[1:-2], "--storage", "toy", "--json"]
    plan = json.loads(command(source, words, tmp_path))
    assert plan["options"][0]["bytes"]["weights"] < 5_475_584  # a byte a weight; dense ones have 2
    command(source, [*TRAIN, "--storage", "toy"], tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["storage"] == "toy"
    command(source, ["merge", "--adapter", "run", "--output", "merged"], tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
