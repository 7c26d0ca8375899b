"""Find the layers a method goes to: names, suffixes, regexes and named groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from inlay.errors import TargetError, UsageError, did_you_mean
from inlay.model.layer import own_modules
from inlay.model.vision import PARTS, Part, is_within, parts_of, unread_blocks
from inlay.storage.registry import kind

ATTENTION_OUT = (
    "o_proj", "out_proj", "wo", "attn.c_proj", "attention.output.dense", "attention.dense",
    "self_attention.dense", "out_lin", "attn.proj", "attention.out_proj",
)  # fmt: skip
MLP_OUT = (
    "down_proj", "fc2", "w2", "mlp.c_proj", "dense_4h_to_h", "lin2", "wo", "fc_out",
    r"(.*\.)?(?<!attention\.)output\.dense",
)  # fmt: skip
KEY_VALUE = (
    "k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "c_attn", "qkv_proj",
    "query_key_value", "Wqkv",
)  # fmt: skip
BLOCKS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe")
GROUPS: dict[str, tuple[str, ...]] = {
    "residual": (*ATTENTION_OUT, *MLP_OUT),
    "mlp-out": MLP_OUT,
    "key-value": KEY_VALUE,
    "ia3": (*KEY_VALUE, *MLP_OUT),
    "mlp-block": BLOCKS,
}
"""Named groups: the layers whose output joins the residual stream, keys and values, and so on."""


@dataclass(frozen=True)
class Found:
    """The layers a method goes to, and the linear layers that were left out."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]
    unadaptable: tuple[str, ...]
    """Weights that no method here adapts, such as 3-D expert parameters."""


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    *,
    exclude: str | Sequence[str] = (),
    layers: str | Iterable[int] | None = None,
    kinds: Sequence[str] = ("linear", "conv1d"),
) -> Found:
    """Return the names of the layers that `targets` means in this model.

    Args:
        model: any module.
        targets: `all-linear`, a group (`residual`, `mlp-out`, `key-value`), a part of a model
            that sees images (`language`, `vision`, `projector`: its linear layers), or names,
            dotted suffixes or whole-name regexes; each of several must match.
        exclude: names, suffixes or regexes to leave out, with all that lies below them; each must
            match something.
        layers: block numbers, as integers or as text such as `0-3,8`.
        kinds: the layer kinds the method can adapt.

    Raises:
        TargetError: an entry matched nothing, or nothing the method can adapt.
    """
    modules = dict(own_modules(model))
    adaptable = [n for n, m in modules.items() if kind_or_block(n, m) in kinds]
    linear = [n for n in adaptable if kind(modules[n]) in ("linear", "conv1d")]
    if not adaptable:
        raise TargetError(f"the model {type(model).__name__} has no layer of kind {listed(kinds)}")
    chosen = set(all_linear(model, linear) if targets == "all-linear" else ())
    parts = parts_of(model)
    for entry in () if targets == "all-linear" else entries(targets):
        if entry in PARTS and parts:
            chosen |= set(linear_in(entry, parts, model, linear))
        else:
            chosen |= set(matches_of(entry, adaptable, modules, kinds))
    for entry in entries(exclude):
        dropped = {n for n in modules if matches(entry, n)}
        if not dropped:
            raise TargetError(f"exclude {entry!r} matches no layer{nearest(entry, modules)}")
        chosen = {n for n in chosen if not any(is_within(n, of) for of in dropped)}
    chosen = in_layers(chosen, layers)
    if not chosen:
        raise TargetError(
            f"targets {targets!r}, exclude {exclude!r} and layers {layers!r} leave no layer; "
            f"the model has {len(adaptable)} that could be adapted, such as {adaptable[0]!r}"
        )
    names = tuple(n for n in adaptable if n in chosen)
    left_out = tuple(n for n in linear if n not in chosen)
    return Found(names, left_out, tuple(expert_weights(model)))


def kind_or_block(name: str, module: nn.Module) -> str | None:
    """Return the layer's kind, or `block` for a feed-forward block."""
    return kind(module) or ("block" if name.rsplit(".", 1)[-1] in BLOCKS else None)


def entries(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return the entries of a target specification as a tuple."""
    return (targets,) if isinstance(targets, str) else tuple(targets)


def matches(entry: str, name: str) -> bool:
    """Say whether an entry is the name, a dotted suffix of it, or a regex for all of it."""
    if name == entry or name.endswith("." + entry):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        problem = f"target {entry!r} is neither a name nor a valid regex: {error}"
        raise TargetError(problem) from None


def matches_of(
    entry: str, adaptable: Sequence[str], modules: dict[str, nn.Module], kinds: Sequence[str]
) -> list[str]:
    """Return the adaptable layers one entry means; raise when there are none."""
    if entry in GROUPS:
        found = [n for n in adaptable if any(matches(g, n) for g in GROUPS[entry])]
    else:
        found = [n for n in adaptable if matches(entry, n)]
    if found:
        return found
    others = [n for n in modules if n and matches(entry, n)]
    if others:
        what = type(modules[others[0]]).__name__
        raise TargetError(
            f"target {entry!r} matches {others[0]!r}, a {what}; this method adapts {listed(kinds)}"
        )
    raise TargetError(f"target {entry!r} matches no layer of the model{nearest(entry, modules)}")


def nearest(entry: str, names: Iterable[str]) -> str:
    """Return a hint: the nearest last name component, or some that exist."""
    last = sorted({n.rsplit(".", 1)[-1] for n in names if n and not n.split(".")[-1].isdigit()})
    return "." + (did_you_mean(entry, last) or f" It has {listed(last[:12])}.")


def all_linear(model: nn.Module, linear: Sequence[str]) -> Iterator[str]:
    """Every linear layer but the output head, which stands outside the blocks."""
    heads = {id(head) for head in output_heads(model)}
    modules = dict(own_modules(model))
    return (n for n in linear if id(modules[n]) not in heads)


def linear_in(
    part: str, parts: dict[str, Part], model: nn.Module, linear: Sequence[str]
) -> list[str]:
    """Return the linear layers of a part; raise when it has none that can be adapted."""
    unread = unread_blocks(model)
    found = [
        name
        for name in all_linear(model, linear)
        if parts.get(name) == part and not any(is_within(name, block) for block in unread)
    ]
    if not found:
        raise TargetError(
            f"the part {part!r} of {type(model).__name__} has no linear layer to adapt; train it "
            "whole with modules_to_save"
        )
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """Return a language model's output head, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Return the language-model head, or a task head beside the base model."""
    head = output_head(model)
    if head is not None:
        return [head]
    body = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if not isinstance(body, nn.Module):
        return []
    inside = {id(m) for m in body.modules()}
    return [m for m in model.modules() if id(m) not in inside and kind(m) == "linear"]


def expert_weights(model: nn.Module) -> Iterator[str]:
    """Names of 3-D weights (mixture-of-experts), which no method here adapts."""
    return (
        f"{name}.{key}" if name else key
        for name, module in own_modules(model)
        for key, p in module._parameters.items()
        if p is not None and p.ndim == 3
    )


def in_layers(names: Iterable[str], layers: str | Iterable[int] | None) -> set[str]:
    """Keep the names that lie in the blocks asked for; all when none are asked for."""
    if layers is None:
        return set(names)
    wanted = parsed_layers(layers) if isinstance(layers, str) else set(layers)
    numbers = {n: block_number(n) for n in names}
    missing = sorted(wanted - set(numbers.values()))  # pyright: ignore[reportArgumentType]
    if missing:
        have = sorted({b for b in numbers.values() if b is not None})
        span = f"{have[0]}-{have[-1]}" if have else "no numbered blocks"
        raise TargetError(f"layers {missing} match nothing; the targets lie in blocks {span}")
    return {n for n, number in numbers.items() if number in wanted}


def block_number(name: str) -> int | None:
    """Return the first number in a dotted name: the Transformer block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parsed_layers(text: str) -> set[int]:
    """Read `0-3,8` as {0, 1, 2, 3, 8}."""
    numbers: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not span:
            raise UsageError(f"layers must look like '0-3,8', not {text!r}")
        first, last = int(span[1]), int(span[2] or span[1])
        if last < first:
            raise UsageError(f"layers {part.strip()!r} runs backwards; write '{last}-{first}'")
        numbers |= set(range(first, last + 1))
    return numbers


def listed(words: Iterable[str]) -> str:
    """Join words for a sentence."""
    return ", ".join(words)
