"""The sections of the page: comparison, training curves, merge and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from inlay.evaluate.record import ComparisonRecord, ExampleRecord, Merge, MetricComparison, Step
from inlay.evaluate.report.charts import Line, line_chart
from inlay.evaluate.report.html import (
    NOT_MEASURED,
    cell,
    facts_list,
    figure,
    interval,
    p_text,
    pictures,
    section,
    table,
    text,
)
from inlay.evaluate.titles import Titles, capitalised

SIGNIFICANT = 0.05
UNMEASURED = f'<p class="soft">{NOT_MEASURED}</p>'

Points = list[tuple[float, float]]


def comparison_section(comparison: ComparisonRecord | None, titles: Titles) -> str:
    if comparison is None:
        return section("Base against tuned", UNMEASURED)
    tests = sorted({metric["test"] for metric in comparison["metrics"]})
    counted = comparison.get("counted", "trained tokens")
    generated = comparison["generated_rows"]
    sentences = [
        f"The same {comparison['rows']:,} held-out rows ({comparison['tokens']:,} {counted}) for "
        "both models.",
        f"Text was generated for {generated:,} of them." if generated else "",
        f"In small type: {comparison['level']:.0%} bootstrap intervals over rows.",
        f"p: p-value of a {' or a '.join(tests)}.",
        f"Note: {comparison['note']}." if "note" in comparison else "",
    ]
    note = " ".join(filter(None, sentences))
    found = metrics_table("Base", comparison["metrics"], titles)
    return section("Base against tuned", f'{found}<p class="note">{escape(note)}</p>')


def baseline_section(comparison: ComparisonRecord | None, titles: Titles) -> str:
    if comparison is None or "baseline" not in comparison:
        return ""
    baseline = comparison["baseline"]
    found = metrics_table("Baseline", baseline["metrics"], titles)
    note = escape(f"Baseline: {baseline['about']}.")
    content = f'{found}<p class="note">{note}</p>{class_table(comparison)}'
    return section("Baseline against tuned", content)


def class_table(comparison: ComparisonRecord) -> str:
    found = comparison.get("classes", [])
    if not found:
        return ""
    shares = ("precision", "recall", "f1")
    rows = "".join(
        f"<tr><th>{escape(each['label'])}</th>{cell('Rows', str(each['rows']))}"
        + "".join(cell(share.capitalize(), figure(each[share])) for share in shares)
        + "</tr>"
        for each in found
    )
    return table(("Class", "Rows", "Precision", "Recall", "F1"), rows)


def metrics_table(before: str, metrics: Sequence[MetricComparison], titles: Titles) -> str:
    rows = "".join(metric_row(before, metric, titles) for metric in metrics)
    return table(("Metric", before, "Tuned", "Change", "p"), rows)


def metric_row(before: str, metric: MetricComparison, titles: Titles) -> str:
    cells = (
        cell(before, interval(metric["base"])),
        cell("Tuned", interval(metric["tuned"])),
        cell("Change", interval(metric["difference"], signed=True), verdict(metric)),
        cell("p", escape(p_text(metric["p_value"], short=True))),
    )
    better = metric["better"]
    wish = f"<small>{escape(better)} is better</small>" if better != "neither" else ""
    name = escape(capitalised(titles(metric["name"])))
    return f"<tr><th>{name}{wish}</th>{''.join(cells)}</tr>"


def verdict(metric: MetricComparison) -> str:
    """Return `good` or `bad` where the difference is significant, else nothing."""
    change, p = metric["difference"]["value"], metric["p_value"]
    if not change or p is None or p >= SIGNIFICANT or metric["better"] == "neither":
        return ""
    return "good" if (change < 0) == (metric["better"] == "lower") else "bad"


def curves_section(metrics: Sequence[Step], titles: Titles) -> str:
    charts: list[str] = []
    for key, words in {"loss": titles("loss"), **titles.curves}.items():
        trained, held = curve(metrics, key), curve(metrics, f"eval_{key}")
        if trained or held:
            lines = [
                Line("training", "trained", trained),
                Line("held out", "held", held, dots=True),
            ]
            charts.append(f"<div><h3>{capitalised(words)}</h3>{line_chart(lines, 'step')}</div>")
    rate = curve(metrics, "learning_rate")
    if rate:
        chart = line_chart([Line("learning rate", "trained", rate)], "step")
        charts.append(f"<div><h3>Learning rate</h3>{chart}</div>")
    content = f'<div class="charts">{"".join(charts)}</div>' if charts else UNMEASURED
    return section("Training", content)


def curve(metrics: Sequence[Step], key: str) -> Points:
    found = [(step.get("step"), step.get(key)) for step in metrics]
    return [
        (float(x), float(y))
        for x, y in found
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def merge_section(merge: Merge | None) -> str:
    if merge is None:
        return section("Merge verification", UNMEASURED)
    facts = {
        "Compared": merge.get("checked"),
        "Largest logit difference": written(merge.get("max_logit_difference"), "{:.3g}"),
        "KL divergence": written(merge.get("kl"), "{:.3g} nats"),
        "Same top token": written(merge.get("top1_agreement"), "{:.2%}"),
        "Effect kept in the outputs": written(merge.get("effect_kept"), "{:.2%}"),
        "Update kept in the weights": written(merge.get("surviving_fraction"), "{:.2%}"),
        "Merged into": merge.get("dtype"),
        "Checked on": written(merge.get("rows"), "{:,} rows"),
    }
    return section(
        "Merge verification",
        facts_list({name: value or NOT_MEASURED for name, value in facts.items()}),
    )


def written(value: float | None, template: str) -> str | None:
    return None if value is None else template.format(value)


def examples_section(examples: Sequence[ExampleRecord]) -> str:
    if not examples:
        return ""
    return section("Before and after", "".join(map(example, examples)))


def example(found: ExampleRecord) -> str:
    texts = (
        text("Base", "of-base", found["base"])
        + text("Tuned", "of-tuned", found["tuned"])
        + text("Reference", "", found["reference"])
    )
    prompt = text(f"Prompt (line {found['line']})", "", found["prompt"])
    shown = pictures(found.get("images", []))
    return f'<div class="example">{shown}{prompt}<div class="texts">{texts}</div></div>'
