"""Merging adapters into the base: for a while, undone bit for bit, or for good."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from peft import PeftConfig
from torch import nn

from inlay.errors import ModelError
from inlay.methods.tokens import tokens_of
from inlay.model.adapters.attach import detach
from inlay.model.adapters.deferred import check_values
from inlay.model.adapters.layer import own_modules
from inlay.model.adapters.places import module_at
from inlay.model.adapters.registry import (
    activate,
    active,
    adapter_places,
    registry_of,
    required_registry,
)
from inlay.model.example_inputs import example_inputs
from inlay.model.load.quantize import describe_quantization
from inlay.model.merge.fidelity import LEAST_EFFECT, compared, logits_of
from inlay.model.merge.finite import check_adapters_finite
from inlay.model.merge.untie import Ties
from inlay.peft.errors import AdapterError, MergeError, NotForPromptsError
from inlay.peft.layer import PeftLayer
from inlay.peft.layer_classes import set_classes
from inlay.peft.swapped_weights import Merged

LEAST = 0.9
"""The share of an update in the weights below which the outputs decide on a merge for good."""


def check_no_conflict(model: nn.Module, names: Sequence[str]) -> None:
    """Raise when two adapters train one parameter or one token's row, for only one could act."""
    owners: dict[tuple[str, str], str] = {}
    for name in names:
        for place, params in adapter_places(model, name):
            module, parameter = module_at(model, place)
            own = {} if parameter else module._parameters
            copied = set(params._parameters) & set(own)
            rows = {f"token {token}" for token in tokens_of(params, "token_rows")}
            for trained in sorted(copied | rows):
                other = owners.setdefault((place, trained), name)
                if other != name:
                    wrapper = (
                        "TrainableTokensWrapper" if trained in rows else "ModulesToSaveWrapper"
                    )
                    raise AdapterError(
                        f"Only one adapter can be set at a time for {wrapper}: {other!r} and "
                        f"{name!r} each train {trained} of {place}; name one of them"
                    )


class Merging(nn.Module):
    """A model whose adapters act, are disabled, or are merged and taken out again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.merged: Merged | None = None
        self.enabled = True
        self.frozen: list[tuple[str, nn.Parameter]] = []
        """The parameters that trained before adapters were disabled, each with its adapter."""

    @property
    def active_adapters(self) -> list[str]:
        return list(active(self.model))

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged.names) if self.merged else []

    def check_has(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found; the model has {', '.join(self.peft_config) or 'none'}"
            )

    def settle(self) -> None:
        registry = registry_of(self.model)
        if registry is not None:
            acts = self.enabled and not self.merged
            activate(self.model, registry, registry.active if acts else ())
            set_classes(self.model, self.merged_adapters if self.enabled else (), self.enabled)

    @contextmanager
    def unmerged(self) -> Generator[None]:
        merged_now = self.merged is not None and self.enabled
        if merged_now and self.merged:
            self.merged.take_out()
        try:
            yield
        finally:
            if merged_now and self.merged:
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
            self.activate_chosen()
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
            check_no_conflict(self.model, (*self.merged_adapters, *new))
            with self.unmerged():
                planned = Merged(self.model, (*self.merged_adapters, *new))
                if safe_merge:
                    planned.check_finite()
            self.replace_merge(planned)

    def activate_chosen(self) -> None:
        """Activate the adapters that the layers' own `set_adapter` chose, if it was called."""
        layers = (m for _, m in own_modules(self.model) if isinstance(m, PeftLayer))
        chosen = {layer.look.chosen for layer in layers}
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
            self.activate_chosen()
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        new = [name for name in names if name not in self.merged_adapters]
        if new:
            if not safe_merge:
                check_adapters_finite(self.model, new, MergeError)
            self.merge_adapter(new, safe_merge)
        if self.merged is not None:
            self.check_final(self.merged)
        ties.write_untied()
        otherwise = ties.warning()
        self.merged, self.enabled = None, True
        self.take_all_off()
        describe_quantization(self.model)
        for name in ties.separate():
            warnings.warn(
                otherwise
                or "Setting tie_word_embeddings to False in the model's configuration: "
                f"{name} is no longer tied after merging",
                stacklevel=2,
            )
        return self.model

    def check_final(self, merged: Merged) -> None:
        """Undo a merge for good and raise where it is not finite or rounds the update away."""
        try:
            merged.check_finite()
        except MergeError:
            self.replace_merge(None)
            raise
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
            "dtype. Load the base in float32 and merge there, or keep the adapter unmerged"
        )

    def effect_kept(self, merged: Merged) -> float | None:
        """Return the share of the effect on the outputs that is kept; None without inputs."""
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
        if registry_of(self.model) is not None:
            detach(self.model)
        self.peft_config.clear()
