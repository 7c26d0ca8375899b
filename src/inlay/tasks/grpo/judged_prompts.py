"""Held-out prompts as the evaluation takes them, judged by a run's rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from inlay.data.rows import Rows
from inlay.data.tokens import Encoded
from inlay.evaluate.generation import Answer, Sampling
from inlay.tasks.grpo import GrpoConfig
from inlay.tasks.grpo.compare import Prompts
from inlay.tasks.grpo.judge import Answers, Judge


def judging(
    config: GrpoConfig, judge: Judge, rows: Rows, encoded: Sequence[Encoded], when: str
) -> Prompts:
    """Return prompts that are answered as a run says, and judged by its rewards.

    Args:
        config: the run.
        judge: its rewards.
        rows: the prompts with their columns.
        encoded: the same prompts as tokens, one for one.
        when: what the prompts are, for errors: `on held-out prompts`.
    """
    talks = not isinstance(rows.rows[0]["prompt"], str)
    where = [rows.where(index) for index in range(len(rows))]

    def worth(answers: Sequence[Answer]) -> Mapping[str, Sequence[float]]:
        texts = [each.text for each in answers]
        said = [[{"role": "assistant", "content": text}] for text in texts] if talks else texts
        judged = Answers(rows.rows, where, said, [each.tokens for each in answers])
        scores = judge.scores(judged, when)
        named = zip(judge.rewards, scores, strict=True)
        whole = {r.shown: values for r, values in named if not any(map(math.isnan, values))}
        return {"reward": judge.totals(scores), **whole}

    return Prompts(
        lines=rows.lines,
        tokens=[row.input_ids for row in encoded],
        judge=worth,
        max_new_tokens=config.max_completion_tokens,
        sampling=Sampling(config.temperature, config.top_p, config.seed),
    )
