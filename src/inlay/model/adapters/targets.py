"""Find the layers a method goes to: names, suffixes, regexes and named groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from inlay.errors import TargetError
from inlay.methods.base import HiddenMethod, WeightMethod
from inlay.model.adapters.entries import Entry, entries, in_layers, is_suffix, nearest
from inlay.model.adapters.places import BEYOND, BLOCKS, FUSED, Places, label, passed_over, places_in
from inlay.model.load.vision import PARTS, Part, is_within, parts_of, unread_blocks
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
    """The places a method goes to, the linear layers left out, and what else has weights."""

    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    """What is no linear layer and was not chosen, with what it is."""


def adaptable_kinds(method: WeightMethod | HiddenMethod) -> tuple[str, ...]:
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
    """Return the layers of these kinds that `targets` means, less `exclude`, in these blocks.

    `targets` is `all-linear` (a mixture's experts among them), a group (`residual`, `mlp-out`,
    `key-value`), a part of a model that sees images (`language`, `vision`, `projector`: its linear
    layers), or entries, of which each must match something that the method can adapt.
    """
    places = places_in(model, kinds)
    able = places.all_adaptable()
    if not able:
        what = ", ".join(kinds)
        raise TargetError(f"the model {type(model).__name__} has no layer of kind {what}")
    chosen = named_places(model, targets, places, kinds)
    for entry in entries(exclude):
        dropped = [n for n in places.everything() if entry.matches(n)]
        if not dropped:
            hint = nearest(entry, places.modules)
            raise TargetError(f"exclude {entry!r} matches no layer{hint}")
        chosen = {n for n in chosen if not any(is_within(n, each) for each in dropped)}
    chosen = in_layers(without_nested(chosen, places), layers)
    if not chosen:
        raise TargetError(
            f"targets {targets!r}, exclude {exclude!r} and layers {layers!r} leave no layer; "
            f"the model has {len(able)} that could be adapted, such as {able[0]!r}"
        )
    names = tuple(n for n in able if n in chosen)
    left_out = tuple(n for n in places.linear if n not in chosen)
    return Found(names, left_out, tuple(passed_over(model, {*names, *left_out})))


def named_places(
    model: nn.Module, targets: str | Sequence[str], places: Places, kinds: Sequence[str]
) -> set[str]:
    if targets == "all-linear":
        return {*all_linear(model, places), *places.experts}
    parts = parts_of(model)
    chosen: set[str] = set()
    for entry in entries(targets):
        if entry in PARTS and parts:
            chosen |= set(linear_in(entry, parts, model, places))
        else:
            chosen |= set(places_of_entry(entry, places, kinds))
    check_whole_experts(entries(targets), places, chosen)
    return chosen


def without_nested(chosen: set[str], places: Places) -> set[str]:
    """Leave out what a chosen attention module adapts itself."""
    attention = {n for n in chosen if label(n, places.modules.get(n)) == "attention"}
    return {n for n in chosen if n.rpartition(".")[0] not in attention}


def places_of_entry(entry: Entry, places: Places, kinds: Sequence[str]) -> list[str]:
    if entry in GROUPS:
        group = entries(GROUPS[entry])
        found = [n for n in places.adaptable if any(each.matches(n) for each in group)]
    else:
        found = [n for n in places.adaptable if entry.matches(n)]
        found += parameters_meant(entry, places)
    if found:
        return found
    others = [n for n in places.modules if n and entry.matches(n)]
    if others:
        what = type(places.modules[others[0]]).__name__
        raise TargetError(
            f"target {entry!r} matches {others[0]!r}, a {what}; this method adapts "
            f"{', '.join(kinds)}"
        )
    hint = nearest(entry, places.modules)
    raise TargetError(f"target {entry!r} matches no layer of the model{hint}")


def parameters_meant(entry: Entry, places: Places) -> list[str]:
    """Return the parameters that an entry means: by their names, or as experts once were named."""
    old = {name for alias, name in places.aliases().items() if entry.matches(alias)}
    experts = [n for n in places.experts if n in old or entry.matches(n) or names_owner(entry, n)]
    return experts + [n for n in places.loose if is_suffix(entry, n) and n not in experts]


def names_owner(entry: str, name: str) -> bool:
    return is_suffix(entry, name.rpartition(".")[0])


def check_whole_experts(named: Sequence[Entry], places: Places, chosen: set[str]) -> None:
    """Raise when only some of the layers that one parameter of the experts holds are named."""
    for name in chosen & set(places.experts):
        owner, _, leaf = name.rpartition(".")
        if any(e.matches(name) or names_owner(e, name) for e in named):
            continue
        groups = {
            group: [old for old in group if any(e.matches(f"{owner}.{old}") for e in named)]
            for group in FUSED.get(leaf, ())
        }
        partly = [group for group, got in groups.items() if got]
        if partly and not any(len(got) == len(group) for group, got in groups.items()):
            first = groups[partly[0]][0]
            raise TargetError(
                f"the experts' {' and '.join(partly[0])} are one parameter here, {name!r}, and "
                f"targets name {first} alone: name both, or {leaf!r}, or only the layers meant by "
                f"more of their name, such as 'shared_experts.{first}'"
            )


def all_linear(model: nn.Module, places: Places) -> Iterator[str]:
    """Yield the linear layers of the blocks that are read; the output head stands outside them."""
    heads = {id(head) for head in output_heads(model)}
    unread = unread_blocks(model)
    for name in places.linear:
        if id(places.modules[name]) not in heads and not any(is_within(name, b) for b in unread):
            yield name


def linear_in(part: str, parts: dict[str, Part], model: nn.Module, places: Places) -> list[str]:
    found = [name for name in all_linear(model, places) if parts.get(name) == part]
    found += [name for name in places.experts if parts.get(name.rpartition(".")[0]) == part]
    if not found:
        raise TargetError(
            f"the part {part!r} of {type(model).__name__} has no linear layer to adapt; train it "
            "whole with modules_to_save"
        )
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def output_heads(model: nn.Module) -> list[nn.Module]:
    head = output_head(model)
    if head is not None:
        return [head]
    body = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if not isinstance(body, nn.Module):
        return []
    inside = {id(m) for m in body.modules()}
    return [m for m in model.modules() if id(m) not in inside and kind(m) == "linear"]
