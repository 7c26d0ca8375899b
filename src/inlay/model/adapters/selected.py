"""Trained copies of a model's own parameters: selective methods and modules trained whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError, TargetError
from inlay.methods.base import Params, SelectMethod
from inlay.model.adapters.layer import moved_buffers, own_modules
from inlay.model.adapters.targets import in_layers, matches, nearest
from inlay.model.load.vision import PARTS, parts_of
from inlay.model.seams.accelerate import brought_in
from inlay.storage.base import FrozenLinear


def selected_copies(
    model: nn.Module,
    method: SelectMethod,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    layers: str | tuple[int, ...] | None = None,
) -> dict[str, Params]:
    """Return trained copies, per module name, of the parameters a method selects.

    Raises:
        TargetError: nothing is selected, or an entry of `targets` or `exclude` matches nothing.
        AdapterError: a selected weight is quantised, so that it cannot train.
    """
    names = [n for n, _ in own_modules(model)]
    kept = set(names) if targets in (None, "all") else set(in_parts(model, names, targets or ()))
    kept -= set(under(names, exclude))
    if layers is not None:
        kept = in_layers((n for n in kept if has_block(n)), layers)
    copies = Copies()
    whole = named_themselves(method, names, targets)
    chosen = {
        n: dict(copies.all_of(m, n)) if n in whole else copies.of(m, method, n)
        for n, m in own_modules(model)
        if n in kept
    }
    chosen = {n: p for n, p in chosen.items() if p}
    if not chosen:
        what = getattr(method, "name", "the training of biases")
        raise TargetError(
            f"{what} selects no parameter of this {type(model).__name__}: "
            f"it has none such as {what} trains, or targets, exclude and layers left none"
        )
    return {n: Params(p) for n, p in chosen.items()}


def named_themselves(
    method: SelectMethod, names: Sequence[str], targets: str | Sequence[str] | None
) -> set[str]:
    """Return the modules that targets spell out, where the method trains such whole.

    A pattern names no module itself: it goes to those of its modules that the method is for.
    """
    if targets is None or not method.takes_named_whole:
        return set()
    entries = (targets,) if isinstance(targets, str) else targets
    spelled = {re.sub(r"\\(.)", r"\1", word) for entry in entries for word in entry.split("|")}
    return {n for n in names if any(n == word or n.endswith("." + word) for word in spelled)}


def trained_modules(model: nn.Module, entries: Sequence[str]) -> dict[str, Params]:
    """Return trained copies of every parameter of the modules named, and of those below them."""
    if not entries:
        return {}
    names = [n for n, _ in own_modules(model)]
    wanted = set(under(names, entries))
    copies = Copies()
    modules = [(n, m) for n, m in own_modules(model) if n in wanted]
    found = {n: Params(copies.all_of(m, n), statistics(m)) for n, m in modules}
    return {n: p for n, p in found.items() if any(p.names())}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Copy the buffers that are saved with a module, such as running statistics."""
    return {
        n: b.detach().clone()
        for n, b in module._buffers.items()
        if b is not None and n in moved_buffers(module)
    }


class Copies:
    """Copies of parameters; one that two modules share (tied weights) is copied once."""

    def __init__(self) -> None:
        self.by_identity: dict[int, nn.Parameter] = {}
        self.copied: list[nn.Parameter] = []
        """Kept alive, as what a hook brings in is gone after it is copied and its id is reused."""

    def of(self, module: nn.Module, method: SelectMethod, name: str) -> dict[str, Tensor]:
        """Copy the parameters of one module that the method selects."""
        if method.selects(module, "weight"):
            check_held(module, name)
        with brought_in(module):
            own = own_parameters(module)
            return {n: self.copy(module, n, p, name) for n, p in own if method.selects(module, n)}

    def all_of(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Copy every parameter of one module."""
        check_held(module, name)
        with brought_in(module):
            return {n: self.copy(module, n, p, name) for n, p in own_parameters(module)}

    def copy(self, module: nn.Module, name: str, p: nn.Parameter, where: str) -> nn.Parameter:
        """Copy one parameter in the precision that adapters are stored in."""
        if not p.is_floating_point() or (isinstance(module, FrozenLinear) and name != "bias"):
            raise AdapterError(
                f"{where}.{name} is quantised and cannot train; load the model with "
                f"storage 'dense', or choose a method that adds parameters, such as LoRA"
            )
        if id(p) not in self.by_identity:
            self.copied.append(p)
            wide = torch.promote_types(p.dtype, torch.float32)
            copied = p.detach().clone().to(wide)
            self.by_identity[id(p)] = nn.Parameter(copied)
        return self.by_identity[id(p)]


def check_held(module: nn.Module, where: str) -> None:
    """Raise when a module's weight lies elsewhere, so that it has no parameter to train."""
    if isinstance(module, FrozenLinear) and "weight" not in module._parameters:
        raise AdapterError(
            f"{where}.weight is {module.storage} and cannot train; load the model without "
            "streaming, or choose a method that adds parameters, such as LoRA"
        )


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters a module holds itself."""
    return [(n, p) for n, p in module._parameters.items() if p is not None]


def in_parts(model: nn.Module, names: Sequence[str], entries: str | Sequence[str]) -> Iterator[str]:
    """Every name in a part of a model that sees images, or `under` an entry that is no part."""
    parts = parts_of(model)
    for entry in (entries,) if isinstance(entries, str) else entries:
        if entry in PARTS and parts:
            yield from (name for name in names if parts.get(name) == entry)
        else:
            yield from under(names, entry)


def under(names: Sequence[str], entries: str | Sequence[str]) -> Iterator[str]:
    """Every name that an entry matches, or that lies below one that it matches."""
    for entry in (entries,) if isinstance(entries, str) else entries:
        roots = [n for n in names if n and matches(entry, n)]
        if not roots:
            raise TargetError(f"{entry!r} matches no module of the model{nearest(entry, names)}")
        for root in roots:
            yield from (n for n in names if n == root or n.startswith(root + "."))


def has_block(name: str) -> bool:
    """Say whether a dotted name has a block number in it."""
    return any(part.isdigit() for part in name.split("."))
