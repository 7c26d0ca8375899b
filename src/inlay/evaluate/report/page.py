"""The page of a run: heading, key figures, sections and configuration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from inlay.errors import InlayError
from inlay.evaluate.record import ComparisonRecord, Merge, Run, Step
from inlay.evaluate.report.html import NOT_MEASURED, facts_list, figure, p_text, plain, tile
from inlay.evaluate.report.sections import (
    baseline_section,
    comparison_section,
    curves_section,
    examples_section,
    merge_section,
)
from inlay.evaluate.titles import ANSWERS, Titles
from inlay.evaluate.units import duration, size
from inlay.files import write_text


def write_report(
    path: str | Path,
    run: Run,
    metrics: Sequence[Step],
    comparison: ComparisonRecord | None = None,
    merge: Merge | None = None,
    titles: Titles = ANSWERS,
) -> Path:
    """Write the page whole or not at all; InlayError where it cannot be written."""
    path = Path(path)
    page = report_page(run, metrics, comparison, merge, titles)
    try:
        write_text(path, page)
    except OSError as error:
        raise InlayError(
            f"the report cannot be written to {path}: {error.strerror}; "
            f"choose a folder that exists, is writable and has free space"
        ) from None
    return path


def report_page(
    run: Run,
    metrics: Sequence[Step],
    comparison: ComparisonRecord | None = None,
    merge: Merge | None = None,
    titles: Titles = ANSWERS,
) -> str:
    template = Template(files("inlay.evaluate.report").joinpath("report.html").read_text("utf-8"))
    title = f"{run.get('method', 'An adapter')} on {run.get('model', 'a model')}"
    body = [
        heading(title, run),
        tiles(run, comparison, merge),
        comparison_section(comparison, titles),
        baseline_section(comparison, titles),
        curves_section(metrics, titles),
        merge_section(merge),
        examples_section(comparison["examples"] if comparison else []),
        details(run),
    ]
    return template.substitute(title=escape(title), body="\n".join(body))


def heading(title: str, run: Run) -> str:
    about = [f"data {run['data']}"] if "data" in run else []
    about += [f"seed {run['seed']}"] if "seed" in run else []
    about += [f"trained in {duration(run['seconds'])}"] if "seconds" in run else []
    facts = escape(" · ".join(about))
    return f'<header><h1>{escape(title)}</h1><p class="soft">{facts}</p></header>'


def tiles(run: Run, comparison: ComparisonRecord | None, merge: Merge | None) -> str:
    memory = size(run["peak_memory_bytes"]) if "peak_memory_bytes" in run else NOT_MEASURED
    shown = [
        loss_tile(comparison),
        trained_tile(run),
        tile("Peak memory", memory),
        adapter_tile(run),
        merge_tile(merge),
    ]
    return f'<div class="tiles">{"".join(shown)}</div>'


def loss_tile(comparison: ComparisonRecord | None) -> str:
    found = [m for m in comparison["metrics"] if m["name"] == "loss"] if comparison else []
    if not found:
        return tile("Held-out loss", NOT_MEASURED)
    base, tuned = found[0]["base"]["value"], found[0]["tuned"]["value"]
    percent = f"{tuned / base - 1:+.1%}".replace("-", "−") if base and tuned else "change –"
    note = f"{percent}, {p_text(found[0]['p_value'])}"
    return tile("Held-out loss", f"{figure(base)} → {figure(tuned)}", note)


def trained_tile(run: Run) -> str:
    if "trainable" not in run:
        return tile("Trained", NOT_MEASURED)
    count = run["trainable"]
    note = f"{count['count']:,} of {count['total']:,} parameters"
    return tile("Trained", f"{count['percent']:.3g}%", note)


def adapter_tile(run: Run) -> str:
    if "adapter_bytes" not in run:
        return tile("Adapter size", NOT_MEASURED)
    adapter, whole = run["adapter_bytes"], run.get("model_bytes")
    note = f"model {size(whole)} ({adapter / whole:.2%} of it)" if whole else ""
    return tile("Adapter size", size(adapter), note)


def merge_tile(merge: Merge | None) -> str:
    if merge is None or "top1_agreement" not in merge:
        return tile("Merge verification", NOT_MEASURED)
    return tile("Merge verification", f"{merge['top1_agreement']:.2%}", "same top token")


def details(run: Run) -> str:
    hashes = {"base": run.get("base_sha256"), "data": run.get("data_sha256")}
    parts = [
        f"<h3>{name}</h3>{facts_list(plain(found))}"
        for name, found in (
            ("Configuration", run.get("config")),
            ("Versions", run.get("versions")),
            ("Hashes", {f"{name} sha256": value for name, value in hashes.items() if value}),
        )
        if found
    ]
    if not parts:
        return ""
    return f"<details><summary>Configuration and versions</summary>{''.join(parts)}</details>"
