"""Find the layers a method goes to: names, suffixes, regexes and named groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from inlay.errors import TargetError, UsageError, did_you_mean
from inlay.methods.base import HiddenMethod, WeightMethod
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.passed_over import passed_over
from inlay.model.adapters.places import expert_stacks, loose_parameters
from inlay.model.load.vision import PARTS, Part, is_within, parts_of, unread_blocks
from inlay.storage.convolution import is_convolution
from inlay.storage.own import gives_product
from inlay.storage.registry import kind, matrix_kind

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


FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}
"""Parameter of a mixture's experts -> the layers that it holds, by the names they had apart."""
BEYOND = ("convolution", "attention", "parameter")
"""What holds a matrix besides the kinds of layers; every method on weights goes there too."""


@dataclass(frozen=True)
class Found:
    """The places a method goes to, the linear layers left out, and what else has weights."""

    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    """What is no linear layer and was not chosen, with what it is."""


@dataclass(frozen=True)
class Places:
    """Everything in a model that a method can go to, by name."""

    modules: dict[str, nn.Module]
    adaptable: list[str]
    """Layers and blocks, then attention modules, in the model's order."""
    linear: list[str]
    experts: list[str]
    loose: list[str]
    """Other parameters that hold a matrix, which only their own name means."""

    def aliases(self) -> dict[str, str]:
        """The names that layers had before they were joined into one parameter of the experts."""
        found: dict[str, str] = {}
        for name in self.experts:
            owner, _, leaf = name.rpartition(".")
            for group in FUSED.get(leaf, ()):
                found |= {f"{owner}.{old}": name for old in group}
        return found

    def everything(self) -> list[str]:
        """Every name that an entry can mean."""
        return [*self.modules, *self.experts, *self.loose, *self.aliases()]


def places_in(model: nn.Module, kinds: Sequence[str]) -> Places:
    """Return what a method that goes to these kinds finds in a model."""
    modules = dict(own_modules(model))
    labels = {n: label(n, m) for n, m in modules.items()}
    inside = {n for n in modules if labels.get(n.rpartition(".")[0]) == "attention"}
    single = modules.items() if "parameter" in kinds else ()
    experts = [e for n, m in single for e in expert_stacks(n, m)]
    known = set(experts)
    return Places(
        modules,
        [n for n in modules if labels[n] in kinds],
        [
            n
            for n, m in modules.items()
            if labels[n] in ("linear", "conv1d") and n not in inside and is_a_product(m)
        ],
        experts,
        [p for n, m in single for p in loose_parameters(n, m) if p not in known],
    )


def reach(method: WeightMethod | HiddenMethod) -> tuple[str, ...]:
    """Return the kinds a method goes to: its own, and for one on weights whatever holds one."""
    beyond = BEYOND if isinstance(method, WeightMethod) and "linear" in method.kinds else ()
    return (*method.kinds, *beyond)


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
        targets: `all-linear` (a mixture's experts among them), a group (`residual`, `mlp-out`,
            `key-value`), a part of a model that sees images (`language`, `vision`, `projector`:
            its linear layers), or names, dotted suffixes or whole-name regexes; each of several
            must match.
        exclude: names, suffixes or regexes to leave out, with all that lies below them; each must
            match something.
        layers: block numbers, as integers or as text such as `0-3,8`.
        kinds: the layer kinds the method can adapt.

    Raises:
        TargetError: an entry matched nothing, or nothing the method can adapt.
    """
    there = places_in(model, kinds)
    able = set(there.adaptable)
    linear = [n for n in there.linear if n in able]
    some = [*there.adaptable, *there.experts, *there.loose]
    if not some:
        raise TargetError(f"the model {type(model).__name__} has no layer of kind {listed(kinds)}")
    parts = parts_of(model)
    if targets == "all-linear":
        chosen = {*all_linear(model, linear), *there.experts}
    else:
        chosen = set[str]()
        for entry in entries(targets):
            if entry in PARTS and parts:
                chosen |= set(linear_in(entry, parts, model, linear, there.experts))
            else:
                chosen |= set(matches_of(entry, there, kinds))
        check_whole(targets, there, chosen)
    for entry in entries(exclude):
        dropped = {n for n in there.everything() if matches(entry, n)}
        if not dropped:
            hint = nearest(entry, there.modules)
            raise TargetError(f"exclude {entry!r} matches no layer{hint}")
        chosen = {n for n in chosen if not any(is_within(n, of) for of in dropped)}
    chosen = in_layers(without_nested(chosen, there), layers)
    if not chosen:
        raise TargetError(
            f"targets {targets!r}, exclude {exclude!r} and layers {layers!r} leave no layer; "
            f"the model has {len(some)} that could be adapted, such as {some[0]!r}"
        )
    names = tuple(n for n in (*there.adaptable, *there.experts, *there.loose) if n in chosen)
    left_out = tuple(n for n in linear if n not in chosen)
    return Found(names, left_out, tuple(passed_over(model, {*names, *left_out})))


def is_a_product(module: nn.Module) -> bool:
    """Say whether a linear layer gives a tensor of its product's shape, as a router may not."""
    return kind(module) is not None or gives_product(module)


def without_nested(chosen: set[str], there: Places) -> set[str]:
    """Leave out what a chosen attention module adapts itself."""
    attention = {n for n in chosen if label(n, there.modules.get(n)) == "attention"}
    return {n for n in chosen if n.rpartition(".")[0] not in attention}


def label(name: str, module: nn.Module | None) -> str | None:
    """Return what a module is to a method: a layer's kind, `block`, or one of `BEYOND`."""
    if module is None:
        return None
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if is_convolution(module):
        return "convolution"
    found = matrix_kind(module)
    return found or ("block" if name.rsplit(".", 1)[-1] in BLOCKS else None)


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


def matches_of(entry: str, there: Places, kinds: Sequence[str]) -> list[str]:
    """Return the places one entry means; raise when there are none."""
    if entry in GROUPS:
        found = [n for n in there.adaptable if any(matches(g, n) for g in GROUPS[entry])]
    else:
        found = [n for n in there.adaptable if matches(entry, n)]
        found += parameters_meant(entry, there)
    if found:
        return found
    others = [n for n in there.modules if n and matches(entry, n)]
    if others:
        what = type(there.modules[others[0]]).__name__
        raise TargetError(
            f"target {entry!r} matches {others[0]!r}, a {what}; this method adapts {listed(kinds)}"
        )
    hint = nearest(entry, there.modules)
    raise TargetError(f"target {entry!r} matches no layer of the model{hint}")


def parameters_meant(entry: str, there: Places) -> list[str]:
    """Return the parameters that an entry means: by their names, or as experts once were named."""
    aliases = there.aliases()
    meant = {of for old, of in aliases.items() if matches(entry, old)}
    experts = [n for n in there.experts if n in meant or matches(entry, n) or owner_meant(entry, n)]
    loose = [n for n in there.loose if n == entry or n.endswith("." + entry)]
    return experts + [n for n in loose if n not in experts]


def owner_meant(entry: str, name: str) -> bool:
    """Say whether an entry is the module that holds a parameter."""
    owner = name.rpartition(".")[0]
    return owner == entry or owner.endswith("." + entry)


def check_whole(targets: str | Sequence[str], there: Places, chosen: set[str]) -> None:
    """Raise when only some of the layers that one parameter of the experts holds are named."""
    named = entries(targets)
    for name in chosen & set(there.experts):
        owner, _, leaf = name.rpartition(".")
        if any(matches(e, name) or owner_meant(e, name) for e in named):
            continue
        groups = [
            [old for old in group if any(matches(e, f"{owner}.{old}") for e in named)]
            for group in FUSED.get(leaf, ())
        ]
        whole = [len(got) == len(of) for got, of in zip(groups, FUSED.get(leaf, ()), strict=True)]
        if not any(whole):
            got = next(g for g in groups if g)
            of = next(of for of in FUSED[leaf] if got[0] in of)
            raise TargetError(
                f"the experts' {' and '.join(of)} are one parameter here, {name!r}, and targets "
                f"name {got[0]} alone: name both, or {leaf!r}, or only the layers meant by more "
                f"of their name, such as 'shared_experts.{got[0]}'"
            )


def nearest(entry: str, names: Iterable[str]) -> str:
    """Return a hint: the nearest last name component, or some that exist."""
    last = sorted({n.rsplit(".", 1)[-1] for n in names if n and not n.split(".")[-1].isdigit()})
    return "." + (did_you_mean(entry, last) or f" It has {listed(last[:12])}.")


def all_linear(model: nn.Module, linear: Sequence[str]) -> Iterator[str]:
    """Every linear layer of the blocks that are read; the output head stands outside them."""
    heads = {id(head) for head in output_heads(model)}
    modules, unread = dict(own_modules(model)), unread_blocks(model)
    inside = (n for n in linear if id(modules[n]) not in heads)
    return (n for n in inside if not any(is_within(n, block) for block in unread))


def linear_in(
    part: str,
    parts: dict[str, Part],
    model: nn.Module,
    linear: Sequence[str],
    experts: Sequence[str],
) -> list[str]:
    """Return the linear layers of a part; raise when it has none that can be adapted."""
    found = [name for name in all_linear(model, linear) if parts.get(name) == part]
    found += [name for name in experts if parts.get(name.rpartition(".")[0]) == part]
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
