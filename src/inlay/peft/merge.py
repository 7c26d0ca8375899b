"""Merging adapters into the base: for a while, undone bit for bit, or for good."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from inlay.errors import ModelError
from inlay.methods.tokens import tokens_of
from inlay.model.adapters.attach import (
    activate,
    active,
    adapted_layers,
    adapter_places,
    detach,
    registry_of,
    required_registry,
)
from inlay.model.adapters.deferred import check_values
from inlay.model.adapters.layer import AdaptedLayer, become_adapted, own_modules
from inlay.model.adapters.places import module_at
from inlay.model.example_inputs import example_inputs
from inlay.model.load.quantize import describe_quantization
from inlay.model.merge.fidelity import LEAST_EFFECT, compared, logits_of
from inlay.model.merge.finite import check_adapters_finite
from inlay.model.merge.merge import why_not_mergeable
from inlay.model.merge.plan import Update, held, takes_over
from inlay.model.merge.untie import Ties
from inlay.peft.errors import AdapterError, MergeError, NotForPromptsError
from inlay.peft.layer import Switched
from inlay.peft.layer_classes import present
from inlay.storage.registry import frozen


def check_apart(model: nn.Module, names: Sequence[str]) -> None:
    """Raise when two adapters have copies of one parameter, or rows of one token.

    Only one of them could act.

    Raises:
        AdapterError: they have.
    """
    owners: dict[tuple[str, str], str] = {}
    for name in names:
        for place, params in adapter_places(model, name):
            module, parameter = module_at(model, place)
            own = {} if parameter else module._parameters
            copied = set(params._parameters) & set(own)
            rows = {f"token {token}" for token in tokens_of(params, "token_rows")}
            for what in sorted(copied | rows):
                other = owners.setdefault((place, what), name)
                if other != name:
                    kind = "TrainableTokensWrapper" if what in rows else "ModulesToSaveWrapper"
                    raise AdapterError(
                        f"Only one adapter can be set at a time for {kind}: {other!r} and "
                        f"{name!r} each train {what} of {place}; name one of them"
                    )


Swap = tuple[nn.Module, str, Any, Any]
"""An owner, the name of its child or parameter, what is there unmerged and what merged."""


class Merged(Update):
    """The merge of some adapters, which can be put in place and taken out at no cost.

    The base's own tensors are kept aside, not computed back, so that taking it out gives them
    bit for bit. A quantised layer is dense while it is merged.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        reason = why_not_mergeable(model, names)
        if reason is not None:
            raise MergeError(reason)
        self.model, self.names = model, tuple(names)
        self.swaps: list[Swap] = []
        self.plan()

    @torch.no_grad()
    def plan(self) -> None:
        """Compute what every adapted layer holds once merged."""
        registry = required_registry(self.model)
        before = {layer: layer.active for layer in adapted_layers(self.model)}
        activate(self.model, registry, self.names)
        try:
            for name, layer in list(self.model.named_modules()):
                if isinstance(layer, AdaptedLayer) and layer.here():
                    self.layer(name, layer)
        finally:
            for layer, active in before.items():
                layer.active = active

    def layer(self, name: str, layer: AdaptedLayer) -> None:
        """Plan one layer: its weight and bias, or the module that holds them dense."""
        if layer.keeps_class or not layer.weight_methods():
            for key, own, rounded in self.changes(layer):
                self.swaps.append((layer, key, own, rounded))
            return
        assert layer.base is not None
        w, bias = layer.adapted_weight()
        new = held(layer.base, w, bias, "dense")
        self.account(layer.base.dequantize(), w, frozen(new).dequantize())
        if layer.base.storage == "dense":
            for key, value in new._parameters.items():
                if value is not None:
                    self.swaps.append((layer, key, layer._parameters[key], value))
            return
        parent, _, leaf = name.rpartition(".")
        takes_over(new, layer)
        twin = become_adapted(new.train(layer.training), frozen(new))
        twin.adapters, twin.methods = layer.adapters, layer.methods
        self.swaps.append((self.model.get_submodule(parent), leaf, layer, twin))

    def check_finite(self) -> None:
        """Raise when a merged weight is not finite.

        Raises:
            MergeError: the adapters hold NaN or infinite values.
        """
        for owner, key, _, new in self.swaps:
            held_here = [new] if isinstance(new, Tensor) else list(new.parameters(recurse=False))
            if not all(bool(torch.isfinite(each).all()) for each in held_here):
                where = next(n for n, m in self.model.named_modules() if m is owner)
                raise MergeError(
                    "NaNs detected in the merged weights. The adapter "
                    f"{', '.join(self.names)} seems to be broken: {where}.{key} is not finite "
                    "with it; nothing was merged"
                )

    def put_in(self) -> None:
        """Put the merged weights in place."""
        for owner, key, old, new in self.swaps:
            place(owner, key, old, new)

    def take_out(self) -> None:
        """Put the base's own back."""
        for owner, key, old, new in self.swaps:
            place(owner, key, new, old)


def place(owner: nn.Module, key: str, leaving: Any, coming: Any) -> None:
    """Swap one child or tensor, which takes over the mode and device that were set meanwhile."""
    if isinstance(coming, nn.Module):
        coming.train(leaving.training)
        owner._modules[key] = coming
        return
    if coming.device != leaving.device:
        coming.data = coming.data.to(leaving.device)
    (owner._buffers if key in owner._buffers else owner._parameters)[key] = coming


LEAST = 0.9
"""The share of an update in the weights below which the outputs decide on a merge for good."""


class Merging(nn.Module):
    """A model whose adapters act, are disabled, or are merged and taken out again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.merged: Merged | None = None
        self.enabled = True
        self.frozen: list[tuple[str, nn.Parameter]] = []
        """What trained before adapters were disabled, and whose it is."""

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

    def check_has(self, name: str) -> None:
        """Raise unless there is an adapter of this name.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found; the model has {', '.join(self.peft_config) or 'none'}"
            )

    def settle(self) -> None:
        """Make exactly those adapters act that should: none while disabled or merged."""
        registry = registry_of(self.model)
        if registry is not None:
            acts = self.enabled and not self.merged
            activate(self.model, registry, registry.active if acts else ())
            present(self.model, self.merged_adapters if self.enabled else (), self.enabled)

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
        if adapter_names is None:
            self.adopt()
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
            check_values(self.model, new)
            check_apart(self.model, (*self.merged_adapters, *new))
            with self.at_rest():
                planned = Merged(self.model, (*self.merged_adapters, *new))
                if safe_merge:
                    planned.check_finite()
            self.replace_merge(planned)

    def adopt(self) -> None:
        """Make those adapters active that the layers' own `set_adapter` chose, if it was called.

        Raises:
            AdapterError: the layers chose different ones.
        """
        layers = (m for _, m in own_modules(self.model) if isinstance(m, Switched))
        chosen = {type(layer).look.chosen for layer in layers}
        if len(chosen) > 1:
            found = " and ".join(sorted(", ".join(names) or "none" for names in chosen))
            raise AdapterError(
                f"the layers' own set_adapter chose different adapters ({found}), and a merge is "
                "of the whole model; call set_adapter of the model first"
            )
        registry = registry_of(self.model)
        for names in chosen if registry is not None else ():
            assert registry is not None
            registry.active = names

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
        ties = Ties(self.model)
        if adapter_names is None:
            self.adopt()
        wanted = self.active_adapters if adapter_names is None else list(adapter_names)
        new = [name for name in wanted if name not in self.merged_adapters]
        if new:
            if not safe_merge:
                check_adapters_finite(self.model, new, MergeError)
            self.merge_adapter(new, safe_merge)
        if self.merged is not None:
            self.check_overflow(self.merged)
            self.check_survival(self.merged)
        ties.say()
        otherwise = ties.said_otherwise()
        self.merged, self.enabled = None, True
        self.take_all_off()
        describe_quantization(self.model)
        for name in ties.part():
            warnings.warn(
                otherwise
                or "Setting tie_word_embeddings to False in the model's configuration: "
                f"{name} is no longer tied after merging",
                stacklevel=2,
            )
        return self.model

    def check_overflow(self, merged: Merged) -> None:
        """Raise when a weight of a merge for good is not finite; the merge is undone.

        Raises:
            MergeError: it is.
        """
        try:
            merged.check_finite()
        except MergeError:
            self.replace_merge(None)
            raise

    def check_survival(self, merged: Merged) -> None:
        """Raise when rounding would lose more of the update than accepted; the merge is undone.

        Raises:
            MergeError: it would.
        """
        share = merged.surviving_fraction
        if share >= LEAST:
            return
        kept = self.effect_kept(merged)
        if kept is not None and kept >= LEAST_EFFECT:
            warnings.warn(
                f"merging for good rounded part of the update away: {share:.1%} of it is left in "
                f"the weights, and on random inputs {kept:.1%} of what the adapter changes in the "
                "outputs; load the base in float32 and merge there to keep all of it",
                stacklevel=3,
            )
            return
        self.replace_merge(None)
        raise MergeError(
            f"merging for good would keep only {share:.1%} of the update (at least {LEAST:.0%} was "
            "expected), and not its effect on the outputs: the rest is rounded away in the base's "
            "dtype. Load the base in float32 and merge there, or keep the adapter apart"
        )

    def effect_kept(self, merged: Merged) -> float | None:
        """Return the share of the adapters' effect on the outputs that a merge keeps.

        None where no inputs can be made for the model. The merge is in place, before and after.
        """
        try:
            batches = example_inputs(self.model)
        except ModelError:
            return None
        registry = required_registry(self.model)
        after = logits_of(self.model, batches)
        merged.take_out()
        try:
            base = logits_of(self.model, batches)
            activate(self.model, registry, merged.names)
            before = logits_of(self.model, batches)
        finally:
            merged.put_in()
            self.settle()
        return compared(before, base, after).effect_kept

    def unload(self) -> nn.Module:
        """Take every adapter off unmerged and return the plain model, bit for bit the base.

        Raises:
            NotForPromptsError: a prompt is on the model; HF PEFT has no `unload` there.
        """
        prompts = [n for n, config in self.peft_config.items() if config.is_prompt_learning]
        if prompts:
            raise NotForPromptsError(
                f"'unload' is not for a prompt, as {prompts[0]} is; take it off with "
                "inlay.detach(model.get_base_model())"
            )
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
