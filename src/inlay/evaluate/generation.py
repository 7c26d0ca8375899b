"""Batched text generation, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from inlay.errors import DataError, ModelError
from inlay.evaluate.losses import Progress, buckets
from inlay.methods.base import PromptMethod, evaluating
from inlay.model.adapters.registry import active, adapters
from inlay.model.load.causal import check_one_text

Prompt = str | Sequence[int]
"""A prompt as text, or as tokens."""
ROUTER = "output_router_logits"
"""The setting by which a mixture of experts returns the logits of its router."""
Fill = Callable[[Sequence[int], int], Mapping[str, torch.Tensor]]
"""(indices of prompts, padded length) -> model inputs besides tokens, such as images."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled."""

    temperature: float = 1.0
    top_p: float = 1.0
    """The probability of the most likely tokens that are sampled from."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt."""

    tokens: tuple[int, ...]
    """Includes the end token, if the answer ended."""
    text: str
    ended: bool
    """Whether the answer ended, rather than being cut off at the maximum length."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    *,
    fill: Fill | None = None,
    on_progress: Progress | None = None,
) -> list[str]:
    """Return the greedy continuation of each prompt as text; the rest is as in `answer`."""
    found = answer(
        model, tokenizer, prompts, max_new_tokens, batch_size, fill=fill, on_progress=on_progress
    )
    return [each.text for each in found]


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    *,
    sampling: Sampling | None = None,
    fill: Fill | None = None,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """Return a continuation of each prompt: greedy, or sampled where `sampling` is given.

    Prompts of similar length form a batch, padded on the left. Generation stops early where the
    model's context is full. Sampling leaves torch's random state unchanged. `fill` returns the
    model inputs of prompts besides their tokens, such as images.
    """
    if not isinstance(model, GenerationMixin):
        raise ModelError(
            f"a {type(model).__name__} cannot generate text; expected a causal language model"
        )
    check_one_text(type(model).__name__, model.config)
    ends = end_tokens(model, tokenizer)
    tokens = [list(tokenizer(p)["input_ids"] if isinstance(p, str) else p) for p in prompts]
    room = context_length(model)
    check_room(tokens, room)
    found: dict[int, Answer] = {}
    with evaluating(model), torch.no_grad(), drawing(model, sampling):
        for batch in batches([len(t) for t in tokens], batch_size, room, max_new_tokens):
            longest = len(tokens[batch[0]])
            steps = max_new_tokens if room is None else min(max_new_tokens, room - longest)
            config = settings(steps, ends, tokenizer, sampling)
            more = fill(batch, longest) if fill is not None else {}
            new = continued(model, [tokens[i] for i in batch], config, more)
            ended = [ids[-1] in ends for ids in new]
            whole = [ids[:-1] if end else ids for ids, end in zip(new, ended, strict=True)]
            texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
            made = zip(map(tuple, new), texts, ended, strict=True)
            found |= {i: Answer(*each) for i, each in zip(batch, made, strict=True)}
            if on_progress is not None:
                on_progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


@contextmanager
def drawing(model: nn.Module, sampling: Sampling | None) -> Generator[None]:
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        yield


def batches(
    lengths: Sequence[int], batch_size: int, room: int | None, max_new_tokens: int
) -> Iterator[list[int]]:
    """Yield indices by length; a prompt that may fill the context is alone in its batch."""
    if room is not None:
        yield from ([i] for i, length in enumerate(lengths) if length > room - max_new_tokens)
    fits = [i for i, n in enumerate(lengths) if room is None or n <= room - max_new_tokens]
    for batch in buckets([lengths[i] for i in fits], batch_size):
        yield [fits[i] for i in batch]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own: int | list[int] | None = model.generation_config.eos_token_id
    found = set(own if isinstance(own, list) else [] if own is None else [own])
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ModelError(
            "neither the model nor its tokenizer names an end-of-sequence token, so generated "
            "text would not end; set eos_token_id in generation_config.json"
        )
    return sorted(found)


def context_length(model: Any) -> int | None:
    """Return the context length without the virtual tokens of active prompt adapters."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    attached = adapters(model)
    methods = [attached[name].method for name in active(model)]
    return limit and limit - sum(m.tokens for m in methods if isinstance(m, PromptMethod))


def check_room(tokens: Sequence[Sequence[int]], room: int | None) -> None:
    for number, prompt in enumerate(tokens, start=1):
        if not prompt:
            raise DataError(f"prompt {number} is empty; give it at least one token")
        if room is not None and len(prompt) >= room:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and leaves no room to generate in the "
                f"model's context of {room}; shorten it"
            )


def settings(
    steps: int, ends: list[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling | None
) -> GenerationConfig:
    """Return the generation config; the model's own sampling settings do not apply."""
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=steps,
        do_sample=sampling is not None,
        num_beams=1,
        temperature=1.0 if sampling is None else sampling.temperature,
        top_k=50 if sampling is None else 0,
        top_p=1.0 if sampling is None else sampling.top_p,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
    )


def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    more: Mapping[str, torch.Tensor] | None = None,
    *,
    processors: LogitsProcessorList | None = None,
    synced: bool = False,
) -> list[list[int]]:
    """Return the new tokens with the end token; `synced` waits for every process."""
    longest = max(map(len, prompts))
    ids = [[config.pad_token_id] * (longest - len(p)) + [*p] for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    device = next(model.parameters()).device
    with without_router_logits(model):
        found = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=processors,
            synced_gpus=synced,
            **{name: value.to(device) for name, value in (more or {}).items()},
        )
    return [until_end(row[longest:], config) for row in found.tolist()]


@contextmanager
def without_router_logits(model: Any) -> Generator[None]:
    """Turn off the router logits of a mixture of experts: generation does not need them."""
    config: Any = model.config.get_text_config()
    before = getattr(config, ROUTER, False)
    if before:
        setattr(config, ROUTER, False)
    try:
        yield
    finally:
        if before:
            setattr(config, ROUTER, True)


def until_end(tokens: list[int], config: GenerationConfig) -> list[int]:
    ends: Any = config.eos_token_id
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
