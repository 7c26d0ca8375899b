"""The `base_model` of a `PeftModel`: the state of the model's adapters, and their verbs."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from inlay.checkpoint.adapter import unchanged_on_failure
from inlay.model.adapters.attach import attach, detach, set_trained, use
from inlay.model.adapters.deferred import defer
from inlay.model.adapters.places import module_at, view_at
from inlay.model.adapters.registry import active, adapter_places, adapters
from inlay.peft.configs import method_of, placement_of, plain, prepared
from inlay.peft.errors import AdapterError, as_peft_raises
from inlay.peft.initial_values import draw_initial_values
from inlay.peft.layer import PeftLayer, as_names
from inlay.peft.merge import Merging, check_no_conflict
from inlay.peft.seam import check_target_module_exists, tied_with_embedding

LACKING = frozenset({"add_weighted_adapter", "inject_adapter", "subtract_mutated_init"})
"""Verbs of HF PEFT's tuners that this one does not have."""

PREFIXES = {"LORA": "lora_", "IA3": "ia3_", "LN_TUNING": "ln_tuning_"}


class Tuner(Merging):
    """The `base_model` of a `PeftModel`; the adapted model itself is `.model`.

    Other attributes are the model's own.
    """

    @property
    def prefix(self) -> str:
        """The part of an adapter parameter's name that no parameter of the base has."""
        config = next(iter(self.peft_config.values()), None)
        return PREFIXES.get(plain(getattr(config, "peft_type", "")), "adapters.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        if name in LACKING and not hasattr(self.model, name):
            raise AttributeError(
                f"inlay.peft has no {name}; use HF PEFT itself for it, on the adapters' folders"
            )
        return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def targeted_module_names(self) -> list[str]:
        found = (name for each in adapters(self.model).values() for name in each.found.names)
        return list(dict.fromkeys(found))

    @property
    def targeted_parameter_names(self) -> list[str]:
        targets = [
            parameter
            for config in self.peft_config.values()
            for parameter in getattr(config, "target_parameters", None) or ()
        ]
        names = [name for name, _ in self.model.named_parameters()]
        found = (n for n in names for p in targets if n == p or n.endswith("." + p))
        return list(dict.fromkeys(found))

    @staticmethod
    def _check_target_module_exists(config: PeftConfig, key: str) -> Any:
        return check_target_module_exists(config, key)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_with_embedding(self.model)

    # Adding, choosing and deleting adapters.

    def add(
        self, name: str, config: PeftConfig, autocast: bool, without_values: bool = False
    ) -> None:
        """The first adapter becomes active; `without_values` leaves its tensors on no device."""
        if name in self.peft_config:
            raise AdapterError(
                f"Adapter with name '{name}' already exists; choose another, or delete it first"
            )
        prefix = PREFIXES.get(plain(config.peft_type), "")
        if name in prefix:
            warnings.warn(
                f"Adapter name '{name}' should not be contained in the prefix '{prefix}'. HF PEFT "
                "may take the names of its tensors for other ones; choose another name",
                stacklevel=4,
            )
        ready = prepared(config, self.model)
        method = method_of(ready)
        placement = placement_of(ready, method, self.model)
        unchanged = unchanged_on_failure(self.model, name)
        with as_peft_raises(), self.trained_as_before(), self.unmerged(), unchanged:
            attach(self.model, method, name=name, **placement)
            if without_values:
                defer(self.model, name)
            else:
                draw_initial_values(self.model, name, ready)
        self.peft_config[name] = ready
        self.settle_dtype(name, autocast)
        if active(self.model) == (name,):
            set_trained(self.model, (name,), not ready.inference_mode)
        self.settle()

    def settle_dtype(self, name: str, autocast: bool) -> None:
        for place, params in () if autocast else adapter_places(self.model, name):
            dtype = dtype_at(self.model, place)
            for parameter in params.parameters() if dtype else ():
                parameter.data = parameter.data.to(dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, and only them; they train unless `inference_mode`."""
        names = as_names(adapter_name)
        for name in names:
            self.check_has(name)
        check_no_conflict(self.model, names)
        if self.merged:
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.",
                stacklevel=2,
            )
            self.unmerge_adapter()
        with self.trained_as_before():
            use(self.model, *names)
        set_trained(self.model, tuple(self.peft_config), False)
        set_trained(self.model, names, not inference_mode)
        self.frozen = []
        self.settle()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        names = as_names(adapter_names)
        for name in names:
            self.check_has(name)
        set_trained(self.model, names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; when it was the only active one, the first left becomes active."""
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self.merged_adapters:
            raise AdapterError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge "
                "them first."
            )
        with self.trained_as_before(), self.unmerged():
            detach(self.model, adapter_name)
        del self.peft_config[adapter_name]
        left = list(self.peft_config)
        if left and not self.active_adapters:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter "
                f"to {left[0]}.",
                stacklevel=2,
            )
            self.set_adapter(left[0])
        self.settle()

    # Disabling and enabling adapters.

    def disable_adapter_layers(self) -> None:
        """Let the base alone act, until `enable_adapter_layers`; a merge is out meanwhile."""
        if self.enabled and self.merged:
            self.merged.take_out()
        if self.enabled:
            self.freeze()
        self.enabled = False
        self.settle()

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again; a merge is back as it was."""
        if not self.enabled and self.merged:
            self.merged.put_in()
        self.enabled = True
        self.thaw()
        self.settle()

    def freeze(self) -> None:
        """Freeze the adapters, and note which of their tensors trained."""
        self.frozen = [
            (name, parameter)
            for name in self.active_adapters
            for _, params in adapter_places(self.model, name)
            for parameter in params.parameters()
            if parameter.requires_grad
        ]
        for _, parameter in self.frozen:
            parameter.requires_grad_(False)

    def thaw(self) -> None:
        for name, parameter in self.frozen:
            if name in self.active_adapters:
                parameter.requires_grad_(True)
        self.frozen = []

    @contextmanager
    def disabled(self) -> Generator[None]:
        before = self.enabled
        if len({m.disable_adapters for m in self.model.modules() if isinstance(m, PeftLayer)}) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. After the disable_adapter context all of them are enabled; call "
                "enable_adapter_layers or disable_adapter_layers before it to have them alike",
                stacklevel=5,
            )
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    @contextmanager
    def trained_as_before(self) -> Generator[None]:
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        first = not self.peft_config
        try:
            yield
        finally:
            for parameter, flag in () if first else before:
                parameter.requires_grad_(flag)


def dtype_at(model: nn.Module, place: str) -> torch.dtype | None:
    """Return the dtype that a place computes in; None for a whole model."""
    view = view_at(model, place) if place else None
    if view is not None:
        return view.dtype
    own = (p.dtype for p in module_at(model, place)[0]._parameters.values() if p is not None)
    return next((dtype for dtype in own if dtype.is_floating_point), None)
