"""The words for each metric, on the report's page and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inlay.evaluate.record import ComparisonRecord

TITLES = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "number_match": "number match",
    # pairs of a preferred and another answer
    "accuracy": "preferred answer more likely",
    "margin": "margin, nats",
    "chosen_loss": "loss of preferred answers, nats per token",
    "chosen_perplexity": "perplexity of preferred answers",
    "reward_accuracy": "reward accuracy",
    # answers labelled desirable or undesirable
    "auc": "desirable answer more likely (AUC)",
    "reward_margin": "reward margin",
    "desirable_reward": "reward of desirable answers",
    "undesirable_reward": "reward of undesirable answers",
    "reward_desirable": "reward of desirable answers",
    "reward_undesirable": "reward of undesirable answers",
    "desirable_loss": "loss of desirable answers, nats per token",
    "desirable_perplexity": "perplexity of desirable answers",
    # answers scored by rewards
    "reward": "reward of greedy answers",
    "sampled_reward": "reward of sampled answers",
    "kl": "KL to the base, nats per token",
    "answer_tokens": "tokens per answer",
    "cut_off": "answers cut off",
    # labels and embeddings
    "exact_labels": "all labels right",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "rmse": "RMSE",
    "mae": "MAE",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "entity_f1": "entity F1",
    "mrr": "mean reciprocal rank",
}
OF_A_HEAD = {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}
"""The words for metrics of a model with a head."""
LOSSES = {"margin": "loss per pair", "reward_margin": "loss per row"}
"""The words for the loss of a task, by another metric that the task has."""
CURVES = {
    name: TITLES[name]
    for name in ("reward_accuracy", "accuracy", "reward_desirable", "reward_undesirable", "kl")
} | {"reward": "reward"}
"""The words for what a task measures during training beside its loss."""


def titles_of(record: ComparisonRecord) -> Mapping[str, str]:
    """Return the words for the metrics of a comparison."""
    if "note" in record:
        return TITLES | OF_A_HEAD
    names = {metric["name"] for metric in record["metrics"]}
    loss = next((words for name, words in LOSSES.items() if name in names), TITLES["loss"])
    return TITLES | {"loss": loss}


def title(name: str, titles: Mapping[str, str] = TITLES) -> str:
    """Return the words for a metric; of one without words its name."""
    return titles.get(name, name.replace("_", " "))


def capitalised(words: str) -> str:
    return words[:1].upper() + words[1:]
