"""How a model takes virtual tokens, tried on a small model of its class."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from inlay.errors import AdapterError
from inlay.methods.models import attention_shape, encoder_of, input_embedding
from inlay.model.adapters.prompts.call import EMBEDDINGS
from inlay.model.fast.proof import in_clean_thread
from inlay.model.fast.shrink import small_model
from inlay.model.seams.transformers import cache_argument, cache_in
from inlay.storage.registry import layer_class

NO_CACHE = "it takes no key-value cache"
REMEDY = (
    ", and prompt methods put virtual tokens before the text: before a decoder's by their keys and "
    "values, before an encoder's by their embeddings; use another model, or a weight method such "
    "as LoRA"
)


@dataclass(frozen=True)
class Takes:
    """How a model takes virtual tokens, or why it takes none.

    A decoder reads keys and values from its cache. An encoder sees both ways: embeddings stand
    before its text, and some encoders read keys and values too. An encoder-decoder reads
    embeddings in its encoder, keys and values in its decoder.
    """

    kind: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    refused: str | None = None
    """Why it takes no prompt at all."""
    no_keys: str | None = None
    """Why it takes no keys and values."""
    no_embeddings: str | None = None
    """Why it takes no embeddings."""
    labels_by_token: bool = False
    """Whether each token of the text has a label, so that virtual tokens need one, too."""


known: dict[Any, Takes] = {}
"""Class and config -> what was found."""


def taken_by(model: Any) -> Takes:
    """Return how a model takes virtual tokens; raise `AdapterError` where it takes none.

    Tried on a small model of the same class, where one can be built.
    """
    if isinstance(model, PreTrainedModel):
        key = (layer_class(model), repr(sorted(model.config.to_dict().items(), key=repr)))
        if key not in known:
            known[key] = in_clean_thread(lambda: tried(model))
        found = known[key]
    else:
        found = untried(model)
    if found.refused is not None:
        raise AdapterError(f"{type(model).__name__} cannot have a prompt: {found.refused}{REMEDY}")
    return found


def untried(model: Any) -> Takes:
    """Take a model for a decoder where its forward has a cache; its own calls will show more."""
    return Takes(refused=None if cache_argument(model.forward) else NO_CACHE)


def tried(model: PreTrainedModel) -> Takes:
    try:
        small: Any = small_model(model, lambda built: built(**text_for(built))).eval()
    except ValueError:
        return untried(model)
    with torch.no_grad():
        if getattr(small.config, "is_encoder_decoder", False):
            return taken_by_encoder_decoder(small)
        why = NO_CACHE if not cache_argument(small.forward) else no_decoder(small)
        if why is None:
            return Takes()
        return taken_by_encoder(small) if sees_both_ways(small) else Takes(refused=why)


def text_for(model: Any) -> dict[str, Tensor]:
    """Return six tokens for a model, none of them padding; and six for its decoder, if any."""
    padding = getattr(model.config, "pad_token_id", None)
    drawn = torch.randint(3, 8, (1, 6), generator=torch.Generator().manual_seed(0))
    ids = drawn.where(drawn != (-1 if padding is None else padding), 9)
    decoded = "decoder_input_ids" in signature(model.forward).parameters
    return {"input_ids": ids, **({"decoder_input_ids": ids} if decoded else {})}


def near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


# In these trials, whatever another library's class may raise is caught.


def no_decoder(small: Any) -> str | None:
    """Return why a model's tokens do not attend to what its cache holds before them, or None."""
    ids, name = text_for(small)["input_ids"], cache_argument(small.forward) or ""
    whole = small(input_ids=ids)[0]
    held: Any = cache_in(small(input_ids=ids[:, :3], use_cache=True).values())
    if held is None:
        return "it gives no key-value cache"
    if not all(isinstance(getattr(x, "keys", None), Tensor) for x in held.layers):
        return "some of its layers keep a state in place of keys and values"
    heads, width = attention_shape(small.config)[1:]
    shapes = {tuple(t.shape) for x in held.layers for t in (x.keys, x.values)}
    if shapes != {(1, heads, 3, width)}:
        return "its layers differ in the shape of their keys and values"
    alone = DynamicCache()
    for number, layer in enumerate(held.layers):
        alone.update(layer.keys, layer.values, number)
    try:
        second = small(input_ids=ids[:, 3:], use_cache=True, **{name: alone})[0]
    except Exception:
        return "its layers keep more than keys and values"
    by_token = whole.shape[1] == ids.shape[1] and second.shape[1] == 3
    if near(second, whole[:, 3:] if by_token else whole):
        return None
    return "its tokens see more, or less, than keys and values before them"


def sees_both_ways(small: Any) -> bool:
    try:
        ids = text_for(small)["input_ids"]
        other = torch.cat([ids[:, :-1], ids[:, -1:] + 3], dim=1)
        first, second = (small.base_model(input_ids=x)[0] for x in (ids, other))
    except Exception:
        return False
    return first.shape[1:2] == ids.shape[1:] and not near(first[:, 0], second[:, 0])


def taken_by_encoder(small: Any) -> Takes:
    text = text_for(small)
    length = text["input_ids"].shape[1]
    logits = [value for name, value in small(**text).items() if "logits" in name]
    tensors = [value for value in logits if isinstance(value, Tensor)]
    return Takes(
        "encoder",
        no_keys=no_keys(small.base_model, text),
        no_embeddings=no_embeddings(small, text),
        labels_by_token=any(x.dim() == 3 and x.shape[1] == length for x in tensors),
    )


def no_embeddings(small: Any, text: dict[str, Tensor]) -> str | None:
    """Return why a model does not read its tokens' embeddings as it reads the tokens, or None."""
    if EMBEDDINGS not in signature(small.forward).parameters:
        return f"it takes no {EMBEDDINGS}"
    try:
        table = input_embedding(small)
    except AdapterError:
        return "it has no table of token embeddings"
    by_ids = small(**text)[0]
    others = {name: value for name, value in text.items() if name != "input_ids"}
    try:
        by_embeddings = small(**others, **{EMBEDDINGS: table(text["input_ids"])})[0]
    except Exception:
        return f"it does not run on {EMBEDDINGS}"
    if not near(by_embeddings, by_ids):
        return f"it reads {EMBEDDINGS} otherwise than its tokens' embeddings"
    width = getattr(small.config.get_text_config(), "hidden_size", table.embedding_dim)
    if width != table.embedding_dim:
        return f"its token embeddings are {table.embedding_dim} wide, its hidden states {width}"
    return None


def no_keys(body: Any, text: dict[str, Tensor]) -> str | None:
    """Return why an encoder's tokens do not attend to keys and values before them, or None."""
    name = cache_argument(body.forward)
    if name is None:
        return NO_CACHE
    try:
        layers, heads, width = attention_shape(body.config)
        cache, draw = DynamicCache(), torch.Generator().manual_seed(1)
        for layer in range(layers):
            pair = torch.randn(2, 1, heads, 3, width, generator=draw)
            cache.update(pair[0], pair[1], layer)
        ones = torch.ones(1, 9, dtype=torch.long)
        got = body(**text, attention_mask=ones, **{name: cache})[0]
    except Exception:
        return "it does not run with keys and values before its text"
    changed = got.shape[1] == 6 and not near(got, body(**text)[0])
    return None if changed else "its tokens do not attend to keys and values before them"


def taken_by_encoder_decoder(small: Any) -> Takes:
    text = text_for(small)
    encoder = encoder_of(small)
    if encoder is None:
        return Takes(refused="it is an encoder-decoder without one encoder of text")
    return Takes(
        "encoder-decoder",
        no_keys=no_decoder_keys(small, text),
        no_embeddings=no_embeddings(encoder, {"input_ids": text["input_ids"]}),
    )


def no_decoder_keys(small: Any, text: dict[str, Tensor]) -> str | None:
    """Return why a decoder's tokens do not attend to keys and values before them, or None."""
    name = cache_argument(small.forward)
    if name is None:
        return NO_CACHE
    try:
        held: Any = cache_in(small(**text, use_cache=True).values())
        own = [tuple(x.keys.shape) for x in held.self_attention_cache.layers]
        config, (layers, heads, width) = small.config, attention_shape(small.config)
        of_encoder = (config.num_hidden_layers, config.num_attention_heads)
        if own != layers * [(1, heads, 6, width)] or of_encoder != (layers, heads):
            return "its encoder and its decoder differ in layers or heads"
        begun = {**text, "decoder_input_ids": text["decoder_input_ids"][:, :3]}
        first: Any = cache_in(small(**begun, use_cache=True).values())
        cache = EncoderDecoderCache(first.self_attention_cache, DynamicCache())
        rest = {**text, "decoder_input_ids": text["decoder_input_ids"][:, 3:]}
        got = small(**rest, **{name: cache})[0]
    except Exception:
        return "its decoder does not run with keys and values before its text"
    whole = small(**text)[0][:, 3:]
    return None if near(got, whole) else "its decoder sees more, or less, than keys and values"
