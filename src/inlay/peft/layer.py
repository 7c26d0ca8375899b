"""How an adapted layer is to look to code that was written for HF PEFT, and the verbs it has."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from inlay.model.adapters.instance import change_class
from inlay.model.adapters.layer import AdaptedLayer
from inlay.peft.errors import AdapterError
from inlay.peft.views import Word, tables, with_tensors

Words = tuple[tuple[str, tuple[Word, ...]], ...]
"""What HF PEFT calls the tensors of each adapter."""


Alphas = tuple[tuple[str, float], ...]
"""The alpha that each adapter's configuration says, whatever its scale is now."""


@dataclass(frozen=True)
class Look:
    """What a layer shows of its adapters."""

    kind: str | None
    words: Words
    alphas: Alphas
    whole: bool
    """Whether it is itself in `modules_to_save`."""
    chosen: tuple[str, ...] = ()
    """The active adapters, those that have nothing at this layer among them."""
    merged: tuple[str, ...] = ()
    enabled: bool = True


class Switched(AdaptedLayer):
    """The verbs of one layer: which adapters act at it, and which train.

    `set_adapter`, `disable_adapter` and the like of the model set every layer alike again.
    """

    plain: ClassVar[type[AdaptedLayer]]
    shown: ClassVar[str]
    """What HF PEFT calls the layer's class."""
    look: ClassVar[Look]
    made: ClassVar[Callable[[type[AdaptedLayer], Look], type[AdaptedLayer]]]
    """What makes the class for a look."""

    @property
    def disable_adapters(self) -> bool:
        """Whether the base alone acts here."""
        return not type(self).look.enabled

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, those that have nothing here among them."""
        return list(type(self).look.chosen)

    @property
    def active_adapter(self) -> list[str]:
        """The names of the active adapters."""
        return self.active_adapters

    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        self.choose(names)

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged into the weight now."""
        return list(type(self).look.merged)

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weight now."""
        return bool(type(self).look.merged)

    def choose(self, names: str | Sequence[str]) -> None:
        """Let these adapters act here, unless adapters are disabled or merged."""
        chosen = (names,) if isinstance(names, str) else tuple(names)
        self.show(replace(type(self).look, chosen=chosen))

    def show(self, look: Look) -> None:
        """Take another look, and let those adapters act here that it says."""
        change_class(self, type(self).made(type(self).plain, look))
        acts = look.enabled and not look.merged
        self.active = tuple(n for n in look.chosen if acts and n in self.adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones here; they train unless `inference_mode`."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in self.methods:
            self.params(name).requires_grad_(name in names and not inference_mode)
        self.choose(names)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let adapters train here, or freeze them."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in set(names) & set(self.methods):
            self.params(name).requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters act and train here, or let the base alone act."""
        if enabled:
            self.set_adapter(self.active_adapters)
        for name in () if enabled else self.methods:
            self.params(name).requires_grad_(False)
        self.show(replace(type(self).look, enabled=enabled))

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.methods)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Refuse: a merge is of the whole model, which keeps what it takes to undo it.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            "one layer alone cannot be merged; call merge_adapter or merge_and_unload of the model"
        )

    def unmerge(self) -> None:
        """Refuse, as `merge`.

        Raises:
            AdapterError: always.
        """
        raise AdapterError("one layer alone cannot be unmerged; call unmerge_adapter of the model")

    def delete_adapter(self, adapter_name: str, new_active_adapters: Any = None) -> None:
        """Refuse: an adapter is deleted from the whole model.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"adapter {adapter_name!r} cannot be deleted from one layer alone; call delete_adapter "
            "of the model"
        )


class Presented(Switched):
    """An adapted layer with HF PEFT's names beside its own."""

    def __getattr__(self, name: str) -> Any:
        """Return a table of tensors by HF PEFT's name, or the layer's attribute."""
        words = type(self).look.words
        if name in {word.table.partition(".")[0] for _, each in words for word in each}:
            return self.views()[name]
        return super().__getattr__(name)

    def _get_name(self) -> str:
        return type(self).shown

    def __repr__(self) -> str:
        shell = nn.Module()
        shell._modules = {n: m for n, m in self.named_children() if n != "adapters"}
        vars(shell).update(_get_name=self._get_name, extra_repr=self.extra_repr)
        return nn.Module.__repr__(shell)

    def views(self) -> dict[str, nn.Module]:
        """Return the tables of tensors by HF PEFT's names."""
        return tables(self, type(self).look.words)

    def get_base_layer(self) -> nn.Module:
        """Return the layer without adapters, on the same tensors."""
        return with_tensors(self, None)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Every child by name, adapters first by HF PEFT's."""
        yield from self.views().items()
        yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """Every child once: what moves, casts and trains the tensors need not see them twice."""
        yield from dict.fromkeys(m for m in self._modules.values() if m is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Every module below by name, adapters first by HF PEFT's."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self.named_children():
            below = f"{prefix}.{name}" if prefix else name
            yield from child.named_modules(memo, below, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state with HF PEFT's names of adapters."""
        found: Any = super().state_dict(*args, **kwargs)
        for ours, theirs in self.spelled(kwargs.get("prefix", args[1] if len(args) > 1 else "")):
            if ours in found:
                found[theirs] = found.pop(ours)
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for ours, theirs in self.spelled(prefix):
            if theirs in state_dict:
                state_dict[ours] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def spelled(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Every adapter tensor's name in the state, Inlay's and HF PEFT's."""
        for adapter, words in type(self).look.words:
            for word in words:
                theirs = ".".join(part for part in (word.table, adapter, word.below) if part)
                at = f"{word.part}.{word.tensor}" if word.part else word.tensor
                yield f"{prefix}adapters.{adapter}.{at}", prefix + theirs
