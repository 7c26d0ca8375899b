"""An adapted layer as HF PEFT's own looks from outside: its names, its numbers, its class.

TRL, `peft.optimizers` and `peft.helpers` find adapters by `isinstance` of HF PEFT's layers, by
names such as `lora_B.default.weight`, by `r` and `scaling`. The tensors stay where Inlay has them;
what is seen here are views (views.py), through which they are read and set.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from torch import nn

from inlay.peft.look import Switched
from inlay.peft.views import tables, with_tensors


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
