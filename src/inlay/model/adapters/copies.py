"""Trained copies of a model's own parameters: selective methods and modules trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError, TargetError
from inlay.methods.base import Params, SelectMethod
from inlay.model.adapters.entries import block_number, entries, in_layers, under
from inlay.model.adapters.layer import copyable_buffers, own_modules
from inlay.model.load.vision import PARTS, parts_of
from inlay.model.seams.accelerate import brought_in
from inlay.model.seams.transformers import declare_ties
from inlay.storage.base import FrozenLinear


def selected_copies(
    model: nn.Module,
    method: SelectMethod,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    layers: str | tuple[int, ...] | None = None,
) -> dict[str, Params]:
    """Return trained copies, by module name, of the parameters a method selects."""
    modules = dict(own_modules(model))
    names = list(modules)
    kept = set(names) if targets in (None, "all") else set(in_parts(model, names, targets or ()))
    kept -= set(under(names, exclude))
    if layers is not None:
        kept = in_layers((n for n in kept if block_number(n) is not None), layers)
    spelled = entries(targets or ()) if method.takes_named_whole else ()
    copies = Copies()
    found: dict[str, Params] = {}
    for name in (n for n in names if n in kept):
        whole = any(entry.spells(name) for entry in spelled)
        copied = copies.of(modules[name], name, None if whole else method)
        if copied:
            found[name] = Params(copied)
    if not found:
        what = getattr(method, "name", "the training of biases")
        raise TargetError(
            f"{what} selects no parameter of this {type(model).__name__}: "
            f"it has none such as {what} trains, or targets, exclude and layers left none"
        )
    return found


def trained_modules(model: nn.Module, named: Sequence[str]) -> dict[str, Params]:
    if not named:
        return {}
    modules = dict(own_modules(model))
    kept = set(under(list(modules), named))
    copies = Copies()
    found = {n: Params(copies.of(m, n), statistics(m)) for n, m in modules.items() if n in kept}
    return {n: p for n, p in found.items() if any(p.names())}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    copyable, buffers = copyable_buffers(module), module._buffers.items()
    return {n: b.detach().clone() for n, b in buffers if b is not None and n in copyable}


class Copies:
    """Copies of parameters; one that two modules share (tied weights) is copied once."""

    def __init__(self) -> None:
        self.by_identity: dict[int, nn.Parameter] = {}
        self.copied: list[nn.Parameter] = []
        """Kept alive: an offloaded weight is gone after it is copied, and its id is reused."""

    def of(
        self, module: nn.Module, name: str, method: SelectMethod | None = None
    ) -> dict[str, Tensor]:
        if method is None or method.selects(module, "weight"):
            check_has_weight(module, name)
        with brought_in(module):
            return {
                n: self.copy(module, n, p, name)
                for n, p in own_parameters(module)
                if method is None or method.selects(module, n)
            }

    def copy(self, module: nn.Module, name: str, p: nn.Parameter, where: str) -> nn.Parameter:
        if not p.is_floating_point() or (isinstance(module, FrozenLinear) and name != "bias"):
            raise AdapterError(
                f"{where}.{name} is quantised and cannot train; load the model with "
                f"storage 'dense', or choose a method that adds parameters, such as LoRA"
            )
        if id(p) not in self.by_identity:
            self.copied.append(p)
            wide = torch.promote_types(p.dtype, torch.float32)
            self.by_identity[id(p)] = nn.Parameter(p.detach().clone().to(wide))
        return self.by_identity[id(p)]


def check_has_weight(module: nn.Module, where: str) -> None:
    if isinstance(module, FrozenLinear) and "weight" not in module._parameters:
        raise AdapterError(
            f"{where}.weight is {module.storage} and cannot train; load the model without "
            "streaming, or choose a method that adds parameters, such as LoRA"
        )


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module._parameters.items() if p is not None]


def mark_shared(tables: Iterable[Params]) -> None:
    """Mark repeated tensors as tied, so that `save_pretrained` writes each of them once."""
    seen: set[int] = set()
    for params in tables:
        own = {name: id(p) for name, p in params._parameters.items() if p is not None}
        again = [name for name, number in own.items() if number in seen]
        if again:
            declare_ties(params, dict.fromkeys(again, ""))
        seen |= set(own.values())


def in_parts(model: nn.Module, names: Sequence[str], targets: str | Sequence[str]) -> Iterator[str]:
    parts = parts_of(model)
    for entry in entries(targets):
        if entry in PARTS and parts:
            yield from (name for name in names if parts.get(name) == entry)
        else:
            yield from under(names, entry)
