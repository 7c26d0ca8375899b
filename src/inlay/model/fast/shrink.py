"""A small copy of a model or module with random weights, for trials.

It keeps the structure: class, flags, head width, kinds of layers. It cuts what only costs time:
further layers of one kind, heads, feed-forward width, vocabulary, experts. Windows are cut too, so
that a few tokens reach beyond them.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.errors import first_line
from inlay.model.example_inputs import configs
from inlay.model.fast.attention import ATTENTION
from inlay.model.seams.accelerate import HOOK, KEPT_FORWARDS
from inlay.model.seams.transformers import EAGER, SDPA, attention_of, set_attention
from inlay.storage.registry import frozen, kind, layer_class

LARGEST = 24_000_000
"""The most parameters that a small model may have."""
WINDOW = 5
NARROW_HEAD = 64
"""The width of a head up to which four of them are kept where two share keys."""
NARROWER: tuple[tuple[str, int], ...] = (
    (r"vocab_size", 128),
    (r"intermediate|ffn|n_inner|ff_dim|mlp_dim", 96),
    (r"(num|n)_(\w+_)?experts$|experts_num", 4),
    (r"per_tok|top_?k$|moe_k$", 2),
    (r"n_group$|topk_group$", 1),
    (r"^(?!.*(mamba|ssm|conv)).*(window|chunk)", WINDOW),
)
"""Pattern of a configuration's integers -> what they are cut to."""
NOT_WIDTHS = re.compile(r"position|length|window|chunk|vocab|intermediate|token|layer|head|theta")
STATE_HEADS = re.compile(r"(mamba|ssm).*heads$")
"""Heads of a state space, of which there are as many as the hidden size has room for."""
OWN = frozenset({"forward", HOOK, *KEPT_FORWARDS})
"""What others put on a module and what it computes does not depend on."""


def small_model(model: PreTrainedModel, runs: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    """Return a small model of the same class and configuration, in fp32, in training mode.

    `runs` is called on it to show that it works. Raises ValueError if no such model works.
    """
    tried: list[str] = []
    large = sum(p.numel() for p in model.parameters()) > LARGEST
    made_as: Any = layer_class(model)
    for cut in (WHOLLY, WHOLLY - {cut_heads}, WHOLLY - {cut_heads, cut_layers}):
        try:
            config = small_configuration(model.config, cut)
            size = size_of(made_as, config) if large else 0
            if size > LARGEST:
                raise ValueError(f"it still has {size:,} parameters when it is small")
            found: Any = filled(made_as(config).float()).train()
            with torch.no_grad():
                runs(found)
        except Exception as error:
            tried.append(f"{type(error).__name__}: {first_line(error)[:200]}")
        else:
            return found
    raise ValueError(f"no small model of its class could be built and run ({tried[0]})")


def size_of(made_as: Any, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in made_as(copy.deepcopy(config)).parameters())


def small_configuration(config: Any, cut: frozenset[Cut] | None = None) -> Any:
    small = copy.deepcopy(config)
    for part in configs(small):
        vars(part).pop("quantization_config", None)
        for each in (cut_layers, cut_heads, cut_integers):
            if each in (WHOLLY if cut is None else cut):
                each(part)
    if attention_of(small) not in (None, SDPA, EAGER):
        set_attention(small, SDPA if attention_of(config) == ATTENTION else EAGER)
    return small


def cut_layers(config: Any) -> None:
    """Keep at least two layers: one of each kind that the configuration lists, and the last."""
    count = setting(config, "num_hidden_layers")
    if not isinstance(count, int) or count <= 2:
        return
    lists = {
        name: cast("list[Any]", value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(cast("list[Any]", value)) == count
    }
    kinds = [repr([value[i] for value in lists.values()]) for i in range(count)]
    kept = sorted({*(kinds.index(each) for each in set(kinds)), count - 1})[-4:]
    kept = kept if len(kept) > 1 else [0, count - 1]
    for name, value in lists.items():
        setattr(config, name, type(value)(value[i] for i in kept))
    for name, value in list(vars(config).items()):
        if name.endswith("layers") and value == count:  # the encoder's and the decoder's, too
            setattr(config, name, len(kept))
    config.num_hidden_layers = len(kept)


def cut_heads(config: Any) -> None:
    """Keep two or four heads of the same width, and a hidden size to match."""
    heads, hidden = setting(config, "num_attention_heads"), setting(config, "hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads <= 4:
        return
    kept = setting(config, "num_key_value_heads")
    width = setting(config, "head_dim") or hidden // heads
    shared = isinstance(kept, int) and 1 < kept < heads
    few = 4 if shared and width <= NARROW_HEAD else 2
    if isinstance(kept, int):
        config.num_key_value_heads = few // 2 if shared else min(kept, few)
    config.num_attention_heads = few
    for name, value in list(vars(config).items()):
        if type(value) is int and value == hidden and not NOT_WIDTHS.search(name):
            setattr(config, name, few * width)
        elif type(value) is int and STATE_HEADS.search(name):
            setattr(config, name, max(1, value * few * width // hidden))
    config.hidden_size = few * width


def cut_integers(config: Any) -> None:
    """Cut vocabulary, feed-forward width, experts and windows; keep special tokens inside.

    Nothing is dropped at random, so that two runs can be compared.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and re.search(r"drop|pdrop", name):
            setattr(config, name, 0.0)
        for pattern, most in NARROWER:
            if re.search(pattern, name):
                cut = no_more(value, most)
                if cut != value:
                    setattr(config, name, cut)
                break
    vocabulary = setting(config, "vocab_size")
    for name, value in list(vars(config).items()):
        if name.endswith("token_id") and isinstance(value, int) and isinstance(vocabulary, int):
            setattr(config, name, value if value < vocabulary else 0)


def setting(config: Any, name: str) -> Any:
    """Return a setting; None where there is none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


Cut = Callable[[Any], None]
WHOLLY: frozenset[Cut] = frozenset({cut_layers, cut_heads, cut_integers})


def no_more(value: Any, most: int) -> Any:
    if type(value) is int:
        return min(value, most)
    if isinstance(value, list | tuple):
        return type(value)(no_more(each, most) for each in cast("list[Any]", value))
    return value


def small_module(
    module: nn.Module, dtype: torch.dtype, sizes: dict[int, int] | None = None
) -> nn.Module:
    """Return a module of the same class with small dense linear layers; no hooks or own forward."""
    sizes = {} if sizes is None else sizes
    if kind(module) == "linear":
        out, width = (
            sizes.setdefault(n, min(n, 32 + 16 * len(sizes))) for n in frozen(module).shape
        )
        layer = nn.Linear(width, out, bias=frozen(module).bias is not None, device="cpu")
        return filled(layer.to(dtype)).requires_grad_(False)
    made = layer_class(module)
    twin = made.__new__(made)
    nn.Module.__init__(twin)
    own = set(vars(twin)) | OWN
    twin.__dict__.update({n: v for n, v in vars(module).items() if n not in own})
    for name, p in module._parameters.items():
        empty = None if p is None else torch.empty(p.shape, dtype=p.dtype, device="cpu")
        twin.register_parameter(name, None if empty is None else nn.Parameter(empty, False))
    for name, buffer in module._buffers.items():
        twin.register_buffer(name, None if buffer is None else buffer.detach().clone())
    for name, child in module._modules.items():
        twin.add_module(name, None if child is None else small_module(child, dtype, sizes))
    return filled(twin)


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        if p.is_floating_point():
            drawn = torch.randn(p.shape, generator=generator)
            near_one = p.ndim < 2 and name.endswith("weight")
            value = 1 + 0.1 * drawn if near_one else scaled(drawn)
            p.copy_(value)
    return module


def scaled(drawn: Tensor) -> Tensor:
    return 0.1 * drawn if drawn.ndim < 2 else drawn / math.sqrt(drawn.shape[-1])
