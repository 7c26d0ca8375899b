"""Memory and work of the answers that a step generates before it trains on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from inlay.kernels.cost import planning_for
from inlay.memory.known import known_tensor
from inlay.memory.ledger import Ledger, Work
from inlay.memory.simulate import fake_tensors
from inlay.model.seams.transformers import cache_argument

LOGITS_KEPT = 1
"""Generation asks for the logits of the last position alone."""


@dataclass(frozen=True)
class Answering:
    """The batch of answers that a step generates: their number and greatest length."""

    rows: int
    prompt: int
    """Tokens of the longest prompt."""
    tokens: int
    """Tokens of the longest answer."""
    sorts: bool
    """Whether the logits are sorted, as top_p below 1 asks for."""


@dataclass(frozen=True)
class Answered:
    """Memory and work of generating the answers."""

    tokens: int
    """Forward passes, one a token."""
    cache: int
    """Bytes of the keys and values of whole prompts and answers."""
    buffers: int
    """The peak in bytes without weights, adapter, optimiser and cache."""
    first: dict[str, Work]
    """The pass over the prompts: operation -> what it does."""
    each: dict[str, Work]
    """The pass that writes the last token, the largest."""


@torch.no_grad()
def simulate_answers(
    build: Callable[[], nn.Module], asked: Answering, kind: Literal["cpu", "cuda"]
) -> Answered:
    """Run the first and last pass on fake tensors; ModelError if values are needed."""
    ids = [torch.zeros(asked.rows, tokens, dtype=torch.long) for tokens in (asked.prompt, 1)]
    with planning_for(kind), fake_tensors() as mode:
        model = build().eval()
        ledger = Ledger()
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        prompts, last = (known_tensor(mode, each) for each in ids)
        with ledger:
            resting = ledger.total
            config: Any = model.config
            cache = DynamicCache(config=config)
            ledger.start_over()
            draw(model, prompts, cache, asked.sorts)
            mask = asked.rows * asked.prompt**2
            first, buffers = dict(ledger.work), ledger.peak - resting - size_of(cache) + mask
            grow(cache, asked.tokens - 1)
            ledger.start_over()
            held = size_of(cache)
            draw(model, last, cache, asked.sorts)
            buffers = max(buffers, ledger.peak - resting - held) + ledger.kept
            return Answered(asked.tokens, held, buffers, first, dict(ledger.work))


def draw(model: nn.Module, ids: Tensor, cache: DynamicCache, sorts: bool) -> None:
    """The mask of padded prompts, whose values decide how it is made, is counted apart."""
    call: dict[str, Any] = {cache_argument(model.forward) or "cache": cache, "use_cache": True}
    found = model(input_ids=ids, logits_to_keep=LOGITS_KEPT, **call)
    logits = found.logits[:, -1].to(torch.float32, copy=True)
    scores = logits / 1.0
    if sorts:
        ordered, _ = scores.sort()
        ordered.softmax(-1).cumsum(-1)
    scores.softmax(-1)


def grow(cache: DynamicCache, tokens: int) -> None:
    layers: list[Any] = list(cache.layers)
    for number, layer in enumerate(layers):
        if isinstance(getattr(layer, "keys", None), Tensor):
            both = (layer.keys, layer.values)
            more = (x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in both)
            cache.update(next(more), next(more), number)


def size_of(cache: DynamicCache) -> int:
    held = [x for layer in cache.layers for x in tree_leaves(list(vars(layer).values()))]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))
