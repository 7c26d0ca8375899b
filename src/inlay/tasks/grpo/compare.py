"""What a model's answers are worth, and how far it has gone from its base: both on one data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from inlay.errors import DataError, ModelError
from inlay.evaluate.comparison import Stage, named, staged
from inlay.evaluate.generation import Answer, Sampling, answer
from inlay.evaluate.losses import Progress, batches, logits_at, padded, vocabulary
from inlay.evaluate.record import (
    ComparisonRecord,
    ExampleRecord,
    MetricComparison,
    compared_means,
    metric_record,
)
from inlay.evaluate.statistics import (
    LEVEL,
    SIGN_FLIP,
    PairedResult,
    bootstrap_interval,
    weighted_mean,
)
from inlay.evaluate.supervised import EXAMPLES
from inlay.kernels.loss import most_rows
from inlay.methods.base import evaluating
from inlay.model.adapters.attach import disabled
from inlay.model.fast.padding import length_multiple

Judging = Callable[[Sequence[Answer]], Mapping[str, Sequence[float]]]
"""What the answers to the prompts, one for one, are worth."""


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, and how their answers are generated and judged."""

    lines: Sequence[int]
    """The line of each row in its file."""
    tokens: Sequence[Sequence[int]]
    judge: Judging
    max_new_tokens: int
    sampling: Sampling
    """How answers are drawn in training."""


@dataclass(frozen=True)
class Measured:
    """What one model answers, the likeliest and drawn as in training, and what that is worth."""

    likeliest: Mapping[str, Sequence[float]]
    drawn: Mapping[str, Sequence[float]]
    answers: Sequence[Answer]
    """Those drawn."""


def compare_rewards(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    batch_size: int = 8,
    on_progress: Stage | None = None,
) -> ComparisonRecord:
    """Measure the model with its active adapters, and without, on the same prompts.

    `reward` is what the likeliest answers are worth, `sampled_reward` those drawn as in training,
    and so each reward by itself where there are several; `kl` is KL(tuned || base) in nats a token
    along the tuned model's drawn answers, which is 0 for the base.

    Args:
        model: a causal language model with an adapter on it.
        tokenizer: the model's tokenizer.
        prompts: the held-out prompts.
        batch_size: rows in one forward pass.
        on_progress: called as the work goes on.
    """
    if not prompts.tokens:
        raise DataError("there are no held-out prompts to answer; give more rows or another split")
    tuned = measured(model, tokenizer, prompts, batch_size, named("tuned", on_progress))
    with disabled(model):
        base = measured(model, tokenizer, prompts, batch_size, named("base", on_progress))
    rows = [(*p, *a.tokens) for p, a in zip(prompts.tokens, tuned.answers, strict=True)]
    starts = [len(prompt) for prompt in prompts.tokens]
    along = staged("distance to the base", on_progress)
    kl = divergence(
        model,
        rows,
        starts,
        temperature=prompts.sampling.temperature,
        batch_size=batch_size,
        on_progress=along,
    )
    return {
        "rows": len(prompts.tokens),
        "tokens": sum(len(a.tokens) for a in tuned.answers),
        "counted": "tokens in the tuned model's drawn answers",
        "generated_rows": len(prompts.tokens),
        "level": LEVEL,
        "metrics": [*reward_records(base, tuned), kl_record(kl), *length_records(base, tuned)],
        "examples": examples(tokenizer, prompts, base, tuned),
    }


def measured(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    batch_size: int,
    on_progress: Stage | None,
) -> Measured:
    """Return what the model as it is answers, and what that is worth."""
    likeliest, drawn = (
        answers_of(
            model, tokenizer, prompts, batch_size, sampling, staged(f"{how} answers", on_progress)
        )
        for how, sampling in (("likeliest", None), ("drawn", prompts.sampling))
    )
    return Measured(prompts.judge(likeliest), prompts.judge(drawn), drawn)


def answers_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    batch_size: int,
    sampling: Sampling | None = None,
    on_progress: Progress | None = None,
) -> list[Answer]:
    return answer(
        model,
        tokenizer,
        prompts.tokens,
        prompts.max_new_tokens,
        batch_size,
        sampling=sampling,
        on_progress=on_progress,
    )


# The distance to the base


@dataclass(frozen=True)
class Scored:
    """A prompt and its answer as tokens; the answer's are measured."""

    input_ids: Sequence[int]
    trained: Sequence[bool]


def divergence(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> list[float]:
    """Return each row's KL(model || base), the mean over the tokens from its start on, in nats.

    KL = sum over the vocabulary of p (log p - log q), where p is the model's distribution of a
    token and q the one without adapters, both at the temperature; the sum is exact, not sampled.
    """
    found: dict[int, float] = {}
    scored = [
        Scored(ids, [place >= start for place in range(len(ids))])
        for ids, start in zip(rows, starts, strict=True)
    ]
    with evaluating(model), torch.no_grad():
        for batch in batches(scored, batch_size, most_rows(vocabulary(model))):
            values = batch_divergence(model, [scored[i] for i in batch], temperature)
            if not all(map(torch.isfinite, values)):
                raise ModelError(
                    "the tuned model's distance to its base is not finite on held-out prompts; "
                    "its weights or adapter are not finite, or its dtype overflows (try dtype "
                    "bfloat16 or float32)"
                )
            found |= dict(zip(batch, values.tolist(), strict=True))
            if on_progress is not None:
                on_progress(len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def batch_divergence(model: nn.Module, rows: Sequence[Scored], temperature: float) -> Tensor:
    """Return the mean divergence of each of some rows, (n,)."""
    batch = padded(rows, length_multiple(model))
    where = batch.measured.nonzero(as_tuple=True)
    tuned = logits_at(model, batch.call, *where)
    with disabled(model):
        base = logits_at(model, batch.call, *where)
    owner = batch.owner[where]
    per_token = token_divergence(tuned, base, temperature).double().cpu()
    summed = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, per_token)
    return summed / owner.bincount(minlength=len(rows))


def token_divergence(tuned: Tensor, base: Tensor, temperature: float) -> Tensor:
    """Return KL(tuned || base) (n,) of two distributions as logits (n, vocabulary)."""
    log_p, log_q = ((x.float() / temperature).log_softmax(-1) for x in (tuned, base))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# Records


def reward_records(base: Measured, tuned: Measured) -> list[MetricComparison]:
    """Return the records of rewards that judged every answer, of one alone only as the whole."""
    sides = (base.likeliest, base.drawn, tuned.likeliest, tuned.drawn)
    judged = [part for part in base.likeliest if all(part in side for side in sides)]
    parts = judged if len(base.likeliest) > 2 else ["reward"]
    found: list[MetricComparison] = []
    for part in parts:
        name = part if part == "reward" else f"reward_{part}"
        found.append(compared_means(name, "higher", base.likeliest[part], tuned.likeliest[part]))
        found.append(
            compared_means(f"sampled_{name}", "higher", base.drawn[part], tuned.drawn[part])
        )
    return found


def length_records(base: Measured, tuned: Measured) -> list[MetricComparison]:
    """Return how long the drawn answers are, and how many are cut off."""
    sides = (base.answers, tuned.answers)
    lengths = [[float(len(each.tokens)) for each in side] for side in sides]
    cut = [[float(not each.ended) for each in side] for side in sides]
    neither: MetricComparison = {
        **compared_means("answer_tokens", "lower", *lengths),
        "better": "neither",
    }
    return [neither, compared_means("cut_off", "lower", *cut)]


def kl_record(values: Sequence[float]) -> MetricComparison:
    """Return the record of the divergence, which needs no test: it is 0 for the base."""
    mean, interval = weighted_mean(values), bootstrap_interval(values)
    result = PairedResult(mean, interval, None, SIGN_FLIP, len(values))
    return metric_record("kl", "lower", (0.0, mean), [None, interval], result)


def examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, base: Measured, tuned: Measured
) -> list[ExampleRecord]:
    """Return the first prompts with what both models drew."""
    shown = zip(prompts.lines, prompts.tokens, base.answers, tuned.answers, strict=True)
    return [
        ExampleRecord(
            line=line,
            prompt=str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip(),
            reference="",
            base=before.text,
            tuned=after.text,
        )
        for line, tokens, before, after in list(shown)[:EXAMPLES]
    ]
