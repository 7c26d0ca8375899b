"""After the last detach a model is what it was: classes, attributes, hooks, parameters, configs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from law_cases import IDS, INNER, MODELS, WIDTHS, seeded
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import inlay
from inlay.errors import InlayError

T5 = T5Config(
    d_model=40, d_kv=10, d_ff=72, num_layers=2, num_heads=4, vocab_size=61, dropout_rate=0.0
)
MIXTRAL = MixtralConfig(
    **WIDTHS, **INNER, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
)


def convolutions() -> nn.Module:
    """Convolutions and a batch norm, whose running statistics stay frozen."""
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(56, 3)
    )


def torch_encoder() -> nn.Module:
    """torch's own encoder, with attention modules."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "t5": lambda: T5ForConditionalGeneration(T5),
    "mixtral": lambda: MixtralForCausalLM(MIXTRAL),
    "convolutions": convolutions,
    "encoder": torch_encoder,
}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": inlay.LoRA(rank=2, bias_training="all")},
    "dora": {"method": inlay.DoRA(rank=2)},
    "ia3": {"method": inlay.IA3()},
    "bottleneck": {"method": inlay.Bottleneck()},
    "norms": {"method": inlay.NormTuning()},
    "full": {"method": inlay.Full()},
    "prefix": {"method": inlay.PrefixTuning(tokens=3)},
    "prompt": {"method": inlay.PromptTuning(tokens=3)},
    "tokens": {"method": inlay.LoRA(rank=2), "trainable_tokens": [1, 2]},
}


def run(model: nn.Module, family: str) -> Tensor:
    if family == "convolutions":
        return model(torch.randn(5, 4, 9, generator=seeded(1)))
    if family == "encoder":
        return model(torch.randn(2, 5, 16, generator=seeded(1)))
    more = {"decoder_input_ids": IDS} if family == "t5" else {}
    return model(input_ids=IDS, **more).logits


def step(model: nn.Module, family: str) -> None:
    """Take one training step with everything that trains."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    run(model, family).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def shown(value: Any) -> Any:
    """Return what is compared of an attribute: its contents where it may change in place."""
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return {k: shown(v) for k, v in vars(value).items()}
    if isinstance(value, dict | OrderedDict):
        return {k: shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(shown, value)) if not isinstance(value, set) else set(value)
    if isinstance(value, str | int | float | bool | None):
        return value
    return id(value)


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that detaching must give back."""
    modules = dict(model.named_modules())
    return {
        "classes": {n: type(m) for n, m in modules.items()},
        "attributes": {n: {k: shown(v) for k, v in vars(m).items()} for n, m in modules.items()},
        "trains": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_detach_gives_everything_back(family: str, way: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]().train()
    with torch.no_grad():
        run(model, family)  # models set attributes of their own in a first pass
    model.eval()
    next(model.parameters()).requires_grad_(False)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = len
    before = state(model)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inlay.attach(model, name="a", **WAYS[way])
        except InlayError:
            assert state(model) == before, "a refused adapter left a trace"
            return
        step(model, family)
        inlay.save_adapter(model, tmp_path, "a")
        inlay.attach(model, name="b", **WAYS[way])
        inlay.use(model, "b")
        step(model, family)
        with inlay.disabled(model), torch.no_grad():
            run(model, family)
    inlay.detach(model, "a")
    inlay.detach(model)
    assert state(model) == before
    after = model.state_dict()
    assert list(after) == list(tensors)
    assert all(torch.equal(after[n], tensors[n]) for n in tensors)
