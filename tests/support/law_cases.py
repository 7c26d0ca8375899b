"""What the laws are generated over: every method, storage, layer kind and a model of each shape.

Methods come from the catalogue and storages from the registry, so that a new file in either room
is covered with no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from inlay.errors import AdapterError, TargetError
from inlay.methods.base import HiddenMethod, Method, Params, WeightMethod
from inlay.methods.catalog import MethodSpec, build_method, catalog
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.quantize import quantize
from inlay.storage.base import FrozenLinear, Kind
from inlay.storage.registry import STORAGES, frozen

torch.set_num_threads(1)

SMALL = {"rank": 4, "alpha": 8, "tokens": 3, "reduction": 8}
"""Hyperparameters that make a method small, for those methods that have them."""
LAYER_NAMES = ("layers.0.k_proj", "layers.0.down_proj")
"""A method may act in another way on feed-forward layers (IA3)."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def variants(spec: MethodSpec) -> Iterator[dict[str, Any]]:
    """The small default, and for each choice or switch of the method the other settings of it."""
    small = {key: value for key, value in SMALL.items() if key in spec.fields}
    yield small
    for name, found in spec.fields.items():
        others = found.choices or ((True, False) if isinstance(found.default, bool) else ())
        yield from ({**small, name: value} for value in others if value != found.default)


def methods() -> dict[str, Method]:
    """Every method in every variant that can be built without further hyperparameters."""
    found: dict[str, Method] = {}
    for name, spec in catalog().items():
        for setting in variants(spec):
            try:
                method = build_method(name, setting)
            except AdapterError:
                continue
            words = [f"{k}={v}" for k, v in setting.items() if k not in SMALL]
            found["-".join([name, *words])] = method
    return found


METHODS = methods()
ONE_LAYER = {n: m for n, m in METHODS.items() if isinstance(m, WeightMethod) and not m.also_selects}
"""The methods whose work is done at one layer."""
SORTS = ("-variant=", "-encoder=")
PLAIN = {n: m for n, m in METHODS.items() if "=" not in n or any(sort in n for sort in SORTS)}
"""Each method once, and each of its variants in the field's own sense."""


@dataclass(frozen=True)
class Storage:
    """A storage as the laws use it: its name, the dtype of products, and its options."""

    name: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return self.name != "dense"

    @property
    def tolerance(self) -> float:
        """The accepted difference as a share of the largest value."""
        return {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[self.dtype]

    def hold(self, layer: nn.Module) -> nn.Module:
        """Return a layer that holds this layer's weight."""
        layer = layer.to(self.dtype).requires_grad_(False)
        return quantize(layer, self.name, **self.options)

    def hold_model(self, model: nn.Module) -> nn.Module:
        """Hold a model's linear layers."""
        return quantize(model.to(self.dtype), self.name, **self.options).eval()


def storages() -> dict[str, Storage]:
    found = {"fp32": Storage("dense"), "bf16": Storage("dense", torch.bfloat16)}
    for name, held_as in STORAGES.items():
        found[name] = Storage(name)
        if "double_quant" in held_as.quantized(torch.ones(2, 2), None).options():
            found[f"{name}-single"] = Storage(name, options={"double_quant": False})
    return found


STORED = storages()


@dataclass(frozen=True)
class Layer:
    """One kind of layer, of (out, in) = (48, in)."""

    kind: Kind
    width: int = 40
    bias: bool = True

    def build(self, seed: int = 0) -> nn.Module:
        if self.kind == "conv1d":
            layer: nn.Module = Conv1D(48, self.width)
        elif self.kind == "embedding":
            layer = nn.Embedding(self.width, 48)
        else:
            layer = nn.Linear(self.width, 48, bias=self.bias)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed)) * 0.3)
        return layer

    def inputs(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "embedding":
            return torch.randint(self.width, (2, 3), generator=seeded(1))
        return torch.randn(2, 3, self.width, generator=seeded(1)).to(dtype)


LAYERS = {
    "linear": Layer("linear"),
    "linear-no-bias": Layer("linear", bias=False),
    "linear-64": Layer("linear", width=64),
    "conv1d": Layer("conv1d"),
    "embedding": Layer("embedding"),
}


class Gated(nn.Linear):
    """A subclass whose output is no product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid() * 2


class Scaled(nn.Embedding):
    """A subclass that gives its rows times a number."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Experts(nn.Module):
    """Two matrices with biases in one parameter."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.zeros(2, 6, 8) if is_transposed else torch.zeros(2, 8, 6))
        self.up_bias = nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        w = self.up if self.is_transposed else self.up.transpose(1, 2)
        return x @ w + self.up_bias[:, None]


class Attended(nn.MultiheadAttention):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


@dataclass(frozen=True)
class Own:
    """A layer that keeps its own forward: how to build it, its input, which parameters change."""

    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    parameters: tuple[str, ...] = ("weight",)

    def build(self) -> nn.Module:
        layer = self.make().double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=seeded()) * 0.3)
        return layer.requires_grad_(False).eval()

    def inputs(self) -> Tensor:
        if isinstance(self.make(), nn.Embedding):
            return torch.randint(1, 8, self.x, generator=seeded(1))
        return torch.randn(self.x, generator=seeded(1), dtype=torch.float64)


OWN = {
    "gated": Own(lambda: Gated(6, 8), (2, 3, 6)),
    "scaled": Own(lambda: Scaled(8, 6), (2, 3)),
    "conv1d": Own(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": Own(lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, padding="same"), (2, 4, 7, 7)),
    "conv2d-groups": Own(
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular", bias=False),
        (2, 4, 7, 7),
    ),
    "conv3d": Own(lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "experts": Own(lambda: Experts(False), (2, 3, 6), ("up",)),
    "experts-transposed": Own(lambda: Experts(True), (2, 3, 6), ("up",)),
    "attention": Own(lambda: Attended(8, 2), (3, 2, 8), ("in_proj_weight", "out_proj.weight")),
}


def layer_cases() -> list[tuple[str, str, str, str]]:
    """(method, storage, layer, layer name) for every weight method that takes the layer."""
    return [
        (method, storage, layer, name)
        for method, built in ONE_LAYER.items()
        for storage in STORED
        for layer, shape in LAYERS.items()
        for name in LAYER_NAMES
        if shape.kind in built.kinds and not (STORED[storage].packed and shape.kind != "linear")
        and (name == LAYER_NAMES[0] or built.for_layer(name) != built.for_layer(LAYER_NAMES[0]))
    ]  # fmt: skip


def placed(
    method: str, storage: Storage, layer: str, name: str
) -> tuple[WeightMethod, Params, FrozenLinear, Tensor]:
    """One method at one layer, its tensors randomised: (method, tensors, frozen weight, x)."""
    here = ONE_LAYER[method].for_layer(name)
    assert isinstance(here, WeightMethod)
    base = frozen(storage.hold(LAYERS[layer].build()))
    params = here.init(base, LAYERS[layer].kind, seeded())
    randomise(params)
    return here, params, base, LAYERS[layer].inputs(storage.dtype)


def randomise(module: nn.Module, scale: float = 0.1, seed: int = 7) -> None:
    """Move every trained tensor of an adapter away from where it started."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)


def randomise_adapter(model: nn.Module, name: str = "default", scale: float = 0.1) -> None:
    """Move every tensor of one adapter of a model; each place in its own way."""
    for i, (_, params) in enumerate(adapter_places(model, name)):
        randomise(params, scale, seed=100 + i)


WIDTHS = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
INNER = {"vocab_size": 61, "intermediate_size": 72, "initializer_range": 0.15}


def llama() -> PreTrainedModel:
    """Grouped-query attention, tied embeddings, no biases."""
    return LlamaForCausalLM(
        LlamaConfig(**WIDTHS, **INNER, num_key_value_heads=2, tie_word_embeddings=True)
    )


def qwen2() -> PreTrainedModel:
    """Biases on queries, keys and values."""
    return Qwen2ForCausalLM(
        Qwen2Config(**WIDTHS, **INNER, num_key_value_heads=2, tie_word_embeddings=False)
    )


def gpt2() -> PreTrainedModel:
    """transformers' Conv1D, tied embeddings, biases everywhere."""
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=40, n_layer=2, n_head=4, vocab_size=61, n_positions=80, initializer_range=0.15,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    """An encoder with a classifier."""
    return BertForSequenceClassification(
        BertConfig(
            **WIDTHS, **INNER, max_position_embeddings=80, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "bert": bert,
}


def built(model: str, storage: str | Storage = "fp32", seed: int = 0) -> Any:
    """A tiny model in a storage, in eval mode; the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MODELS[model]()
        with torch.no_grad():
            for name, p in made.named_parameters():
                if name.endswith("bias"):
                    p.normal_(0, 0.1)
    held = STORED[storage] if isinstance(storage, str) else storage
    return held.hold_model(made)


IDS = torch.randint(61, (2, 9), generator=seeded(3))


def logits(model: Any) -> Tensor:
    """The logits of two short sequences, without gradient."""
    with torch.no_grad():
        return model(input_ids=IDS).logits


def fits(method: Method, model: str, storage: Storage) -> bool:
    """Say whether a method can go on a model at all: the model refuses it with a sentence."""
    try:
        attach(built(model, storage), method)
    except (AdapterError, TargetError):
        return False
    return True


def model_cases(chosen: dict[str, Method] | None = None) -> list[tuple[str, str, str]]:
    """(method, model, storage): every storage on the first model, the others dense and NF4."""
    return [
        (method, model, storage)
        for method, made in (PLAIN if chosen is None else chosen).items()
        for model in MODELS
        for storage in (STORED if model == "llama" else ("fp32", "nf4"))
        if fits(made, model, STORED[storage])
    ]


def matched_count(model: nn.Module, method: Method, names: tuple[str, ...]) -> int:
    """The closed-form count over the layers that were matched."""
    total = 0
    for name in names:
        here = method.for_layer(name)
        assert isinstance(here, WeightMethod | HiddenMethod)
        total += here.count(shape_at(model.get_submodule(name)))
    return total


def shape_at(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer, or of a feed-forward block by its first and last layer."""
    if isinstance(module, FrozenLinear | nn.Linear | Conv1D | nn.Embedding):
        return frozen(module).shape
    inside = [
        frozen(m) for m in module.modules() if isinstance(m, FrozenLinear | nn.Linear | Conv1D)
    ]
    return inside[-1].shape[0], inside[0].shape[1]


def far(x: Tensor, y: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))
