"""Give a prompt method's keys and values to a model's attention, before every sequence."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from inlay.errors import AdapterError
from inlay.methods.base import Params, PromptMethod, attention_shape
from inlay.model.fast.proof import in_clean_thread
from inlay.model.fast.shrink import small_model
from inlay.model.seams.transformers import (
    Recomputed,
    cache_argument,
    cache_in,
    recomputed,
)
from inlay.storage.registry import layer_class


class ReadOnly(DynamicCache):
    """The virtual tokens alone: blocks read it and add nothing, so each may be computed again."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values with the virtual tokens before them."""
        held: Any = self.layers[layer_idx]
        keys = torch.cat([held.keys, key_states], dim=-2)
        return keys, torch.cat([held.values, value_states], dim=-2)


class PromptHook:
    """The prompt adapters of one model, given to each forward pass through its key-value cache.

    The first pass over a sequence (no cache, or an empty one) starts from a cache that holds the
    virtual tokens; later passes of a generation find them there. Logits keep the input's length.
    """

    def __init__(self, model: nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        self.cache = cache_argument(model.forward) or ""
        """What the model's forward calls its key-value cache."""
        check_takes_prompts(model, self.cache)
        self.methods: dict[str, PromptMethod] = {}
        self.active: str | None = None
        self.model = model
        self.again = Recomputed((), ())
        """What of the model is computed again in the backward pass of the call that runs."""

    def add(self, name: str, method: PromptMethod, params: Params) -> None:
        """Add one adapter, not yet active; the hook is put on with the first."""
        if not self.methods:
            self.model.adapters = nn.ModuleDict()
            before = self.before_forward
            after = self.model.register_forward_hook(self.after_forward, always_call=True)
            self.handles = self.model.register_forward_pre_hook(before, with_kwargs=True), after
        self.methods[name] = method
        self.table[name] = params

    def remove(self, name: str) -> bool:
        """Drop one adapter if it is here; return whether the hook was taken off with the last."""
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
        """Where the tensors live, so that they move and save with the model."""
        table = self.model.adapters
        assert isinstance(table, nn.ModuleDict)
        return table

    def params(self, name: str) -> Params:
        """Return one adapter's tensors."""
        params = self.table[name]
        assert isinstance(params, Params)
        return params

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Change one call's arguments so that attention sees the virtual tokens."""
        if self.active is None:
            return None
        self.again = computed_again(model)
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        call: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
        call.pop("kwargs", None)
        tokens = self.methods[self.active].tokens
        batch, device = batch_of(call)
        under = next((n for n, v in call.items() if isinstance(v, Cache)), self.cache)
        cache: Cache | None = call.pop(under, None)
        empty = cache is None or cache.get_seq_length() == 0
        call[self.cache] = self.filled(cache, batch) if empty else cache
        if self.again.blocks and torch.is_grad_enabled():
            call[self.cache] = read_only(call[self.cache], own=empty)
        self.again.read_cache(True)
        mask = call.get("attention_mask")
        if mask is not None:
            ones = torch.ones(batch, tokens, dtype=mask.dtype, device=device)
            call["attention_mask"] = torch.cat([ones, mask], dim=1)
        for key in ("position_ids", "cache_position"):
            if call.get(key) is not None:
                call[key] = call[key] + tokens
        return (), call

    def after_forward(self, *_: object) -> None:
        """Leave the blocks as they were before the call."""
        self.again.read_cache(False)
        self.again = Recomputed((), ())

    def filled(self, cache: Cache | None, batch: int) -> Cache:
        """Return the cache, or a new one, holding the virtual tokens' keys and values."""
        assert self.active is not None
        cache = DynamicCache() if cache is None else cache
        method, params = self.methods[self.active], self.params(self.active)
        active, self.active = self.active, None
        try:
            with self.again.off():
                pairs = method.keys_values(params, self.model)
        finally:
            self.active = active
        for layer, (key, value) in enumerate(pairs):
            cache.update(repeated(key, batch), repeated(value, batch), layer)
        return cache


def check_takes_prompts(model: Any, cache: str) -> None:
    """Raise unless a model's tokens attend to what its key-value cache holds before them.

    Tried on a small model of the same class, where one can be built.

    Raises:
        AdapterError: it has no such cache, or encodes rather than generates.
    """
    why = None if cache else "it takes no key-value cache"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        why = "it is an encoder-decoder"
    if why is None and isinstance(model, PreTrainedModel):
        known = (layer_class(model), repr(sorted(model.config.to_dict().items(), key=repr)))
        if known not in reasons:
            reasons[known] = in_clean_thread(lambda: refusal(model, cache))
        why = reasons[known]
    if why is not None:
        raise AdapterError(
            f"{type(model).__name__} cannot have a prompt: {why}, and prompt methods put virtual "
            "tokens before the text of a decoder, by their keys and values; use a decoder model, "
            "or a weight method such as LoRA"
        )


reasons: dict[Any, str | None] = {}
"""Class and configuration -> why it takes no prompt, or None where it does."""


def refusal(model: PreTrainedModel, cache: str) -> str | None:
    """Return why a model of this class takes no prompt, found on a small one, or None."""
    ids = torch.randint(3, 8, (1, 6), generator=torch.Generator().manual_seed(0))
    try:
        twin: Any = small_model(model, lambda built: built(input_ids=ids)).eval()
    except ValueError:
        return None  # where none can be tried, the model itself will say
    with torch.no_grad():
        whole = twin(input_ids=ids)[0]
        held: Any = cache_in(twin(input_ids=ids[:, :3], use_cache=True).values())
        if held is None:
            return "it gives no key-value cache"
        if not all(isinstance(getattr(x, "keys", None), Tensor) for x in held.layers):
            return "some of its layers keep a state in place of keys and values"
        heads, width = attention_shape(twin.config)[1:]
        shapes = {(1, heads, 3, width)}
        if {tuple(t.shape) for x in held.layers for t in (x.keys, x.values)} != shapes:
            return "its layers differ in the shape of their keys and values"
        alone = DynamicCache()
        for number, layer in enumerate(held.layers):
            alone.update(layer.keys, layer.values, number)
        try:
            second = twin(input_ids=ids[:, 3:], use_cache=True, **{cache: alone})[0]
        except Exception:  # whatever another library's class may raise
            return "its layers keep more than keys and values"
    by_token = whole.shape[1] == ids.shape[1] and second.shape[1] == 3
    wanted = whole[:, 3:] if by_token else whole
    near = second.shape == wanted.shape and torch.allclose(second, wanted, rtol=1e-3, atol=1e-4)
    return None if near else "its tokens see more, or less, than keys and values before them"


def repeated(x: Tensor, batch: int) -> Tensor:
    """Repeat (1, heads, tokens, width) over the batch without a copy."""
    return x.expand(batch, -1, -1, -1)


def batch_of(call: dict[str, Any]) -> tuple[int, torch.device]:
    """Return the batch size and device of a call."""
    given = call.get("input_ids")
    given = call.get("inputs_embeds") if given is None else given
    if given is None:
        raise AdapterError("a prompt adapter needs input_ids or inputs_embeds in the call")
    return given.shape[0], given.device


def computed_again(model: nn.Module) -> Recomputed:
    """Return what gradient checkpointing computes again in this call: nothing outside training.

    Raises:
        AdapterError: it would drop the cache, and the prompt with it.
    """
    found = recomputed(model) if model.training else Recomputed((), ())
    if found is None:
        raise AdapterError(
            "gradient checkpointing, as it is set, drops the key-value cache that prompt methods "
            "use; ask for it with use_reentrant=False, turn it off (gradient_checkpointing=False) "
            "or choose a weight method such as LoRA"
        )
    return found


def read_only(cache: Cache, own: bool) -> Cache:
    """Return a cache of the same keys and values that blocks do not write to.

    Raises:
        AdapterError: it is a cache of the caller's, which must be written to.
    """
    if not own:
        raise AdapterError(
            "gradient checkpointing computes blocks again, which cannot go on from a cache that "
            "is given; turn it off (gradient_checkpointing=False), or leave the cache out"
        )
    found = ReadOnly()
    found.layers = cache.layers
    return found
