"""The tables that say how good a run is: base against tuned, what trained, the merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inlay.cli import show

if TYPE_CHECKING:
    from inlay.evaluate.record import ComparisonRecord, ExampleRecord, MetricComparison, Score

NAMES = {
    "loss": "loss (nats/token)",
    "accuracy": "preferred answer likelier",
    "margin": "margin (nats)",
    "auc": "desirable answer likelier (AUC)",
    "reward_margin": "reward margin",
    "desirable_reward": "desirable: reward",
    "undesirable_reward": "undesirable: reward",
    "desirable_loss": "desirable: loss (nats/token)",
    "desirable_perplexity": "desirable: perplexity",
    "chosen_loss": "chosen: loss (nats/token)",
    "chosen_perplexity": "chosen: perplexity",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "number_match": "number match",
    "reward": "reward, likeliest answers",
    "sampled_reward": "reward, drawn answers",
    "kl": "KL to the base (nats/token)",
    "answer_tokens": "tokens an answer",
    "cut_off": "answers cut off",
}
HEADED = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "rmse": "RMSE", "mae": "MAE"}
"""The names that metrics of a model with a head have."""
CONFUSION_SHOWN = 10
"""Classes up to which the table of who is taken for whom fits a terminal."""
LOSS_OF = {"margin": "pairs", "reward_margin": "rows"}
"""What a task's loss is of, by a metric that it has beside."""
ARROWS = {"lower": "↓", "higher": "↑"}


def comparison(record: ComparisonRecord, what: str = "held-out rows") -> None:
    """Write base against tuned, metric by metric, with intervals and the paired test."""
    names = {metric["name"] for metric in record["metrics"]}
    of = next((what for name, what in LOSS_OF.items() if name in names), None)
    headed = "note" in record
    show.heading(
        f"base against tuned: {record['rows']} {what}, {record['tokens']:,} tokens"
        + (f"; text of {record['generated_rows']} rows" if record["generated_rows"] else "")
    )
    show.table(
        ("metric", "base", "tuned", "difference", "p"),
        [metric_row(metric, of, headed) for metric in record["metrics"]],
    )
    if "note" in record:
        print(f"  {record['note']}.")
    if "baseline" in record:
        show.heading(f"baseline against tuned: {record['baseline']['about']}")
        lines = [metric_row(metric, headed=True) for metric in record["baseline"]["metrics"]]
        show.table(("metric", "baseline", "tuned", "difference", "p"), lines)
    tests = ", ".join(sorted({metric["test"] for metric in record["metrics"]}))
    print(f"  In brackets: {record['level']:.0%} bootstrap intervals over rows. p: {tests}.")


def classes(record: ComparisonRecord) -> None:
    """Write how the tuned model does on each class, and what it takes which for."""
    found = record.get("classes", [])
    if not found:
        return
    show.heading("tuned, class by class")
    shares = ("precision", "recall", "f1")
    lines = [
        [x["label"], f"{x['rows']:,}", *("-" if x[s] is None else f"{x[s]:.3f}" for s in shares)]
        for x in found
    ]
    show.table(("class", "rows", *shares), lines)
    confused = record.get("confusion", [])
    if 0 < len(confused) <= CONFUSION_SHOWN:
        show.heading("expected (lines) and predicted (columns)")
        names = [x["label"] for x in found]
        cells = [[n, *(f"{c:,}" for c in row)] for n, row in zip(names, confused, strict=True)]
        show.table(("", *names), cells)


def metric_row(
    metric: MetricComparison, loss_of: str | None = None, headed: bool = False
) -> list[str]:
    """Return one metric's cells; a task's own loss may be of something else than tokens."""
    names = NAMES | HEADED if headed else NAMES
    name = names.get(metric["name"], metric["name"].replace("_", " "))
    name = f"loss (of {loss_of})" if loss_of and metric["name"] == "loss" else name
    p = metric["p_value"]
    return [
        f"{name} {ARROWS.get(metric['better'], '')}".strip(),
        with_interval(metric["base"]),
        with_interval(metric["tuned"]),
        with_interval(metric["difference"], signed=True),
        "-" if p is None else f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}",
    ]


def with_interval(score: Score, signed: bool = False) -> str:
    """Return `0.412 [0.38, 0.44]`, without brackets where there is no interval."""
    value, low, high = score["value"], score["low"], score["high"]
    if value is None:
        return "-"
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"


def example(found: ExampleRecord, where: str = "a held-out row") -> None:
    """Write one row's prompt, its reference, and what base and tuned write."""
    show.heading(f"{where}, before and after")
    show.facts(
        [
            ("prompt", one_line(found["prompt"])),
            ("expected", one_line(found["reference"])),
            ("base writes", one_line(found["base"])),
            ("tuned writes", one_line(found["tuned"])),
        ]
    )


def one_line(text: str, width: int = 300) -> str:
    """Return text on one line, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def what_trained(run: Mapping[str, Any]) -> None:
    """Write what a run.json says of size, memory and time."""
    trainable = run["trainable"]
    share = f"{trainable['count']:,} of {trainable['total']:,} parameters"
    show.heading("what was trained")
    show.facts(
        [
            ("trained", f"{share} ({trainable['percent']:.3g}%)"),
            ("adapter", f"{show.size(run['adapter_bytes'])} on disk"),
            ("model", f"{show.size(run['model_bytes'])} on disk"),
            ("peak memory", show.size(run["peak_memory_bytes"])),
            ("time", show.duration(run["seconds"])),
        ]
    )


def merged(report: Mapping[str, Any]) -> None:
    """Write how near the merged model is to the adapted one."""
    show.heading("merge: the merged model against the adapted one")
    positions = f"{report['positions']:,} positions of {inputs(report['inputs'])}"
    show.facts(
        [
            ("checked", report["checked"]),
            ("compared on", positions),
            ("largest logit difference", f"{difference_of(report):.3g}"),
            ("KL divergence", f"{report['kl']:.3g} nats a position"),
            ("same top token", f"{report['top1_agreement']:.2%}"),
            ("effect kept in the outputs", f"{report['effect_kept']:.2%}"),
            ("update kept in the weights", f"{report['surviving_fraction']:.2%}"),
            ("layers", f"{report['layers']}, in {report['dtype']}"),
        ]
    )


def difference_of(report: Mapping[str, Any]) -> float:
    """Return how far the written model is from the adapted one; the one in memory, if none was."""
    written = report.get("reloaded_logit_difference")
    return report["max_logit_difference"] if written is None else written


def inputs(name: str) -> str:
    """Return what the merge was compared on, in words."""
    return "the rows given" if name == "given" else "random inputs"
