"""What stands between a `PeftModel` and the model: the state of its adapters, and the verbs."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from inlay.checkpoint.adapter import unchanged_on_failure
from inlay.model.attach import (
    activate,
    active,
    adapter_places,
    adapters,
    attach,
    detach,
    registry_of,
    set_trained,
    use,
)
from inlay.model.merge import tied_names, untie
from inlay.model.quantize import describe_quantization
from inlay.peft.configs import method_of, placement_of, prepared
from inlay.peft.errors import AdapterError, MergeError, as_peft_raises
from inlay.peft.merged import Merged
from inlay.peft.start import start
from inlay.storage.registry import frozen, kind

LEAST = 0.9
"""The smallest share of an update that may survive a merge for good."""


class Tuner(nn.Module):
    """The `base_model` of a `PeftModel`; the adapted model itself is `.model`.

    Other attributes are the model's own.
    """

    prefix = "adapters."
    """What an adapter's parameter has in its name, and no other parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.merged: Merged | None = None
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        """Return the tuner's own module, or the model's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(active(self.model))

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or a list where there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are merged now."""
        return list(self.merged.names) if self.merged else []

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the modules that the adapters are on."""
        found = (name for each in adapters(self.model).values() for name in each.found.names)
        return list(dict.fromkeys(found))

    # Adapters come, act and go.

    def add(self, name: str, config: PeftConfig, autocast: bool) -> None:
        """Attach a new adapter; the first becomes active, later ones wait for `set_adapter`.

        Raises:
            AdapterError: the name is taken, or the configuration asks for what Inlay lacks.
            TargetError: a target matched nothing that this method can adapt.
        """
        self.check_new(name)
        ready = prepared(config, self.model)
        method = method_of(ready)
        placement = placement_of(ready, method, self.model)
        whole = unchanged_on_failure(self.model, name)
        with as_peft_raises(), self.as_trained(), self.at_rest(), whole:
            attach(self.model, method, name=name, **placement)
            start(self.model, name, ready)
        self.peft_config[name] = ready
        self.settle_dtype(name, autocast)
        if active(self.model) == (name,):
            set_trained(self.model, (name,), not ready.inference_mode)

    def check_new(self, name: str) -> None:
        """Raise when an adapter of this name is here.

        Raises:
            AdapterError: it is.
        """
        if name in self.peft_config:
            raise AdapterError(
                f"Adapter with name '{name}' already exists; choose another, or delete it first"
            )

    def settle_dtype(self, name: str, autocast: bool) -> None:
        """Keep an adapter in fp32, or without autocast in the dtype of the layers it is on."""
        for place, params in () if autocast else adapter_places(self.model, name):
            dtype = dtype_at(self.model.get_submodule(place))
            for parameter in params.parameters() if dtype else ():
                parameter.data = parameter.data.to(dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, and only them; they train unless `inference_mode`.

        Raises:
            AdapterError: one is unknown, or two train the same module whole.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self.check_has(name)
        self.check_apart(names)
        if self.merged:
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.",
                stacklevel=2,
            )
            self.unmerge_adapter()
        use(self.model, *names)
        set_trained(self.model, names, not inference_mode)
        self.settle()

    def check_has(self, name: str) -> None:
        """Raise unless there is an adapter of this name.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found; the model has {', '.join(self.peft_config) or 'none'}"
            )

    def check_apart(self, names: Sequence[str]) -> None:
        """Raise when two adapters have their own copies of one parameter: only one could act.

        Raises:
            AdapterError: they have.
        """
        owners: dict[tuple[str, str], str] = {}
        for name in names:
            for place, params in adapter_places(self.model, name):
                own = self.model.get_submodule(place)._parameters
                for key in set(params._parameters) & set(own):
                    other = owners.setdefault((place, key), name)
                    if other != name:
                        raise AdapterError(
                            f"adapters {other!r} and {name!r} each train {place}.{key} whole; Only "
                            "one adapter can be set at a time for it"
                        )

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let adapters train, or freeze them."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in names:
            self.check_has(name)
        set_trained(self.model, names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; when it was the only active one, the first left becomes active.

        Raises:
            AdapterError: there is no such adapter, or it is merged now.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self.merged_adapters:
            raise AdapterError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge "
                "them first."
            )
        with self.as_trained(), self.at_rest():
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

    # Off and on.

    def disable_adapter_layers(self) -> None:
        """Let the base alone act, until `enable_adapter_layers`; a merge is out meanwhile."""
        if self.enabled and self.merged:
            self.merged.take_out()
        self.enabled = False
        self.settle()

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again; a merge is back as it was."""
        if not self.enabled and self.merged:
            self.merged.put_in()
        self.enabled = True
        self.settle()

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Let the base alone act inside the `with` block; safe to nest."""
        before = self.enabled
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if before:
                self.enable_adapter_layers()

    def settle(self) -> None:
        """Make exactly those adapters act that should: none while disabled or merged."""
        registry = registry_of(self.model)
        if registry is not None:
            acts = self.enabled and not self.merged
            activate(self.model, registry, registry.active if acts else ())

    @contextmanager
    def at_rest(self) -> Generator[None]:
        """Have the base's own weights in place inside the `with` block, merged or not."""
        out = self.merged is not None and self.enabled
        if out and self.merged:
            self.merged.take_out()
        try:
            yield
        finally:
            if out and self.merged:
                self.merged.put_in()
            self.settle()

    @contextmanager
    def as_trained(self) -> Generator[None]:
        """Leave which parameters train as it was before the `with` block, new ones frozen."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        first = not self.peft_config
        try:
            yield
        finally:
            for parameter, flag in () if first else before:
                parameter.requires_grad_(flag)

    # Merged and back.

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base for a while; `unmerge_adapter` gives it back bit for bit.

        Args:
            adapter_names: the adapters to merge beside those that are; default: the active ones.
            safe_merge: check first that every merged weight is finite.

        Raises:
            MergeError: an adapter cannot merge, or with `safe_merge` is not finite.
            AdapterError: there is no such adapter.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self.check_has(name)
        new = [name for name in names if name not in self.merged_adapters]
        done = [name for name in names if name in self.merged_adapters]
        if names and not new:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        elif done:
            warnings.warn(
                f"Already following adapters were merged {','.join(done)}. You are now "
                f"additionally merging {','.join(new)}.",
                stacklevel=2,
            )
        if new:
            with self.at_rest():
                planned = Merged(self.model, (*self.merged_adapters, *new))
                if safe_merge:
                    planned.check_finite()
            self.replace_merge(planned)

    def replace_merge(self, planned: Merged | None) -> None:
        """Take the present merge out, and put another in."""
        if self.merged and self.enabled:
            self.merged.take_out()
        self.merged = planned
        if planned and self.enabled:
            planned.put_in()
        self.settle()

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, the very same; the adapters act beside it again."""
        if self.merged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.replace_merge(None)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Merge adapters for good and return the plain model.

        Raises:
            MergeError: rounding would lose the update, or as in `merge_adapter`.
        """
        del progressbar
        ties = tied_names(self.model)
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        new = [name for name in wanted if name not in self.merged_adapters]
        if new:
            self.merge_adapter(new, safe_merge)
        if self.merged is not None:
            self.check_survival(self.merged)
        self.merged, self.enabled = None, True
        self.take_all_off()
        describe_quantization(self.model)
        for name in untie(self.model, ties):
            warnings.warn(
                f"{name} is no longer tied after merging; tie_word_embeddings is False in the "
                "model's configuration now",
                stacklevel=2,
            )
        return self.model

    def check_survival(self, merged: Merged) -> None:
        """Raise when rounding would lose more of the update than accepted; the merge is undone.

        Raises:
            MergeError: it would.
        """
        share = merged.surviving_fraction
        if share < LEAST:
            self.replace_merge(None)
            raise MergeError(
                f"merging for good would keep only {share:.1%} of the update (at least {LEAST:.0%} "
                "was expected): the rest is rounded away in the base's dtype. Load the base in "
                "float32 and merge there, or keep the adapter apart"
            )

    def unload(self) -> nn.Module:
        """Take every adapter off unmerged and return the plain model, bit for bit the base."""
        if self.merged:
            self.unmerge_adapter()
        self.enabled = True
        self.take_all_off()
        return self.model

    def take_all_off(self) -> None:
        """Drop every adapter."""
        if registry_of(self.model) is not None:
            detach(self.model)
        self.peft_config.clear()


def dtype_at(module: nn.Module) -> torch.dtype | None:
    """Return the dtype a layer computes in; None for a whole model."""
    if kind(module):
        return frozen(module).dtype
    own = (p.dtype for p in module._parameters.values() if p is not None)
    return next((dtype for dtype in own if dtype.is_floating_point), None)
