from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.errors import InlayError
from inlay.evaluate.report import report_page, write_report
from inlay.evaluate.report.charts import MOST_POINTS, Axis, Line, line_chart, number
from inlay.evaluate.report.html import figure, p_text
from inlay.evaluate.units import duration, size

NASTY = "<script>alert('x')</script> & \"quoted\" $title ${body} http"
EMPTY_TAGS = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element that opens is closed, in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "xlink:href")]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def metric(name: str, better: str, base: float, tuned: float, p: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "better": better,
        "rows": 200,
        "base": {"value": base, "low": base - 0.1, "high": base + 0.1},
        "tuned": {"value": tuned, "low": None, "high": None},
        "difference": {"value": tuned - base, "low": None, "high": None},
        "p_value": p,
        "test": "two-sided sign-flip permutation test",
    }


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "model": "pocket",
        "method": "lora",
        "data": "reports.csv",
        "seed": 7,
        "trainable": {"count": 221184, "percent": 3.4081, "total": 6490000},
        "peak_memory_bytes": 913_000_000,
        "adapter_bytes": 893_000,
        "model_bytes": 12_980_000,
        "seconds": 3725.0,
        "config": {"rank": 16, "targets": "all-linear", "packing": False},
        "versions": {"torch": "2.13.0"},
        "base_sha256": "ab" * 32,
        "data_sha256": "cd" * 32,
    }


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"step": s, "loss": 4 / s, "learning_rate": 1e-4 * s, "grad_norm": 1.0} for s in range(1, 9)
    ]
    return [*lines, {"step": 4, "eval_loss": 1.2}, {"step": 8, "eval_loss": 0.9}]


@pytest.fixture
def comparison() -> dict[str, Any]:
    return {
        "rows": 200,
        "tokens": 5321,
        "generated_rows": 32,
        "level": 0.95,
        "metrics": [
            metric("loss", "lower", 4.0, 3.0, 0.0002),
            metric("perplexity", "lower", 54.6, 20.1, 0.0002),
            metric("rouge_l", "higher", 0.5, 0.4, 0.03),
            metric("exact_match", "higher", 0.0, 0.1, 0.2),
        ],
        "examples": [
            {"line": 17, "prompt": "Find", "reference": "ref", "base": "", "tuned": "tuned text"}
        ],
    }


@pytest.fixture
def merge() -> dict[str, Any]:
    return {
        "max_logit_difference": 2.1e-5,
        "kl": 3.2e-11,
        "top1_agreement": 1.0,
        "surviving_fraction": 0.9998,
        "effect_kept": 0.9999,
        "checked": "on the written files",
        "dtype": "float32",
        "rows": 8,
    }


def test_the_page_says_everything_that_was_measured(
    run: Any, metrics: Any, comparison: Any, merge: Any
):
    page = Page(report_page(run, metrics, comparison, merge))
    for words in (
        "lora on pocket",
        "data reports.csv · seed 7 · trained in 1 h 02 min",
        "Held-out loss 4.000 → 3.000 −25.0%, p < 0.001",
        "Trained 3.41% 221,184 of 6,490,000 parameters",
        "Peak memory 913.0 MB",
        "Adapter size 893.0 kB model 13.0 MB (6.88% of it)",
        "Merge verification 100.00% same top token",
        "4.000 3.900 to 4.100 3.000 −1.000 < 0.001",
        "ROUGE-L higher is better 0.500 0.400 to 0.600 0.400 −0.100 0.030",
        "The same 200 held-out rows (5,321 trained tokens)",
        "95% bootstrap intervals",
        "Largest logit difference 2.1e-05",
        "Update kept in the weights 99.98%",
        "Merged into float32 Checked on 8 rows",
        "Prompt (line 17) Find Base (nothing) Tuned tuned text Reference ref",
        "rank 16 targets all-linear packing false",
        "torch 2.13.0",
        "base sha256 " + "ab" * 32,
    ):
        assert words in page.text
    assert "not measured" not in page.text
    assert page.tags.count("svg") == 2


def test_the_page_says_what_its_tokens_are(comparison: Any):
    answered = {**comparison, "counted": "tokens in the tuned model's drawn answers"}
    words = "200 held-out rows (5,321 tokens in the tuned model's drawn answers) for both"
    assert words in Page(report_page({}, [], answered)).text


def test_a_change_is_marked_only_where_it_is_more_than_chance(comparison: Any):
    html = report_page({}, [], comparison)
    marks = re.findall(r'data-column="Change" class="(\w*)"', html)
    assert marks == ["good", "good", "bad", ""]


def test_the_page_loads_nothing(run: Any, metrics: Any, comparison: Any, merge: Any):
    html = report_page(run, metrics, comparison, merge)
    page = Page(html)
    assert page.links == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|//|url\(|@import", html)


def test_what_was_not_measured_is_said_so():
    page = Page(report_page({}, [], None, None))
    assert page.text.count("not measured") == 8
    assert "svg" not in page.tags
    assert "Before and after" not in page.text


@pytest.mark.parametrize("missing", ["model_bytes", "adapter_bytes", "trainable", "seconds"])
def test_any_key_of_the_run_may_be_missing(run: Any, missing: str):
    del run[missing]
    Page(report_page(run, []))


@pytest.mark.parametrize("missing", ["max_logit_difference", "kl", "top1_agreement", "rows"])
def test_any_key_of_the_merge_may_be_missing(merge: Any, missing: str):
    del merge[missing]
    assert "not measured" in Page(report_page({}, [], None, merge)).text.split("Training")[1]


def test_text_from_outside_is_shown_and_never_run(
    run: Any, metrics: Any, comparison: Any, merge: Any
):
    run.update(model=NASTY, method=NASTY, data=NASTY)
    run["config"] = {NASTY: NASTY, "list": [NASTY]}
    run["versions"] = {NASTY: NASTY}
    run["base_sha256"] = merge["dtype"] = NASTY
    comparison["examples"][0].update(prompt=NASTY, reference=NASTY, base=NASTY, tuned=NASTY)
    comparison["metrics"][0].update(name=NASTY, better=NASTY, test=NASTY)
    html = report_page(run, metrics, comparison, merge)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert page.text.count(NASTY) >= 12


@given(st.text(max_size=30))
def test_any_text_keeps_the_page_whole(words: str):
    example = {"line": 1, "prompt": words, "reference": words, "base": words, "tuned": words}
    record = {"rows": 1, "tokens": 1, "generated_rows": 1, "level": 0.95}
    record |= {"metrics": [], "examples": [example]}
    tags = Page(report_page({"model": words}, [], record)).tags
    assert tags.count("figure") == 4
    assert "script" not in tags


def test_curves_leave_out_what_is_not_finite(metrics: Any):
    spoilt = [*copy.deepcopy(metrics), {"step": 9, "loss": math.nan, "learning_rate": math.inf}]
    assert report_page({}, spoilt) == report_page({}, metrics)


def test_the_charts_are_well_formed_and_within_their_frame():
    points = [(float(s), math.sin(s) * 1e-3) for s in range(2000)]
    held = [(500.0, 2e-3), (1900.0, -3e-3)]
    lines = [Line("a & b", "trained", points), Line("held", "held", held, dots=True)]
    chart = line_chart(lines, "step")
    svg = ElementTree.fromstring(chart[: chart.index("</svg>") + 6])
    paths = [p.get("d") or "" for p in svg.iter("path") if "line" in (p.get("class") or "")]
    drawn = [[tuple(map(float, xy.split())) for xy in p[1:].split("L")] for p in paths]
    assert [len(d) for d in drawn] == [MOST_POINTS, 2]
    assert all(0 <= x <= 480 and 0 <= y <= 280 for d in drawn for x, y in d)
    assert (drawn[0][0][0], drawn[0][-1][0]) == (54.0, 466.0)
    assert drawn[1][0][1] < drawn[1][1][1]  # the higher loss lies higher on the page
    assert "a &amp; b" in chart


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(5.0, -3.0)] * 2])
def test_a_flat_or_single_point_still_makes_a_chart(points: list[tuple[float, float]]):
    svg = ElementTree.fromstring(line_chart([Line("loss", "trained", points)], "step"))
    assert len(list(svg.iter("text"))) >= 3


def test_a_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Line("loss", "trained", [])], "step")


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within_the_axis(low: float, width: float):
    axis = Axis(low, low + width, 0, 100)
    if axis.high - axis.low < abs(low) * 1e-9:
        return
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(-1e-3 <= axis.pixel(t) <= 100.001 for t in ticks)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.1 + 0.2, "0.3"), (0, "0"), (1.5e-4, "1.5e-4"), (-2e-5, "-2e-5"), (12000, "12,000")],
)
def test_ticks_are_written_briefly(value: float, written: str):
    assert number(value) == written


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figure(None), "–"),
        (figure(0.12345), "0.123"),
        (figure(-0.5, signed=True), "−0.500"),
        (figure(0.5, signed=True), "+0.500"),
        (figure(122.97), "123.0"),
        (figure(12345.6), "12,346"),
        (figure(3.2e9), "3.2e+09"),
        (p_text(0.0002), "p < 0.001"),
        (p_text(0.0625, short=True), "0.062"),
        (p_text(None), "no p-value from one row"),
        (size(999), "999 B"),
        (size(1536), "1.5 kB"),
        (size(3 * 2**40), "3,298.53 GB"),
        (duration(59.4), "59 s"),
        (duration(143), "2 min 23 s"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str):
    assert written == expected


def test_the_report_is_written_whole_or_not_at_all(
    tmp_path: Path, run: Any, metrics: Any, comparison: Any, merge: Any
):
    path = write_report(tmp_path / "report.html", run, metrics, comparison, merge)
    assert path.read_text("utf-8") == report_page(run, metrics, comparison, merge)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InlayError, match=r"the report cannot be written to .*No such file"):
        write_report(tmp_path / "nowhere" / "report.html", run, metrics)


def test_a_full_disk_leaves_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
):
    path = write_report(tmp_path / "report.html", run, [])
    before = path.read_text("utf-8")

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text.encode(encoding)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InlayError, match="No space left on device"):
        write_report(path, run | {"model": "other"}, [])
    assert path.read_text("utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
