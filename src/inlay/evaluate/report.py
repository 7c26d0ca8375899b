"""The report of a run: one HTML page that needs nothing else, on or off line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from inlay.errors import InlayError
from inlay.evaluate.charts import Line, line_chart
from inlay.evaluate.html import (
    NOT_MEASURED,
    cell,
    duration,
    facts_list,
    figure,
    interval,
    p_text,
    pictures,
    plain,
    section,
    size,
    text,
    tile,
)
from inlay.evaluate.record import (
    ComparisonRecord,
    ExampleRecord,
    Merge,
    MetricComparison,
    Run,
    Step,
)
from inlay.files import write_text

NAMES = {
    "loss": "Held-out loss",
    "accuracy": "Preferred answer likelier",
    "margin": "Margin, nats",
    "chosen_loss": "Loss of preferred answers",
    "chosen_perplexity": "Perplexity of preferred answers",
    "auc": "Desirable answer likelier (AUC)",
    "reward_margin": "Reward margin",
    "desirable_reward": "Reward of desirable answers",
    "undesirable_reward": "Reward of undesirable answers",
    "desirable_loss": "Loss of desirable answers",
    "desirable_perplexity": "Perplexity of desirable answers",
    "perplexity": "Perplexity",
    "number_match": "Number match",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "reward": "Reward of likeliest answers",
    "sampled_reward": "Reward of drawn answers",
    "kl": "KL to the base, nats a token",
    "answer_tokens": "Tokens an answer",
    "cut_off": "Answers cut off",
}
HEADED = {"accuracy": "Accuracy", "margin": "Margin", "macro_f1": "Macro F1", "rmse": "RMSE"}
"""The names that metrics of a model with a head have."""
OWN = {
    "Pairs preferred more than by the base": "reward_accuracy",
    "Preferred answer likelier": "accuracy",
    "Reward of desirable answers": "reward_desirable",
    "Reward of undesirable answers": "reward_undesirable",
    "Reward": "reward",
    "KL to the base, nats a token": "kl",
}
"""What a task measures beside its loss, by the chart's title."""
TITLES = {
    (
        "reward",
        "Pairs preferred more than by the base",
    ): "Preferred answer worth more"
}
"""A task's own title for such a chart."""
SIGNIFICANT = 0.05

Points = list[tuple[float, float]]


def write_report(
    path: str | Path,
    run: Run,
    metrics: Sequence[Step],
    comparison: ComparisonRecord | None = None,
    merge: Merge | None = None,
) -> Path:
    """Write the page of a run, whole or not at all; what a record lacks is "not measured".

    Raises:
        InlayError: the file cannot be written.
    """
    path = Path(path)
    page = report_page(run, metrics, comparison, merge)
    try:
        write_text(path, page)
    except OSError as error:
        raise InlayError(
            f"the report cannot be written to {path}: {error.strerror}; "
            f"choose a folder that exists, may be written to and has room"
        ) from None
    return path


def report_page(
    run: Run,
    metrics: Sequence[Step],
    comparison: ComparisonRecord | None = None,
    merge: Merge | None = None,
) -> str:
    """Return the page as HTML."""
    template = Template(files("inlay.evaluate").joinpath("report.html").read_text("utf-8"))
    body = [
        heading(run),
        tiles(run, comparison, merge),
        comparison_section(comparison),
        baseline_section(comparison),
        curves_section(metrics, run.get("task", "sft")),
        merge_section(merge),
        examples_section(comparison["examples"] if comparison else []),
        details(run),
    ]
    title = f"{run.get('method', 'Adapter')} on {run.get('model', 'a model')}"
    return template.substitute(title=escape(title), body="\n".join(body))


def heading(run: Run) -> str:
    """Say what was trained, on what."""
    about = [f"data {run['data']}"] if "data" in run else []
    about += [f"seed {run['seed']}"] if "seed" in run else []
    about += [f"trained in {duration(run['seconds'])}"] if "seconds" in run else []
    title = f"{run.get('method', 'An adapter')} on {run.get('model', 'a model')}"
    return (
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(" · ".join(about))}</p></header>'
    )


def tiles(run: Run, comparison: ComparisonRecord | None, merge: Merge | None) -> str:
    """The figures of the run at a glance."""
    shown = [
        loss_tile(comparison),
        trained_tile(run),
        tile("Peak memory", size(run["peak_memory_bytes"]), "")
        if "peak_memory_bytes" in run
        else tile("Peak memory", NOT_MEASURED, ""),
        adapter_tile(run),
        merge_tile(merge),
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def loss_tile(comparison: ComparisonRecord | None) -> str:
    """Held-out loss before and after."""
    found = [m for m in comparison["metrics"] if m["name"] == "loss"] if comparison else []
    if not found:
        return tile("Held-out loss", NOT_MEASURED, "")
    base, tuned = found[0]["base"]["value"], found[0]["tuned"]["value"]
    percent = f"{tuned / base - 1:+.1%}".replace("-", "−") if base and tuned else "change –"
    note = f"{percent}, {p_text(found[0]['p_value'])}"
    return tile("Held-out loss", f"{figure(base)} → {figure(tuned)}", note)


def trained_tile(run: Run) -> str:
    """How much of the model trained."""
    if "trainable" not in run:
        return tile("Trained", NOT_MEASURED, "")
    count = run["trainable"]
    note = f"{count['count']:,} of {count['total']:,} parameters"
    return tile("Trained", f"{count['percent']:.3g}%", note)


def adapter_tile(run: Run) -> str:
    """The adapter's size against the model's."""
    if "adapter_bytes" not in run:
        return tile("Adapter size", NOT_MEASURED, "")
    adapter, whole = run["adapter_bytes"], run.get("model_bytes")
    note = f"model {size(whole)} ({adapter / whole:.2%} of it)" if whole else ""
    return tile("Adapter size", size(adapter), note)


def merge_tile(merge: Merge | None) -> str:
    """How often the merged model chooses the adapted model's token."""
    if merge is None or "top1_agreement" not in merge:
        return tile("Merge verification", NOT_MEASURED, "")
    return tile("Merge verification", f"{merge['top1_agreement']:.2%}", "same top token")


def comparison_section(comparison: ComparisonRecord | None) -> str:
    """The table of base against tuned."""
    if comparison is None:
        return section("Base against tuned", f'<p class="soft">{NOT_MEASURED}</p>')
    headed = "note" in comparison
    tests = sorted({metric["test"] for metric in comparison["metrics"]})
    counted = comparison.get("counted", "trained tokens")
    note = (
        f"The same {comparison['rows']:,} held-out rows ({comparison['tokens']:,} {counted}) "
        f"for both; text was generated for {comparison['generated_rows']:,} of them. Small figures "
        f"are {comparison['level']:.0%} bootstrap intervals over rows; p is of a "
        f"{', '.join(tests)} on the rows' differences."
    )
    table = metrics_table("Base", comparison["metrics"], headed)
    note = f"{note} Of the base: {comparison['note']}." if "note" in comparison else note
    return section("Base against tuned", f'{table}<p class="note">{escape(note)}</p>')


def baseline_section(comparison: ComparisonRecord | None) -> str:
    """The table of what knows the labels' shares alone against tuned, and class by class."""
    if comparison is None or "baseline" not in comparison:
        return ""
    baseline = comparison["baseline"]
    table = metrics_table("Baseline", baseline["metrics"], headed=True)
    note = f"The baseline gives {baseline['about']}."
    tables = f'{table}<p class="note">{escape(note)}</p>{class_table(comparison)}'
    return section("Baseline against tuned", tables)


def class_table(comparison: ComparisonRecord) -> str:
    """The tuned model class by class, where there are classes."""
    found = comparison.get("classes", [])
    if not found:
        return ""
    shares = ("precision", "recall", "f1")
    rows = "".join(
        f"<tr><th>{escape(each['label'])}</th>{cell('Rows', str(each['rows']))}"
        + "".join(cell(share, figure(each[share])) for share in shares)
        + "</tr>"
        for each in found
    )
    head = "".join(f"<th>{name}</th>" for name in ("Class", "Rows", "Precision", "Recall", "F1"))
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def metrics_table(before: str, metrics: Sequence[MetricComparison], headed: bool) -> str:
    """The table of what stood before, named here, against tuned."""
    rows = "".join(metric_row(metric, headed) for metric in metrics)
    return (
        f'<div class="scroll"><table><thead><tr><th>Metric</th><th>{before}</th><th>Tuned</th>'
        f"<th>Change</th><th>p</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def metric_row(metric: MetricComparison, headed: bool) -> str:
    """One metric of base and tuned; of a head, by the name that it has there."""
    names = NAMES | HEADED if headed else NAMES
    name = escape(names.get(metric["name"], metric["name"]))
    change = interval(metric["difference"], signed=True)
    cells = (
        cell("Base", interval(metric["base"])),
        cell("Tuned", interval(metric["tuned"])),
        cell("Change", change, verdict(metric)),
        cell("p", escape(p_text(metric["p_value"], short=True))),
    )
    return (
        f"<tr><th>{name}<small>{escape(metric['better'])} is better</small></th>"
        f"{''.join(cells)}</tr>"
    )


def verdict(metric: MetricComparison) -> str:
    """Return `good` or `bad` where the difference is more than chance, else nothing."""
    change, p = metric["difference"]["value"], metric["p_value"]
    if not change or p is None or p >= SIGNIFICANT or metric["better"] == "neither":
        return ""
    return "good" if (change < 0) == (metric["better"] == "lower") else "bad"


def curves_section(metrics: Sequence[Step], task: str = "sft") -> str:
    """Training loss, held-out loss, what the task measures and learning rate by step."""
    own = {TITLES.get((task, title), title): both(metrics, key) for title, key in OWN.items()}
    named = "Loss, nats per token" if task == "sft" else "Loss"
    charts = [
        two_lines(title, *pair)
        for title, pair in {named: both(metrics, "loss"), **own}.items()
        if any(pair)
    ]
    rate = curve(metrics, "learning_rate")
    if rate:
        chart = line_chart([Line("learning rate", "trained", rate)], "step")
        charts.append(f"<div><h3>Learning rate</h3>{chart}</div>")
    if not charts:
        return section("Training", f'<p class="soft">{NOT_MEASURED}</p>')
    return section("Training", f'<div class="charts">{"".join(charts)}</div>')


def both(metrics: Sequence[Step], key: str) -> tuple[Points, Points]:
    """Return the points of one key in training and held out."""
    return curve(metrics, key), curve(metrics, f"eval_{key}")


def two_lines(title: str, trained: Points, held: Points) -> str:
    """A chart of one value in training and held out."""
    lines = [Line("training", "trained", trained), Line("held out", "held", held, dots=True)]
    return f"<div><h3>{title}</h3>{line_chart(lines, 'step')}</div>"


def curve(metrics: Sequence[Step], key: str) -> Points:
    """Return the (step, value) points of one key, where it is there and finite."""
    found = [(step.get("step"), step.get(key)) for step in metrics]
    return [
        (float(x), float(y))
        for x, y in found
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def merge_section(merge: Merge | None) -> str:
    """How near the merged model is to the adapted one."""
    if merge is None:
        return section("Merge verification", f'<p class="soft">{NOT_MEASURED}</p>')
    facts = {
        "Compared": merge.get("checked", NOT_MEASURED),
        "Largest logit difference": f"{merge['max_logit_difference']:.3g}"
        if "max_logit_difference" in merge
        else NOT_MEASURED,
        "KL divergence": f"{merge['kl']:.3g} nats" if "kl" in merge else NOT_MEASURED,
        "Same top token": f"{merge['top1_agreement']:.2%}"
        if "top1_agreement" in merge
        else NOT_MEASURED,
        "Effect kept in the outputs": f"{merge['effect_kept']:.2%}"
        if "effect_kept" in merge
        else NOT_MEASURED,
        "Update kept in the weights": f"{merge['surviving_fraction']:.2%}"
        if "surviving_fraction" in merge
        else NOT_MEASURED,
        "Merged into": merge.get("dtype", NOT_MEASURED),
        "Checked on": f"{merge['rows']:,} rows" if "rows" in merge else NOT_MEASURED,
    }
    return section("Merge verification", facts_list(facts))


def examples_section(examples: Sequence[ExampleRecord]) -> str:
    """What base and tuned wrote for the same prompts."""
    if not examples:
        return ""
    return section("Before and after", "".join(example(e) for e in examples))


def example(e: ExampleRecord) -> str:
    """One prompt with its reference and both answers."""
    texts = (
        text("Base", "of-base", e["base"])
        + text("Tuned", "of-tuned", e["tuned"])
        + text("Reference", "", e["reference"])
    )
    prompt = text(f"Prompt (line {e['line']})", "", e["prompt"])
    shown = pictures(e.get("images", []))
    return f'<div class="example">{shown}{prompt}<div class="texts">{texts}</div></div>'


def details(run: Run) -> str:
    """The whole configuration, versions and hashes, folded away."""
    parts = [
        f"<h3>{name}</h3>{facts_list(plain(found))}"
        for name, found in (
            ("Configuration", run.get("config")),
            ("Versions", run.get("versions")),
            ("Hashes", hashes(run)),
        )
        if found
    ]
    if not parts:
        return ""
    return f"<details><summary>Configuration and versions</summary>{''.join(parts)}</details>"


def hashes(run: Run) -> dict[str, str]:
    """SHA-256 of the base model and of the data, where they are known."""
    found = {"base": run.get("base_sha256"), "data": run.get("data_sha256")}
    return {f"{name} sha256": value for name, value in found.items() if value}
