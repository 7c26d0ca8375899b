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
from inlay.peft.layer import Presented
from inlay.peft.seam import ModulesToSaveWrapper, TrainableTokensLayer
from inlay.peft.tuner_layer import widths_of
from inlay.peft.views import with_tensors


class Wrapper(Presented):
    """A layer that HF PEFT has inside a wrapper."""

    @property
    def original_module(self) -> nn.Module:
        """The layer without adapters, on the same tensors."""
        return self.get_base_layer()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters that have a copy of this layer."""
        return [name for name in super().active_adapters if name in self.methods]

    @property
    def _adapters(self) -> set[str]:
        return set(self.methods)

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return False


class SavedLayer(Wrapper):
    """A layer that adapters train whole, named in `modules_to_save`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    other_param_names: ClassVar[tuple[str, ...]] = ()


class TokenLayer(Wrapper):
    """An embedding, or a head, some rows of which adapters train."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def views(self) -> dict[str, nn.Module]:
        """Return the tables of tensors, the rows in a layer that has the verbs of this one."""
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
        """How many tokens an embedding has, or how wide a head's input is."""
        return widths_of(vars(self)["layer"]())[0]

    @property
    def out_features(self) -> int | None:
        """How wide an embedding's output is, or how many tokens a head has."""
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
        """Return the rows, or what the layer answers."""
        if name in self._modules:
            return self._modules[name]
        return getattr(vars(self)["layer"](), name)


TrainableTokensLayer.register(TokenAdapter)


class SavedContainer(nn.Module):
    """A module of several layers that adapters train whole, named in `modules_to_save`."""

    plain: ClassVar[type[nn.Module]]
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__

    def layers(self) -> Iterator[Presented]:
        """Every layer below that adapters have a copy of."""
        return (m for _, m in own_modules(self) if isinstance(m, Presented))

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        """The module as each adapter has it."""
        return nn.ModuleDict({name: self.of_adapter(name) for name in sorted(self._adapters)})

    def of_adapter(self, name: str | None) -> nn.Module:
        """Return the module on the tensors of one adapter, or on its own."""
        found = bare(self, name)
        assert isinstance(found, nn.Module)
        return found

    @property
    def original_module(self) -> nn.Module:
        """The module without adapters, on the same tensors."""
        return self.of_adapter(None)

    @property
    def _adapters(self) -> set[str]:
        return {name for layer in self.layers() for name in layer.methods}

    @property
    def disable_adapters(self) -> bool:
        """Whether the base alone acts here."""
        return any(layer.disable_adapters for layer in self.layers())

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return next((layer.active_adapters for layer in self.layers()), [])

    @property
    def active_adapter(self) -> list[str]:
        """The names of the active adapters."""
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged now."""
        return next((layer.merged_adapters for layer in self.layers()), [])

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones here; they train unless `inference_mode`."""
        for layer in self.layers():
            layer.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters act and train here, or let the base alone act."""
        for layer in self.layers():
            layer.enable_adapters(enabled)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    def _hasattr_wrapped(self, name: str, modules: Any) -> bool:
        return False


def bare(module: nn.Module, adapter: str | None) -> nn.Module:
    """Return a module and all below it without adapters, on the tensors of one or on its own."""
    if isinstance(module, AdaptedLayer):
        return with_tensors(module, adapter)
    plain = type(module).plain if isinstance(module, SavedContainer) else type(module)
    found = plain.__new__(plain)
    vars(found).update(vars(module))
    found._modules = {k: m and bare(m, adapter) for k, m in module._modules.items()}
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
    """Give a module of several layers the look of a wrapper, until the last adapter goes."""
    if not isinstance(module, SavedContainer):
        classes.append((module, type(module)))
        change_class(module, wrapper_class(type(module)))
