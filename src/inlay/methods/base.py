"""The interfaces of methods, and all that a method's file needs to import."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.kernels.opaque import lowered as lowered
from inlay.kernels.opaque import without_autocast as without_autocast
from inlay.methods.models import prefilled
from inlay.methods.params import Params as Params
from inlay.methods.params import kaiming_uniform as kaiming_uniform
from inlay.methods.params import project as project
from inlay.methods.params import stored as stored
from inlay.methods.params import zeros as zeros
from inlay.storage.base import FrozenLinear, Kind

Targets = str | tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters of one method; its subclasses are the five kinds.

    A class that users can name carries `name`, `paper`, `learning_rate_factor` (relative to
    LoRA's formula), and `peft_type` with the two maps below when HF PEFT has the method too.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    learning_rate_factor: ClassVar[float] = 1.0
    mergeable: ClassVar[bool]
    default_targets: ClassVar[Targets] = "all-linear"
    peft_type: ClassVar[str | None] = None
    peft_keys: ClassVar[Mapping[str, str]] = {}
    """Our field -> the key in HF PEFT's adapter_config.json."""
    peft_fixed: ClassVar[Mapping[str, object]] = {}
    """Keys HF PEFT needs that are always the same for this method."""

    @property
    def also_selects(self) -> tuple[SelectMethod, ...]:
        """Existing parameters that train together with the method's own tensors."""
        return ()

    @property
    def own_targets(self) -> Targets:
        """The default targets of these hyperparameters."""
        return self.default_targets

    def for_layer(self, layer_name: str) -> Method:
        """Return the hyperparameters at this layer (rank and alpha patterns)."""
        del layer_name
        return self

    def to_peft(self) -> dict[str, object]:
        """Return HF PEFT's configuration keys for these hyperparameters."""
        ours = {theirs: getattr(self, mine) for mine, theirs in self.peft_keys.items()}
        return {**self.peft_fixed, **ours}

    @classmethod
    def from_peft(cls, config: Mapping[str, object]) -> Method:
        """Build the hyperparameters from HF PEFT's configuration keys."""
        found = {mine: config[theirs] for mine, theirs in cls.peft_keys.items() if theirs in config}
        return cls(**found)

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        """Our tensor name -> the key after the module path in adapter_model.safetensors."""
        del kind
        return {}


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """A map on a weight, W -> W': additive or multiplicative, mergeable.

    LAW (eval): `forward(p, x, base) == x @ weight(p, base.dequantize()).T + bias(p, base.bias)`.
    """

    mergeable: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv1d")
    reads_base: ClassVar[bool] = False
    """Whether its tensors were computed from W, so that no other adapter may stand below it."""

    def init(self, base: FrozenLinear, kind: Kind, seed: torch.Generator) -> Params:
        """Create the trained tensors for one layer; the adapted layer starts as a no-op."""
        raise NotImplementedError

    def follow(self, p: Params, base: FrozenLinear, restart: bool) -> None:
        """Bring what was computed from W up to date with W; only where `reads_base`.

        `restart` says that W is another one: what is untrained starts from it anew.
        """

    def count(self, shape: tuple[int, int]) -> int:
        """Return how many parameters one layer of shape (out, in) trains, in closed form."""
        raise NotImplementedError

    def count_on(self, base: FrozenLinear) -> int:
        return self.count(base.shape)

    def weight(self, p: Params, w: Tensor) -> Tensor:
        """DEFINITION: (out, in) -> (out, in); also the merge, also the oracle.

        It works on a stack too: tensors (stack, …) and w (stack, out, in).
        """
        raise NotImplementedError

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        """The bias of the adapted layer: the base's, unless the method says otherwise."""
        del p
        return b

    def forward(self, p: Params, x: Tensor, base: FrozenLinear, training: bool) -> Tensor:
        """Return the adapted output the fast way; never builds a dense weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HiddenMethod(Method):
    """A map on a layer's output, h -> h', given the layer's input x; not mergeable."""

    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[Targets] = "residual"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer kinds it can follow; `block` is a whole feed-forward block."""
        return ("linear", "conv1d")

    def init(self, shape: tuple[int, int], like: Tensor, seed: torch.Generator) -> Params:
        """Create the trained tensors for a place of shape (out, in), where `like` lies."""
        raise NotImplementedError

    def count(self, shape: tuple[int, int]) -> int:
        """Return how many parameters one place of shape (out, in) trains, in closed form."""
        raise NotImplementedError

    def hidden(self, p: Params, x: Tensor, h: Tensor, training: bool) -> Tensor:
        """DEFINITION: the layer's input x and output h -> the new output, h's shape."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SelectMethod(Method):
    """A choice of existing parameters to train; the trained copies are the weight (mergeable)."""

    mergeable: ClassVar[bool] = True
    default_targets: ClassVar[Targets] = "all"
    takes_named_whole: ClassVar[bool] = False
    """Whether a module that targets name itself trains whole, of whatever class it is."""

    @property
    def only_adapted(self) -> bool:
        """Whether only the layers that another method adapts are selected."""
        return False

    def selects(self, module: nn.Module, parameter: str) -> bool:
        """Return whether this parameter of this module trains."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Biases(SelectMethod):
    """Every bias vector, or only those of the layers another method adapts."""

    adapted_layers_only: bool = False

    @property
    def only_adapted(self) -> bool:
        return self.adapted_layers_only

    def selects(self, module: nn.Module, parameter: str) -> bool:
        del module
        return parameter == "bias"


@dataclass(frozen=True, kw_only=True)
class LowRank(WeightMethod):
    """The base of methods around `s B A`: rank and alpha, their patterns, dropout, biases.

    `s = alpha / rank`, or `alpha / sqrt(rank)` with `rslora`. Patterns map a layer-name suffix or
    regex to its own rank or alpha. `bias_training` also trains the adapted layers' biases
    (`lora_only`) or all the model's (`all`).
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv1d", "embedding")
    peft_type: ClassVar[str | None] = "LORA"
    peft_keys: ClassVar[Mapping[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora",
        "bias_training": "bias",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    }

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    bias_training: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            checked_positive(rank, "rank")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            checked_positive(alpha, "alpha")
        checked_probability(self.dropout, "dropout")
        if self.bias_training not in ("none", "lora_only", "all"):
            raise AdapterError(
                f"bias must be 'none', 'lora_only' or 'all', not {self.bias_training!r}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def also_selects(self) -> tuple[SelectMethod, ...]:
        biases = Biases(adapted_layers_only=self.bias_training == "lora_only")
        return () if self.bias_training == "none" else (biases,)

    def for_layer(self, layer_name: str) -> Method:
        rank = matched(self.rank_pattern, layer_name, self.rank)
        alpha = matched(self.alpha_pattern, layer_name, self.alpha)
        return replaced(self, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def drops(self, x: Tensor) -> bool:
        """Whether dropout applies: never to an embedding's ids."""
        return self.dropout > 0 and x.is_floating_point()

    def peft_tensors(self, kind: Kind) -> Mapping[str, str]:
        if kind == "embedding":
            return {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        return {"A": "lora_A.weight", "B": "lora_B.weight"}


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method):
    """Virtual tokens before every sequence: keys and values that attention reads.

    A method that has their embeddings says so; a model that sees both ways reads these instead.
    """

    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[Targets] = ()
    tokens: int

    @property
    def rows(self) -> int:
        """How many embeddings are kept: `tokens` for each submodule."""
        return self.tokens * (getattr(self, "submodules", None) or 1)

    def init(self, model: nn.Module, seed: torch.Generator) -> Params:
        """Create the trained tensors for this model."""
        raise NotImplementedError

    def count_for(self, config: object) -> int:
        """Return how many parameters a model of this transformers config trains, closed form."""
        raise NotImplementedError

    @property
    def has_embeddings(self) -> bool:
        """Whether virtual tokens have embeddings; else they are keys and values alone."""
        return False

    def embeddings(self, p: Params) -> Tensor:
        """Return the virtual tokens' embeddings, (tokens, width), where they have some."""
        raise NotImplementedError

    def keys_values(self, p: Params, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return, per Transformer layer, keys and values, each (1, kv heads, tokens, head dim).

        By default those that the frozen model computes from the embeddings.
        """
        return prefilled(model, self.embeddings(p))

    def computed(self, p: Params) -> Mapping[str, Tensor]:
        """Return tensors that HF PEFT's file needs besides the trained ones, by its keys."""
        del p
        return {}

    def held_in(self, keys: Collection[str]) -> PromptMethod:
        """Return the method of an adapter whose file has exactly these keys."""
        del keys
        return self


def checked_probability(value: float, field: str) -> None:
    if not 0 <= value < 1:
        raise AdapterError(f"{field} must be at least 0 and below 1, not {value!r}")


def checked_positive(value: float, field: str) -> None:
    if not 0 < value < float("inf"):
        raise AdapterError(f"{field} must be a positive number, not {value!r}")


def replaced(method: Method, **changes: object) -> Method:
    return dataclasses.replace(method, **changes)


def matches_name(entry: str, layer_name: str) -> bool:
    """Return whether an entry is the layer's name, a dotted suffix of it, or a regex for either."""
    return re.fullmatch(rf"(.*\.)?({entry})", layer_name) is not None


def matched(pattern: Mapping[str, T], layer_name: str, default: T) -> T:
    """Return the value of the first key that matches the layer's name."""
    found = (value for key, value in pattern.items() if matches_name(key, layer_name))
    return next(found, default)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put every module in eval mode inside the `with` block, and back as each was after it."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
