"""Tables of a run's results: base against tuned, what was trained, the merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inlay.cli import show
from inlay.evaluate.titles import ANSWERS, Titles
from inlay.evaluate.units import duration, size

if TYPE_CHECKING:
    from inlay.evaluate.record import ComparisonRecord, ExampleRecord, MetricComparison, Score

CONFUSION_SHOWN = 10
"""The most classes whose confusion matrix fits a terminal."""
ARROWS = {"lower": "↓", "higher": "↑"}


def comparison(
    record: ComparisonRecord, titles: Titles = ANSWERS, what: str = "held-out rows"
) -> None:
    show.heading(
        f"base against tuned: {record['rows']} {what}, {record['tokens']:,} tokens"
        + (f"; text generated for {record['generated_rows']}" if record["generated_rows"] else "")
    )
    show.table(
        ("metric", "base", "tuned", "difference", "p"),
        [metric_row(metric, titles) for metric in record["metrics"]],
    )
    if "note" in record:
        print(f"  Note: {record['note']}.")
    if "baseline" in record:
        show.heading(f"baseline against tuned: {record['baseline']['about']}")
        lines = [metric_row(metric, titles) for metric in record["baseline"]["metrics"]]
        show.table(("metric", "baseline", "tuned", "difference", "p"), lines)
    tests = ", ".join(sorted({metric["test"] for metric in record["metrics"]}))
    print(f"  In brackets: {record['level']:.0%} bootstrap intervals over rows. p: {tests}.")


def classes(record: ComparisonRecord) -> None:
    found = record.get("classes", [])
    if not found:
        return
    show.heading("tuned model by class")
    shares = ("precision", "recall", "f1")
    lines = [
        [x["label"], f"{x['rows']:,}", *("-" if x[s] is None else f"{x[s]:.3f}" for s in shares)]
        for x in found
    ]
    show.table(("class", "rows", *shares), lines)
    confused = record.get("confusion", [])
    if 0 < len(confused) <= CONFUSION_SHOWN:
        show.heading("confusion matrix: expected class per line, predicted class per column")
        names = [x["label"] for x in found]
        cells = [[n, *(f"{c:,}" for c in row)] for n, row in zip(names, confused, strict=True)]
        show.table(("", *names), cells)


def metric_row(metric: MetricComparison, titles: Titles) -> list[str]:
    p = metric["p_value"]
    return [
        f"{titles(metric['name'])} {ARROWS.get(metric['better'], '')}".strip(),
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
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def what_trained(run: Mapping[str, Any]) -> None:
    trainable = run["trainable"]
    share = f"{trainable['count']:,} of {trainable['total']:,} parameters"
    show.heading("what was trained")
    show.facts(
        [
            ("trained", f"{share} ({trainable['percent']:.3g}%)"),
            ("adapter", f"{size(run['adapter_bytes'])} on disk"),
            ("model", f"{size(run['model_bytes'])} on disk"),
            ("peak memory", size(run["peak_memory_bytes"])),
            ("time", duration(run["seconds"])),
        ]
    )


def merged(report: Mapping[str, Any]) -> None:
    inputs = "the given rows" if report["inputs"] == "given" else "random inputs"
    written = report.get("reloaded_logit_difference")
    difference = report["max_logit_difference"] if written is None else written
    show.heading("merge: the merged model against the adapted model")
    show.facts(
        [
            ("checked", report["checked"]),
            ("compared on", f"{report['positions']:,} positions of {inputs}"),
            ("largest logit difference", f"{difference:.3g}"),
            ("KL divergence", f"{report['kl']:.3g} nats per position"),
            ("same top token", f"{report['top1_agreement']:.2%}"),
            ("effect kept in the outputs", f"{report['effect_kept']:.2%}"),
            ("update kept in the weights", f"{report['surviving_fraction']:.2%}"),
            ("layers", f"{report['layers']}, in {report['dtype']}"),
        ]
    )
