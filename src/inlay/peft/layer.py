"""An adapted layer as HF PEFT's own looks from outside: its names, its state, its verbs.

TRL, `peft.optimizers` and `peft.helpers` find adapters by `isinstance` of HF PEFT's layers, by
names such as `lora_B.default.weight`, by `r` and `scaling`. The tensors stay where Inlay has them;
the names are views (views.py), through which the tensors are read and set.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from inlay.model.adapters.change_class import change_class
from inlay.model.adapters.layer import AdaptedLayer
from inlay.peft.errors import AdapterError
from inlay.peft.views import PeftName, named_below, tables, with_tensors


@dataclass(frozen=True)
class Look:
    """What a layer shows of its adapters."""

    kind: str | None
    names: tuple[tuple[str, tuple[PeftName, ...]], ...]
    """HF PEFT's names of each adapter's tensors."""
    alphas: tuple[tuple[str, float], ...]
    """The alpha in each adapter's configuration, whatever its scale is now."""
    whole: bool
    """Whether the layer itself is in `modules_to_save`."""
    chosen: tuple[str, ...] = ()
    """The active adapters, also those that have nothing at this layer."""
    merged: tuple[str, ...] = ()
    enabled: bool = True


class PeftLayer(AdaptedLayer):
    """An adapted layer with HF PEFT's names beside its own.

    Its verbs set this layer alone; `set_adapter` and the like of the model set every layer alike.
    """

    plain: ClassVar[type[AdaptedLayer]]
    shown: ClassVar[str]
    """The name of HF PEFT's class for the layer."""
    look: ClassVar[Look]
    made: ClassVar[Callable[[type[AdaptedLayer], Look], type[AdaptedLayer]]]
    """The function that makes the class for a look."""

    @property
    def disable_adapters(self) -> bool:
        return not self.look.enabled

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, also of those that have nothing here."""
        return list(self.look.chosen)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.choose(names)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.look.merged)

    @property
    def merged(self) -> bool:
        return bool(self.look.merged)

    def choose(self, names: str | Sequence[str]) -> None:
        self.show(replace(self.look, chosen=as_names(names)))

    def show(self, look: Look) -> None:
        cls = type(self)
        change_class(self, cls.made(cls.plain, look))
        acts = look.enabled and not look.merged
        self.active = tuple(n for n in look.chosen if acts and n in self.adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = as_names(adapter_names)
        for name in self.methods:
            self.params(name).requires_grad_(name in names and not inference_mode)
        self.choose(names)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for name in set(as_names(adapter_names)) & set(self.methods):
            self.params(name).requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        if enabled:
            self.set_adapter(self.active_adapters)
        for name in () if enabled else self.methods:
            self.params(name).requires_grad_(False)
        self.show(replace(self.look, enabled=enabled))

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.methods)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Refuse: a merge is of the whole model, which keeps what it takes to undo it."""
        raise AdapterError(
            "one layer alone cannot be merged; call merge_adapter or merge_and_unload of the model"
        )

    def unmerge(self) -> None:
        raise AdapterError("one layer alone cannot be unmerged; call unmerge_adapter of the model")

    def delete_adapter(self, adapter_name: str, new_active_adapters: Any = None) -> None:
        raise AdapterError(
            f"adapter {adapter_name!r} cannot be deleted from one layer alone; call delete_adapter "
            "of the model"
        )

    def __getattr__(self, name: str) -> Any:
        if name in {each.table.partition(".")[0] for _, names in self.look.names for each in names}:
            return self.views()[name]
        return super().__getattr__(name)

    def _get_name(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        shell = nn.Module()
        shell._modules = {n: m for n, m in self.named_children() if n != "adapters"}
        vars(shell).update(_get_name=self._get_name, extra_repr=self.extra_repr)
        return nn.Module.__repr__(shell)

    def views(self) -> dict[str, nn.Module]:
        return tables(self, self.look.names)

    def get_base_layer(self) -> nn.Module:
        return with_tensors(self, None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.views().items()
        yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """Yield every child once: what moves, casts and trains tensors need not see them twice."""
        yield from dict.fromkeys(m for m in self._modules.values() if m is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        yield from named_below(self, self.named_children(), memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = super().state_dict(*args, **kwargs)
        for ours, theirs in self.keys_in(kwargs.get("prefix", args[1] if len(args) > 1 else "")):
            if ours in found:
                found[theirs] = found.pop(ours)
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for ours, theirs in self.keys_in(prefix):
            if theirs in state_dict:
                state_dict[ours] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def keys_in(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield the key of every adapter tensor in a state: Inlay's, and HF PEFT's."""
        for adapter, names in self.look.names:
            for name in names:
                theirs = ".".join(part for part in (name.table, adapter, name.below) if part)
                at = f"{name.part}.{name.tensor}" if name.part else name.tensor
                yield f"{prefix}adapters.{adapter}.{at}", prefix + theirs


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
