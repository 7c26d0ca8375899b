"""Give a prompt method's virtual tokens to a model, before every sequence."""

from __future__ import annotations

import inspect
import threading
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache

from inlay.errors import AdapterError
from inlay.kernels.loss import IGNORED
from inlay.methods.base import Params, PromptMethod
from inlay.methods.models import encoder_of, input_embedding
from inlay.model.adapters.prompts.cache import (
    BehindPrompt,
    check_begun,
    check_continues,
    check_without,
    decoders_part,
    mark_begun,
    read_only,
    taken_out,
    wants_cache,
    without_cache,
)
from inlay.model.adapters.prompts.trial import EMBEDDINGS, Takes, taken_by
from inlay.model.seams.transformers import ModelOutput, Recomputed, cache_argument, recomputed
from inlay.storage.registry import layer_class

Changed = tuple[tuple[()], dict[str, Any]] | None
"""A call's new arguments; None leaves it as it is."""


class OfCall:
    """What a hook knows of the call that it changes; each thread has its own."""

    def __init__(self) -> None:
        self.aside = False
        """Whether the model runs without the virtual tokens now, which computes them."""
        self.again = Recomputed((), ())
        """What of the model is computed again in the backward pass."""
        self.cache: BehindPrompt | None = None
        """The cache that is read and written."""
        self.drops_cache = False
        """Whether the call asks for no cache, and only the virtual tokens brought one."""
        self.reads: torch.Size | None = None
        """(batch, tokens) that is read, where embeddings stand before the text."""


CALLS = threading.local()
"""By hook, what is known of the call that runs in this thread."""


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
        """Whether an encoder's outputs keep the virtual tokens' places, as HF PEFT's do."""

    @property
    def running(self) -> OfCall:
        """What is known of the call that runs in this thread."""
        by_hook: WeakKeyDictionary[PromptHook, OfCall] = vars(CALLS).setdefault(
            "by_hook", WeakKeyDictionary()
        )
        return by_hook.setdefault(self, OfCall())

    @property
    def acts(self) -> str | None:
        """The active adapter's name, unless the model runs without it now."""
        return None if self.running.aside else self.active

    def check(self, method: PromptMethod) -> None:
        """Raise unless the model takes this method's virtual tokens.

        Raises:
            AdapterError: it does not.
        """
        why = self.takes.no_embeddings if method.has_embeddings else self.takes.no_keys
        if why is not None:
            raise AdapterError(
                f"{type(self.model).__name__} cannot have {method.name}: {why}; use "
                f"{'prefix tuning' if method.has_embeddings else 'prompt tuning'}, where the model "
                "takes it, or another of the prompt methods or a weight method such as LoRA"
            )

    def put_on(self) -> list[RemovableHandle]:
        """Put the hooks on that change the calls of the model and of its parts."""
        return [self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)]

    def add(self, name: str, method: PromptMethod, params: Params) -> None:
        """Add one adapter, not yet active; the hooks are put on with the first."""
        if not self.methods:
            self.model.adapters = nn.ModuleDict()
            after = self.model.register_forward_hook(self.after_forward, always_call=True)
            self.handles = [*self.put_on(), after]
        self.methods[name] = method
        self.table[name] = params

    def remove(self, name: str) -> bool:
        """Drop one adapter if it is here; return whether the hooks were taken off with the last."""
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

    def acting(self, embeddings: bool) -> PromptMethod | None:
        """Return the active method, if it has embeddings, or else if it has keys and values."""
        method = self.methods[self.acts] if self.acts is not None else None
        return method if method is not None and method.has_embeddings == embeddings else None

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        """Change one call's arguments so that attention sees the virtual tokens."""
        if self.acts is None:
            check_without(*args, *kwargs.values())
            return None
        return self.with_keys(model, args, kwargs, self.methods[self.acts].tokens)

    def with_keys(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int
    ) -> Changed:
        """Return one call's arguments with keys and values before its text."""
        self.running.again = computed_again(model)
        call = arguments(model, args, kwargs)
        name, new = self.put_cache(model, call, batch_of(call)[0])
        if not new:
            check_continues(call[name], call, tokens)
        if self.running.again.blocks and torch.is_grad_enabled():
            call[name] = read_only(call[name], own=new)
        self.running.again.read_cache(True)
        widened(call, "attention_mask", tokens, 1)
        for key in ("position_ids", "cache_position"):
            if call.get(key) is not None:
                call[key] = call[key] + tokens
        return (), call

    def put_cache(self, model: nn.Module, call: dict[str, Any], rows: int) -> tuple[str, bool]:
        """Give a call a cache that begins with the virtual tokens: its own, or a new one.

        Returns the name of the argument, and whether the cache holds no text yet.
        """
        name = cache_argument(own_forward(model)) or ""
        cache = self.entered(taken_out(call, name))
        new = cache is None or cache.get_seq_length() == 0
        if not new:
            check_begun(cache, self.acts)
        call[name] = self.filled(cache, rows) if new else cache
        # After filling it, which may run the model.
        self.running.drops_cache = cache is None and not wants_cache(model, call)
        return name, new

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Leave the blocks as they were before the call, and no cache that it did not ask for.

        Generation without a cache would go on from it, over text that it holds already.
        """
        del model, args
        self.running.again.read_cache(False)
        self.running.again = Recomputed((), ())
        if self.running.cache is not None:
            self.running.cache.in_call, self.running.cache = False, None
        drops, self.running.drops_cache = self.running.drops_cache, False
        return without_cache(output) if drops else None

    def filled(self, cache: Cache | None, batch: int) -> Cache:
        """Return the cache, or a new one, holding the virtual tokens' keys and values."""
        cache = DynamicCache() if cache is None else cache
        for layer, (key, value) in enumerate(self.pairs()):
            cache.update(repeated(key, batch), repeated(value, batch), layer)
        self.begins(cache)
        return cache

    def begins(self, cache: Any) -> None:
        """Note that a cache begins with the active method's virtual tokens."""
        assert self.acts is not None
        mark_begun(cache, self.acts, self.methods[self.acts].tokens)
        self.entered(cache)

    def entered(self, cache: Any) -> Any:
        """Return the cache of a call that begins, which tells all that it holds until the end."""
        own = decoders_part(cache)
        if isinstance(own, BehindPrompt):
            self.running.cache, own.in_call = own, True
        return cache

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of the active method, by layer."""
        assert self.acts is not None
        method, params = self.methods[self.acts], self.params(self.acts)
        self.running.aside = True
        try:
            with self.running.again.off():
                return method.keys_values(params, self.model)
        finally:
            self.running.aside = False

    def before(self, text: Tensor) -> Tensor:
        """Return (batch, tokens, width): the active embeddings, then those of the text."""
        assert self.acts is not None
        found = self.methods[self.acts].embeddings(self.params(self.acts))
        rows = found[: self.methods[self.acts].tokens].to(text.dtype)
        return torch.cat([rows.expand(len(text), -1, -1), text], dim=1)


class EncoderPrompts(PromptHook):
    """The prompt adapters of an encoder, which reads [E; x] at every position.

    Outputs are as long as the text, or with `whole` as long as what the model reads.
    """

    def put_on(self) -> list[RemovableHandle]:
        """Put the hooks on: keys and values are given to the module that has the cache."""
        body: Any = self.model
        reads = self.model if cache_argument(own_forward(body)) else body.base_model
        return [
            self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            reads.register_forward_pre_hook(self.before_body, with_kwargs=True),
            self.model.register_forward_hook(self.of_text),
        ]

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        """Change one call's arguments so that embeddings stand before the text."""
        method = self.acting(embeddings=True)
        if method is None:
            return None
        call, tokens = arguments(model, args, kwargs), method.tokens
        shape = embedded(call, self.model)
        call[EMBEDDINGS] = self.before(call[EMBEDDINGS])
        self.running.reads = call[EMBEDDINGS].shape[:2]
        widened(call, "attention_mask", tokens, 1)
        widened(call, "token_type_ids", tokens, 0)
        if self.takes.labels_by_token and getattr(call.get("labels"), "shape", None) == shape:
            widened(call, "labels", tokens, IGNORED)
        if call.pop("position_ids", None) is not None:
            warnings.warn(
                f"position_ids are left out: {type(model).__name__} numbers the virtual tokens and "
                "the text after them by itself",
                stacklevel=3,
            )
        return (), call

    def of_text(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Leave the virtual tokens' places out of an output."""
        del model, args
        method, reads = self.acting(embeddings=True), self.running.reads
        self.running.reads = None
        if method is None or reads is None or self.whole:
            return None
        if not isinstance(output, ModelOutput):
            return without(output, "", reads, method.tokens)
        for name, value in list(output.items()):
            output[name] = without(value, name, reads, method.tokens)
        return output

    def before_body(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        """Change one call's arguments so that keys and values stand before the text."""
        method = self.acting(embeddings=False)
        return method and self.with_keys(body, args, kwargs, method.tokens)


class EncoderDecoderPrompts(PromptHook):
    """The prompt adapters of an encoder-decoder.

    The encoder reads [E; x]; the decoder reads keys and values before its text. So it is in HF
    PEFT, whose layout gives the decoder's layer i the pair 2 i modulo the number of layers.
    """

    def put_on(self) -> list[RemovableHandle]:
        """Put the hooks on the model and on its encoder, which generation calls alone."""
        encoder: nn.Module = encoder_of(self.model)
        return [
            *super().put_on(),
            encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True),
        ]

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        """Change one call's masks, and give the decoder its keys and values."""
        if self.acts is None:
            check_without(*args, *kwargs.values())
            return None
        call, tokens = arguments(model, args, kwargs), self.methods[self.acts].tokens
        if self.acting(embeddings=True):
            widened(call, "attention_mask", tokens, 1)
            return (), call
        widened(call, "decoder_attention_mask", tokens, 1)
        _, new = self.put_cache(model, call, decoded_rows(call))
        if new and model.training and torch.is_grad_enabled() and is_recomputed(model):
            raise AdapterError(
                "gradient checkpointing drops the key-value cache of an encoder-decoder, and the "
                "prefix with it; turn it off (gradient_checkpointing=False), or use prompt tuning"
            )
        return (), call

    def before_encoder(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Changed:
        """Change one call's arguments so that embeddings stand before the encoder's text."""
        method = self.acting(embeddings=True)
        if method is None:
            return None
        call = arguments(encoder, args, kwargs)
        _, length = embedded(call, encoder)
        call[EMBEDDINGS] = self.before(call[EMBEDDINGS])
        mask = call.get("attention_mask")
        if mask is not None and mask.shape[1] == length:  # a call that the model did not make
            widened(call, "attention_mask", method.tokens, 1)
        return (), call

    def filled(self, cache: Any, batch: int) -> Cache:
        """Return a cache whose part for the decoder's own tokens holds the virtual ones."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        found = self.pairs()
        for layer in range(len(found)):
            key, value = found[2 * layer % len(found)]
            cache.self_attention_cache.update(repeated(key, batch), repeated(value, batch), layer)
        self.begins(cache.self_attention_cache)
        return cache


HOOKS: dict[str, type[PromptHook]] = {
    "decoder": PromptHook,
    "encoder": EncoderPrompts,
    "encoder-decoder": EncoderDecoderPrompts,
}


def prompt_hook(model: nn.Module) -> PromptHook:
    """Return what gives a model its prompts.

    Raises:
        AdapterError: it takes none.
    """
    found = taken_by(model)
    return HOOKS[found.kind](model, found)


def own_forward(module: nn.Module) -> Any:
    """Return the forward of a module's class: for a call, another may stand in its place."""
    return layer_class(module).forward.__get__(module)


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by their names."""
    bound = inspect.signature(own_forward(module)).bind_partial(*args, **kwargs).arguments
    call: dict[str, Any] = {**bound, **bound.get("kwargs", {})}
    call.pop("kwargs", None)
    return call


def embedded(call: dict[str, Any], module: Any) -> torch.Size:
    """Have a call bring its text's embeddings in place of ids; return (batch, tokens).

    Raises:
        AdapterError: it brings neither, or more than one text a row.
    """
    ids = call.pop("input_ids", None)
    if call.get(EMBEDDINGS) is None:
        if ids is None:
            raise AdapterError("a prompt adapter needs input_ids or inputs_embeds in the call")
        call[EMBEDDINGS] = input_embedding(module)(ids)
    text: Tensor = call[EMBEDDINGS]
    if text.dim() != 3:
        raise AdapterError(
            f"a prompt stands before one text a row, (batch, tokens), and this call brings "
            f"{tuple(text.shape[:-1])}; give each text a row of its own"
        )
    return text.shape[:2]


def widened(call: dict[str, Any], key: str, tokens: int, value: int) -> None:
    """Put a value for each virtual token before a call's argument of (batch, tokens), if given.

    Raises:
        AdapterError: it has other dimensions.
    """
    given = call.get(key)
    if given is None:
        return
    if not isinstance(given, Tensor) or given.dim() != 2:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise AdapterError(
            f"{key} is {found}, and a prompt needs (batch, tokens), to which its virtual tokens "
            "are added"
        )
    call[key] = torch.cat([given.new_full((len(given), tokens), value), given], dim=1)


def without(value: Any, name: str, reads: torch.Size, tokens: int) -> Any:
    """Return part of an output without the virtual tokens' places, of which `reads` tells."""
    if isinstance(value, tuple):
        return tuple(without(each, name, reads, tokens) for each in value)
    by_token = isinstance(value, Tensor) and (value.dim() == 3 or name in BY_TOKEN)
    return value[:, tokens:] if by_token and value.shape[:2] == reads else value


BY_TOKEN = ("start_logits", "end_logits")
"""Outputs with one number a token."""


def decoded_rows(call: dict[str, Any]) -> int:
    """Return how many rows a decoder reads in a call."""
    keys = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", EMBEDDINGS)
    found = next((call[key] for key in keys if call.get(key) is not None), None)
    if found is None:
        raise AdapterError("a prompt adapter needs decoder_input_ids or labels in the call")
    return len(found)


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


def is_recomputed(model: nn.Module) -> bool:
    """Say whether gradient checkpointing is on for any part of a model."""
    found = recomputed(model)
    return found is None or bool(found.blocks)
