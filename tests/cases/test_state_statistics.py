"""Running statistics: frozen ones never move, those of a module that is saved whole are saved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import IBertConfig, IBertForMaskedLM, MobileViTConfig, MobileViTModel

import inlay

Make = Callable[[], nn.Module]


class Net(nn.Module):
    """A convolution, some norm, two linear layers."""

    def __init__(self, norm: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(8, 16, 3, padding=1), norm()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(torch.relu(self.norm(self.conv(x))).mean(-1))))


class MovingMean(nn.Module):
    """Keeps a mean of what it sees, a count, and the largest value, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, 1))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2))[:, None], 0.5)
                self.largest = torch.maximum(self.largest, x.max())
                self.seen += 1
        return x * (1 + self.mean)


NORMS: dict[str, Make] = {
    "batch": lambda: nn.BatchNorm1d(16),
    "momentum none": lambda: nn.BatchNorm1d(16, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(16, affine=True, track_running_stats=True),
    "bare": lambda: nn.BatchNorm1d(16, affine=False),
    "moving mean": MovingMean,
    "inside": lambda: nn.Sequential(nn.BatchNorm1d(16), MovingMean()),
    "spectral": lambda: spectral_norm(nn.Conv1d(16, 16, 1)),
}


def train(model: nn.Module, steps: int = 5) -> nn.Module:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        x = 2 + 3 * torch.randn(16, 8, 20)
        F.cross_entropy(model(x), (x.mean((1, 2)) > 2).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = 2 + 3 * torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_frozen_statistics_stay_and_the_adapter_fits_a_fresh_base(
    norm: Make, tmp_path: Path
) -> None:
    base = Net(norm).eval()
    before = {n: b.clone() for n, b in base.state_dict().items()}
    model = train(inlay.attach(copy.deepcopy(base), inlay.LoRA(rank=4), targets=["fc", "head"]))
    y = model(X)
    inlay.save_adapter(model, tmp_path)
    loaded = inlay.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(X), y)
    assert not torch.allclose(y, base(X), atol=1e-3)
    with inlay.disabled(model):
        assert torch.equal(model(X), base(X))
        model.train()(X)  # the base alone runs
    inlay.detach(model)
    assert all(torch.equal(b, before[n]) for n, b in model.state_dict().items() if "norm" in n)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("norm", ["batch", "inside"])
def test_a_model_with_frozen_statistics_is_pickled(norm: str) -> None:
    model = train(inlay.attach(Net(NORMS[norm]), inlay.LoRA(rank=4), targets=["fc"]))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    before = {n: b.clone() for n, b in again.named_buffers()}
    train(again)
    assert all(torch.equal(b, before[n]) for n, b in again.named_buffers())


def test_training_mode_is_what_was_set_and_statistics_move_again_after_detach() -> None:
    model = inlay.attach(Net(NORMS["batch"]), inlay.LoRA(rank=4), targets=["fc"]).train()
    model(X)
    assert all(module.training for module in model.modules())
    before = model.norm.running_mean.clone()
    assert torch.equal(model.norm.running_mean, before)
    inlay.detach(model)
    model(X)
    assert not torch.equal(model.norm.running_mean, before)


def test_statistics_stay_in_a_compiled_model() -> None:
    for norm in (NORMS["batch"], NORMS["moving mean"]):
        model = inlay.attach(Net(norm), inlay.LoRA(rank=4), targets=["fc"]).train()
        before = {n: b.clone() for n, b in model.named_buffers()}
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), model(X))
        compiled(X).sum().backward()
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


SAVED = {name: NORMS[name] for name in ("batch", "momentum none", "instance", "moving mean")}


@pytest.mark.parametrize("norm", SAVED.values(), ids=SAVED)
def test_a_norm_that_is_saved_whole_brings_its_statistics(norm: Make, tmp_path: Path) -> None:
    base = Net(norm).eval()
    model = inlay.attach(
        copy.deepcopy(base), inlay.LoRA(rank=4), targets=["fc", "head"], modules_to_save=["norm"]
    )
    y = train(model)(X)
    with inlay.disabled(model):
        assert torch.equal(model(X), base(X))
    inlay.save_adapter(model, tmp_path)
    assert torch.equal(inlay.load_adapter(copy.deepcopy(base), tmp_path)(X), y)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(X), y, atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model)
    inlay.merge(merged, inputs=[{"x": X}])
    torch.testing.assert_close(merged(X), y, atol=1e-5, rtol=1e-5)
    assert torch.equal(inlay.detach(model)(X), base(X))


@pytest.mark.parametrize("norm", SAVED.values(), ids=SAVED)
def test_a_folder_of_peft_with_statistics_is_read(norm: Make, tmp_path: Path) -> None:
    base = Net(norm).eval()
    config = peft.LoraConfig(r=4, target_modules=["fc", "head"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    y = train(theirs)(X)
    theirs.save_pretrained(tmp_path)
    model = inlay.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(model(X), y, atol=1e-5, rtol=1e-5)
    inlay.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(X), y, atol=1e-5, rtol=1e-5)


def test_two_adapters_with_statistics_of_their_own() -> None:
    base = Net(NORMS["batch"]).eval()
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        inlay.attach(model, inlay.LoRA(rank=4), targets=["fc"], modules_to_save=["norm"], name=name)
    a = train(inlay.use(model, "a"))(X)
    b = train(inlay.use(model, "b"), steps=9)(X)
    assert not torch.allclose(a, b, atol=1e-3)
    assert torch.equal(inlay.use(model, "a")(X), a)
    assert torch.equal(inlay.use(model, "b")(X), b)
    assert torch.equal(inlay.detach(model, "b")(X), base(X))


def moving(model: nn.Module, **inputs: Tensor) -> set[str]:
    """Return the buffers that a training step changes."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(**inputs)
    after = dict(model.named_buffers())
    return {n for n, b in before.items() if not torch.equal(after[n], b)}


@pytest.mark.parametrize("quant_mode", [False, True])
def test_models_of_transformers_that_keep_statistics(quant_mode: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(2, 30, (2, 7))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ibert = IBertForMaskedLM(
        IBertConfig(
            vocab_size=32,
            intermediate_size=24,
            max_position_embeddings=40,
            quant_mode=quant_mode,
            **small,
        )
    )
    assert moving(copy.deepcopy(ibert), input_ids=ids)
    method = inlay.BitFit() if quant_mode else inlay.LoRA(rank=2)
    targets = None if quant_mode else ["lm_head.dense"]
    assert not moving(inlay.attach(ibert, method, targets=targets), input_ids=ids)


def test_mobilevit() -> None:
    torch.manual_seed(0)
    config = MobileViTConfig(
        image_size=32, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 32, 32)
    vit = MobileViTModel(config)
    assert moving(copy.deepcopy(vit), pixel_values=pixels)
    assert not moving(inlay.attach(vit, inlay.LoRA(rank=2)), pixel_values=pixels)
