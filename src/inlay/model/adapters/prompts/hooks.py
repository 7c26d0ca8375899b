"""The hooks that give a model the virtual tokens of a prompt method, before every sequence."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache

from inlay.errors import AdapterError
from inlay.methods.base import Params, PromptMethod
from inlay.model.adapters.prompts.cache import (
    BehindPrompt,
    check_continues,
    check_no_prompt,
    check_same_prompt,
    decoders_part,
    mark_prompt,
    read_only,
    taken_out,
    wants_cache,
    without_cache,
)
from inlay.model.adapters.prompts.call import (
    EMBEDDINGS,
    arguments,
    batch_size,
    own_forward,
    recomputed_in_call,
    widen,
)
from inlay.model.adapters.prompts.trial import Takes
from inlay.model.recomputed import Recomputed
from inlay.model.seams.transformers import cache_argument

NewArguments = tuple[tuple[()], dict[str, Any]] | None
"""A call's new arguments; None leaves it as it is."""


class RunningCall(threading.local):
    """What a hook knows of the call that it changes; each thread has its own."""

    base_runs = False
    """Whether the model runs without the virtual tokens now, to compute them."""
    recomputed = Recomputed((), ())
    """What gradient checkpointing computes again in the backward pass."""
    cache: BehindPrompt | None = None
    """The cache that is read and written."""
    drops_cache = False
    """Whether the call asks for no cache, and only the virtual tokens brought one."""
    read: torch.Size | None = None
    """(batch, tokens) that the model reads, where embeddings stand before the text."""

    def __reduce__(self) -> tuple[type[RunningCall], tuple[()]]:
        return RunningCall, ()  # a copy of a model runs no call


class PromptHook:
    """The prompt adapters of one model, given to each of its forward passes; here to a decoder's.

    They reach a decoder through its key-value cache: the first pass over a sequence (no cache, or
    an empty one) starts from a cache that holds the virtual tokens; later passes of a generation
    find them there. Logits keep the input's length.
    """

    def __init__(self, model: nn.Module, takes: Takes) -> None:
        self.model, self.takes = model, takes
        self.methods: dict[str, PromptMethod] = {}
        self.active: str | None = None
        self.whole = False
        """Whether an encoder's outputs keep the virtual tokens' positions, as HF PEFT's do."""
        self.handles: list[RemovableHandle] = []
        self.running = RunningCall()

    @property
    def acting_name(self) -> str | None:
        return None if self.running.base_runs else self.active

    def acting(self, embeddings: bool | None = None) -> PromptMethod | None:
        """Return the active method; or only one that has embeddings, or only one that has none."""
        if self.acting_name is None:
            return None
        method = self.methods[self.acting_name]
        return method if embeddings in (None, method.has_embeddings) else None

    def check(self, method: PromptMethod) -> None:
        why = self.takes.no_embeddings if method.has_embeddings else self.takes.no_keys
        if why is not None:
            raise AdapterError(
                f"{type(self.model).__name__} cannot have {method.name}: {why}; use "
                f"{'prefix tuning' if method.has_embeddings else 'prompt tuning'}, where the model "
                "takes it, or another of the prompt methods or a weight method such as LoRA"
            )

    def register(self) -> list[RemovableHandle]:
        return [self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)]

    def add(self, name: str, method: PromptMethod, params: Params) -> None:
        if not self.methods:
            self.model.adapters = nn.ModuleDict()
            after = self.model.register_forward_hook(self.after_forward, always_call=True)
            self.handles = [*self.register(), after]
        self.methods[name] = method
        self.table[name] = params

    def remove(self, name: str) -> bool:
        if self.methods.pop(name, None) is None:
            return False
        del self.table[name]
        self.active = None if self.active == name else self.active
        if self.methods:
            return False
        for handle in self.handles:
            handle.remove()
        del self.model.adapters
        return True

    @property
    def table(self) -> nn.ModuleDict:
        """Where the tensors lie, so that they move and save with the model."""
        table = self.model.adapters
        assert isinstance(table, nn.ModuleDict)
        return table

    def params(self, name: str) -> Params:
        params = self.table[name]
        assert isinstance(params, Params)
        return params

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewArguments:
        method = self.acting()
        if method is None:
            check_no_prompt(*args, *kwargs.values())
            return None
        return self.with_keys(model, args, kwargs, method.tokens)

    def with_keys(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int
    ) -> NewArguments:
        self.running.recomputed = recomputed_in_call(model)
        call = arguments(model, args, kwargs)
        name, new = self.put_cache(model, call, batch_size(call))
        if not new:
            check_continues(call[name], call, tokens)
        if self.running.recomputed.blocks and torch.is_grad_enabled():
            call[name] = read_only(call[name], own=new)
        self.running.recomputed.read_cache(True)
        widen(call, "attention_mask", tokens, 1)
        for key in ("position_ids", "cache_position"):
            if call.get(key) is not None:
                call[key] = call[key] + tokens
        return (), call

    def put_cache(self, model: nn.Module, call: dict[str, Any], batch: int) -> tuple[str, bool]:
        """Give a call a cache that begins with the virtual tokens: its own, or a new one.

        Returns the name of the argument, and whether the cache holds no text yet.
        """
        name = cache_argument(own_forward(model)) or ""
        cache = self.entered(taken_out(call, name))
        new = cache is None or cache.get_seq_length() == 0
        if not new:
            check_same_prompt(cache, self.acting_name)
        call[name] = self.filled(cache, batch) if new else cache
        # After filling it, which may run the model.
        self.running.drops_cache = cache is None and not wants_cache(model, call)
        return name, new

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Leave the blocks as they were before the call, and no cache that it did not ask for.

        Generation without a cache would go on from it, over text that it holds already.
        """
        del model, args
        self.running.recomputed.read_cache(False)
        self.running.recomputed = Recomputed((), ())
        if self.running.cache is not None:
            self.running.cache.in_call, self.running.cache = False, None
        drops, self.running.drops_cache = self.running.drops_cache, False
        return without_cache(output) if drops else None

    def filled(self, cache: Any, batch: int) -> Cache:
        cache = DynamicCache() if cache is None else cache
        self.fill(cache, batch, self.keys_values())
        return cache

    def fill(self, cache: Any, batch: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Put keys and values, (1, heads, tokens, width) by layer, into an empty cache."""
        for layer, (key, value) in enumerate(pairs):
            cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
        assert self.acting_name is not None
        mark_prompt(cache, self.acting_name, self.methods[self.acting_name].tokens)
        self.entered(cache)

    def entered(self, cache: Any) -> Any:
        """Return the cache of a call that begins; until its end virtual tokens count as held."""
        own = decoders_part(cache)
        if isinstance(own, BehindPrompt):
            self.running.cache, own.in_call = own, True
        return cache

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        assert self.acting_name is not None
        method, params = self.methods[self.acting_name], self.params(self.acting_name)
        self.running.base_runs = True
        try:
            with self.running.recomputed.off():
                return method.keys_values(params, self.model)
        finally:
            self.running.base_runs = False

    def prepend(self, call: dict[str, Any], method: PromptMethod) -> None:
        assert self.acting_name is not None
        text: Tensor = call[EMBEDDINGS]
        rows = method.embeddings(self.params(self.acting_name))[: method.tokens].to(text.dtype)
        call[EMBEDDINGS] = torch.cat([rows.expand(len(text), -1, -1), text], dim=1)
