"""Layers named in `modules_to_save` and trained token rows, as HF PEFT's wrappers of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.methods.tokens import tokens_of
from inlay.model.adapters.change_class import change_class
from inlay.model.adapters.layer import AdaptedLayer, own_modules
from inlay.model.pickling import MADE_BY, reduced
from inlay.peft.layer import PeftLayer
from inlay.peft.seam import ModulesToSaveWrapper, TrainableTokensLayer
from inlay.peft.tuner_layer import widths_of
from inlay.peft.views import with_tensors


class Auxiliary:
    """What HF PEFT's two wrappers have in common: tables of tensors, and no other numbers."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return False


class SavedLayer(Auxiliary, PeftLayer):
    """A layer that adapters train whole, named in `modules_to_save`."""

    @property
    def original_module(self) -> nn.Module:
        return self.get_base_layer()

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in super().active_adapters if name in self.methods]

    @property
    def _adapters(self) -> set[str]:
        return set(self.methods)


class TokenLayer(SavedLayer):
    """An embedding, or a head, of which adapters train some rows."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("token_adapter.trainable_tokens_delta",)

    def views(self) -> dict[str, nn.Module]:
        found = super().views()
        return {**found, "token_adapter": TokenAdapter(self, found["token_adapter"])}


class TokenAdapter(nn.Module):
    """The layer that HF PEFT has inside its wrapper of an embedding."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: TokenLayer, rows: nn.Module) -> None:
        super().__init__()
        vars(self)["layer"] = weakref.ref(layer)
        self._modules.update(rows._modules)

    @property
    def in_features(self) -> int | None:
        """The number of an embedding's tokens, or the width of a head's input."""
        return widths_of(vars(self)["layer"]())[0]

    @property
    def out_features(self) -> int | None:
        """The width of an embedding's output, or the number of a head's tokens."""
        return widths_of(vars(self)["layer"]())[1]

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """The base's own rows of each adapter's tokens."""
        layer: TokenLayer = vars(self)["layer"]()
        assert layer.base is not None
        rows = layer.base.dequantize()
        rows = rows.T if layer.base.layer_kind == "embedding" else rows
        tokens = {name: tokens_of(layer.params(name), "token_rows") for name in layer.methods}
        return {name: rows[list(ids)].detach() for name, ids in tokens.items() if ids}

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        return getattr(vars(self)["layer"](), name)


TrainableTokensLayer.register(TokenAdapter)


class SavedContainer(Auxiliary, nn.Module):
    """A module of several layers, named in `modules_to_save`; its verbs are those of each layer."""

    plain: ClassVar[type[nn.Module]]

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__

    def layers(self) -> Iterator[PeftLayer]:
        return (m for _, m in own_modules(self) if isinstance(m, PeftLayer))

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: self.of_adapter(name) for name in sorted(self._adapters)})

    def of_adapter(self, name: str | None) -> nn.Module:
        """Return the module on the tensors of one adapter, or on its own."""
        found = without_adapters(self, name)
        assert isinstance(found, nn.Module)
        return found

    @property
    def original_module(self) -> nn.Module:
        return self.of_adapter(None)

    @property
    def _adapters(self) -> set[str]:
        return {name for layer in self.layers() for name in layer.methods}

    @property
    def disable_adapters(self) -> bool:
        return any(layer.disable_adapters for layer in self.layers())

    @property
    def active_adapters(self) -> list[str]:
        return next((layer.active_adapters for layer in self.layers()), [])

    active_adapter = active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        return next((layer.merged_adapters for layer in self.layers()), [])

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        for layer in self.layers():
            layer.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        for layer in self.layers():
            layer.enable_adapters(enabled)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters


def without_adapters(module: nn.Module, adapter: str | None) -> nn.Module:
    """Return a module and all below it without adapters, on one adapter's tensors or on its own."""
    if isinstance(module, AdaptedLayer):
        return with_tensors(module, adapter)
    plain = type(module).plain if isinstance(module, SavedContainer) else type(module)
    found = plain.__new__(plain)
    vars(found).update(vars(module))
    below = {k: m and without_adapters(m, adapter) for k, m in module._modules.items()}
    found._modules = below
    return found


@cache
def wrapper_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a module's class that HF PEFT's tools take for their wrapper."""
    body: dict[str, Any] = {"plain": plain, "__reduce_ex__": reduced}
    body |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    body[MADE_BY] = (wrapper_class, plain)
    bases: tuple[Any, ...] = (SavedContainer, plain, ModulesToSaveWrapper)
    return type(plain.__name__, bases, body)


def become_wrapper(module: nn.Module, classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    if not isinstance(module, SavedContainer):
        classes.append((module, type(module)))
        change_class(module, wrapper_class(type(module)))
