"""Tied weights that a merge unties: each gets its own tensor, is saved and is read back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from inlay.model.example_inputs import configs
from inlay.model.seams.transformers import TIES, declare_ties, declared_ties

TIED = "tie_word_embeddings"


class Ties:
    """The groups of parameters that shared one tensor before a merge, and what becomes of them.

    transformers writes one member of a group, and ties the rest to it when it reads the file. Once
    one member has other values, that would overwrite it, or leave the others without any.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups = groups_of(model)
        self.owners = [(m.config, keys) for m, keys in tying(model)]
        self.set_false: list[PreTrainedConfig] = []

    def broken(self) -> list[list[str]]:
        now = dict(self.model.named_parameters(remove_duplicate=False))
        here = ([n for n in names if n in now] for names in self.groups)
        return [names for names in here if len({id(now[n]) for n in names}) > 1]

    def untied(self) -> tuple[str, ...]:
        """Return the parameters that are no longer the first of their group."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        return tuple(n for g in self.broken() for n in g[1:] if now[n] is not now[g[0]])

    def write_untied(self) -> None:
        """Write into the configurations that those weights are not tied, where they keep it.

        Some families set it to True whenever they are built (T5). transformers 5 leaves members
        apart that a file holds with different values, so theirs are read back right all the same.
        """
        config: Any = getattr(self.model, "config", None)
        if not self.broken() or not isinstance(config, PreTrainedConfig):
            return
        untied = {name for group in self.broken() for name in group}
        owners = [owner for owner, keys in self.owners if keys & untied]
        wanted = {id(c): c for o in (*owners, config) for c in (o, o.get_text_config())}
        self.set_false = [c for c in wanted.values() if getattr(c, TIED, False)]
        for each in self.set_false:
            setattr(each, TIED, False)
        if self.set_false and not stays(config):
            self.write_back()

    def write_back(self) -> None:
        for each in self.set_false:
            setattr(each, TIED, True)
        self.set_false = []

    def warning(self) -> str | None:
        config: Any = getattr(self.model, "config", None)
        if self.set_false or not self.broken() or not getattr(config, TIED, False):
            return None
        return (
            f"{', '.join(self.untied())} no longer equal what they were tied to, and a "
            f"{type(config).__name__} says that they are tied, and cannot say otherwise. "
            "transformers 5 reads the file correctly, by its values; a reader that goes by the "
            "configuration alone would tie them: keep the adapter unmerged for such a reader"
        )

    def separate(self) -> tuple[str, ...]:
        untied = self.untied()
        if not untied or not isinstance(self.model, PreTrainedModel):
            return untied
        declared = {name for _, keys in self.owners for name in keys}
        apart = [set(names) for names in self.broken()]
        for names in groups_of(self.model):
            if any(set(names) & group for group in apart) or (
                self.set_false and set(names) & declared
            ):
                give_own_tensors(self.model, names)
        if not self.set_false:
            forget(self.model, {name for group in apart for name in group})
        keys = tied_names(self.model, all_submodels=True)
        self.model.all_tied_weights_keys = keys
        return untied


def groups_of(model: nn.Module) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def tied_names(model: PreTrainedModel, *, all_submodels: bool = False) -> dict[str, str]:
    """Return the ties among the base's parameters; patterns would match adapters too."""
    with own_names(model):
        return declared_ties(model, all_submodels)


@contextmanager
def own_names(model: nn.Module) -> Generator[None]:
    inside = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for module in inside:
        for listing in ("named_parameters", "named_buffers"):
            vars(module)[listing] = partial(without_adapters, getattr(module, listing))
    try:
        yield
    finally:
        for module in inside:
            del vars(module)["named_parameters"], vars(module)["named_buffers"]


def without_adapters(listing: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
    return (pair for pair in listing(*args, **kwargs) if ".adapters." not in f".{pair[0]}")


def tying(model: nn.Module) -> Iterator[tuple[PreTrainedModel, set[str]]]:
    """Yield the transformers models inside this one, each with the names that its class ties."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel):
            keys = tied_names(module)
            start = f"{prefix}." if prefix else ""
            yield module, {start + name for name in {*keys, *keys.values()}}


def stays(config: PreTrainedConfig) -> bool:
    """Return whether a configuration keeps its settings of ties when written and read."""
    again = type(config).from_dict(copy.deepcopy(config.to_dict()))
    pairs = zip(configs(config), configs(again), strict=False)
    return all(getattr(a, TIED, None) == getattr(b, TIED, None) for a, b in pairs)


def give_own_tensors(model: nn.Module, names: list[str]) -> None:
    """Give each of these parameters a tensor of its own, in a module of its own."""
    seen: set[nn.Module] = set()
    for number, name in enumerate(names):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if module in seen:
            module = own_copy(model, path)
        seen.add(module)
        value = module._parameters[leaf]
        assert value is not None
        if number:
            module._parameters[leaf] = nn.Parameter(value.detach().clone(), value.requires_grad)


def own_copy(model: nn.Module, path: str) -> nn.Module:
    """Replace a module that stands at several places by a shallow copy; return the copy."""
    module = copy.copy(model.get_submodule(path))
    module._parameters = dict(module._parameters)
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module
    return module


def forget(model: nn.Module, names: set[str]) -> None:
    """Have `tie_weights` leave these alone on this model, though its class ties them."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        keys: Any = getattr(module, TIES, None)
        if not isinstance(module, PreTrainedModel) or not keys:
            continue
        start = f"{prefix}." if prefix else ""
        left = tied_names(module)
        kept = {t: s for t, s in left.items() if not {start + t, start + s} & names}
        if kept != left:
            declare_ties(module, kept)
