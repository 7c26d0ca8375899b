"""What we touch of transformers that it may rename or change: its hooks, in one place.

`tests/model/test_seams.py` holds each hook to the signature that we expect.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.activations import SiLUActivation
from transformers.core_model_loading import ConversionOps
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.generic import ModelOutput
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "ConversionOps",
    "ForCausalLMLoss",
    "GradientCheckpointingLayer",
    "HfQuantizer",
    "LlamaDecoderLayer",
    "LlamaMLP",
    "LlamaRMSNorm",
    "ModelOutput",
    "QuantizationConfigMixin",
    "SiLUActivation",
    "cache_argument",
    "cache_in",
    "get_keys_to_not_convert",
    "no_init_weights",
    "register_attention",
    "register_quantization_config",
    "register_quantizer",
    "release_quantizer",
    "sdpa_attention_forward",
    "sdpa_mask",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a forward calls its key-value cache where it does not say so by a type."""
READS_CACHE = "_can_checkpoint_with_cache"
"""A block's attribute: it only reads the key-value cache, so that computing it again is right."""
CHECKPOINTING = "gradient_checkpointing"
"""A module's attribute: its activations are computed again in the backward pass."""
SDPA, EAGER = "sdpa", "eager"
"""The names of torch's own attention, and of one that is written out."""


class MakesMask(Protocol):
    """A function that transformers asks for the mask of one kind of layer."""

    def __call__(self, batch_size: int, q_length: int, kv_length: int, **more: Any) -> Any: ...


def register_attention(name: str, attention: Callable[..., Any], mask: MakesMask) -> None:
    """Let models whose configuration names this attention find it, and what makes its masks."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_of(config: Any) -> str | None:
    """Return the name of the attention that a configuration asks for."""
    return getattr(config, "_attn_implementation", None)


def set_attention(config: Any, name: str) -> None:
    """Let a configuration ask for another attention, the configurations inside it too."""
    config._attn_implementation = name


def is_configuration(value: Any) -> bool:
    """Say whether a value is a model's configuration."""
    return isinstance(value, PreTrainedConfig)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return which argument of a forward is the key-value cache: the one typed so, else by name.

    >>> from transformers import LlamaForCausalLM
    >>> cache_argument(LlamaForCausalLM.forward) in CACHE_NAMES
    True
    """
    parameters = inspect.signature(forward).parameters
    typed = [n for n, p in parameters.items() if "Cache" in str(p.annotation)]
    named = [n for n in CACHE_NAMES if n in parameters]
    return next(iter([*typed, *named]), None)


def takes(forward: Callable[..., Any], argument: str) -> bool:
    """Say whether a forward has an argument of this name."""
    return argument in inspect.signature(forward).parameters


def cache_in(values: Iterable[Any]) -> Cache | None:
    """Return the key-value cache among some values, or None."""
    return next((v for v in values if isinstance(v, Cache)), None)


def has_cache(call: Mapping[str, Any]) -> bool:
    """Return whether a call brings a cache: a `Cache`, or anything under a cache's name."""
    named = any(call.get(name) is not None for name in CACHE_NAMES)
    return named or cache_in(call.values()) is not None


def cache_field(output: type[Any]) -> str:
    """Return what a class of outputs calls the key-value cache."""
    fields = inspect.signature(output).parameters
    return next((name for name in CACHE_NAMES if name in fields), CACHE_NAMES[0])


def release_quantizer(
    model: PreTrainedModel, quantizer: HfQuantizer, keep: Callable[[Any], bool]
) -> None:
    """Take a loader's quantizer off a model; of its weight conversions leave those to `keep`."""
    loaded: Any = model
    conversions = getattr(loaded, "_weight_conversions", None)
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        loaded._weight_conversions = [c for c in conversions if keep(c)]


def mark_initialised(tensor_or_layer: Tensor | nn.Module, done: bool) -> None:
    """Say whether transformers' loader is to leave a layer or parameter as it is."""
    if done:
        vars(tensor_or_layer)["_is_hf_initialized"] = True
    else:
        vars(tensor_or_layer).pop("_is_hf_initialized", None)


def initialise_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module of a model the initial values of its kind."""
    own: Any = model
    own._init_weights(module)


def kept_in_full(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parts of names of modules that a model keeps in float32."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def checkpointing_function(module: nn.Module) -> Any:
    """Return what a module recomputes its activations with, or None where it keeps them."""
    on = getattr(module, "gradient_checkpointing", False)
    return getattr(module, "_gradient_checkpointing_func", None) if on else None


@dataclass(frozen=True)
class Recomputed:
    """The modules of a model that gradient checkpointing is on for.

    transformers computes its blocks again, and these drop the key-value cache unless they say that
    they only read it; what is around them drops it where its own flag is set.
    """

    blocks: tuple[nn.Module, ...]
    around: tuple[nn.Module, ...]

    def read_cache(self, allowed: bool) -> None:
        """Have the blocks keep the cache that they are given, or drop it again."""
        for block in self.blocks:
            vars(block).pop(READS_CACHE, None)
            vars(block).update({READS_CACHE: True} if allowed else {})
        for module in self.around:
            vars(module)[CHECKPOINTING] = not allowed

    @contextmanager
    def off(self) -> Generator[None]:
        """Compute nothing again inside the `with` block."""
        before = [(module, vars(module)[CHECKPOINTING]) for module in (*self.blocks, *self.around)]
        for module, _ in before:
            vars(module)[CHECKPOINTING] = False
        try:
            yield
        finally:
            for module, was in before:
                vars(module)[CHECKPOINTING] = was


def recomputed(model: nn.Module) -> Recomputed | None:
    """Return what gradient checkpointing is on for; None where no block of it can read a cache.

    Autograd must see what a block reads beside its inputs, so reentrant checkpointing cannot.
    """
    on = [m for m in model.modules() if vars(m).get(CHECKPOINTING, False)]
    blocks = [m for m in on if isinstance(m, GradientCheckpointingLayer)]
    for module in on:
        words = getattr(checkpointing_function(module), "keywords", {})
        inside = any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
        if not inside or words.get("use_reentrant"):
            return None
    return Recomputed(tuple(blocks), tuple(m for m in on if m not in blocks))


def built_empty(made_as: Any, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """Build a model of a class from its configuration, in a dtype."""
    return made_as._from_config(config, dtype=dtype)


def family_of_experts(config: Any) -> str | None:
    """Return the family whose conversion of experts a configuration's model type has, or None."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        return None
    table: dict[str, str] = {
        **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
        "mixtral": "mixtral",
    }
    converts: Any = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", None)
    if converts is not None and converts(kind) is None:
        return None
    return table.get(kind)


def renaming(model: nn.Module) -> Callable[[str], str] | None:
    """Return what brings an earlier name to the one that the model has; None where nothing does."""
    table: Any = getattr(conversion_mapping, "get_model_conversion_mapping", None)
    if not isinstance(model, PreTrainedModel) or table is None:
        return None
    renames = [c for c in table(model) if type(c).__name__ == "WeightRenaming"]

    def renamed(name: str) -> str:
        for each in renames:
            name = each.rename_source_key(name)[0]
        return name

    return renamed if renames else None


TRAINER = "transformers.trainer"
RESUMES, TAKES_BEST = "_load_from_checkpoint", "_load_best_model"
"""The methods of Trainer that put a checkpoint's values into the model."""
FOLLOWED = "followed_by_inlay"

Restore = Callable[[nn.Module, Path], bool]
"""Put the adapters of a checkpoint into a model; False where it is none of this model's."""


def follow_trainer(restore: Restore) -> None:
    """Have Trainer restore adapters by this function, now or as soon as it is imported.

    It is not imported for it: that would take as much memory as all of a small model's training.
    """
    loaded = sys.modules.get(TRAINER)
    if loaded is not None:
        follow(loaded, restore)
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport(restore))


class AfterImport(MetaPathFinder):
    """Finds the one module as everybody does, and follows it once it is loaded."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """Return the module's own spec, with a loader that goes on to `follow`."""
        del path, target
        if fullname != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                follow(module, self.restore)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


def follow(module: ModuleType, restore: Restore) -> None:
    """Wrap the two methods of Trainer, once."""
    trainer: Any = getattr(module, "Trainer", None)
    if trainer is None or FOLLOWED in vars(trainer):
        return
    resume, best = vars(trainer)[RESUMES], vars(trainer)[TAKES_BEST]

    @wraps(resume)
    def resumed(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
        target = self.model if model is None else model
        if not restore(target, Path(resume_from_checkpoint)):
            return resume(self, resume_from_checkpoint, model)
        return None

    @wraps(best)
    def took_best(self: Any) -> Any:
        if not restore(self.model, Path(self.state.best_model_checkpoint)):
            return best(self)
        return None

    setattr(trainer, RESUMES, resumed)
    setattr(trainer, TAKES_BEST, took_best)
    setattr(trainer, FOLLOWED, True)
