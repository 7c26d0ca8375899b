from __future__ import annotations

import gzip
import json
import re

import pytest
from demo_data.findings import FINDINGS, NEGATIONS
from demo_data.reports import NOTHING_ACUTE, Report, generate_reports
from demo_data.ship import ROWS, SHIPPED, json_lines
from rouge_score.rouge_scorer import RougeScorer

from inlay.data.read import read_rows

REPORTS = generate_reports(2400, seed=0)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def test_reports_are_all_different() -> None:
    assert len({report.findings for report in REPORTS}) == 2400
    assert len({report.uid for report in REPORTS}) == 2400


def test_the_same_seed_gives_the_same_reports_and_fewer_are_the_first_of_more() -> None:
    assert generate_reports(300, seed=0) == REPORTS[:300]
    assert generate_reports(300, seed=1) != REPORTS[:300]


def test_every_finding_and_the_normal_report_occur_often() -> None:
    labels = [report.label for report in REPORTS]
    assert set(labels) == {"normal", *(finding.name for finding in FINDINGS)}
    assert len(FINDINGS) >= 10
    assert min(labels.count(label) for label in set(labels)) >= 30


def test_a_normal_report_has_the_normal_impression() -> None:
    for report in REPORTS:
        assert (report.impression == NOTHING_ACUTE) == (report.label == "normal")


@pytest.mark.parametrize(
    "copied",
    [
        lambda r: max(sentences(r.findings), key=len),
        lambda r: sentences(r.findings)[0],
        lambda r: sentences(r.findings)[-1],
        lambda r: r.findings,
    ],
    ids=["longest", "first", "last", "all"],
)
def test_copying_does_not_solve_the_task(copied: object) -> None:
    assert callable(copied)
    scorer = RougeScorer(["rougeL"])
    exact = sum(copied(r) == r.impression for r in REPORTS) / len(REPORTS)
    overlap = [scorer.score(r.impression, copied(r))["rougeL"].fmeasure for r in REPORTS[:600]]
    assert exact < 0.01
    assert sum(overlap) / len(overlap) < 0.3


def test_the_impression_is_in_the_findings_only_in_other_words() -> None:
    named = [r for r in REPORTS if r.label != "normal" and r.label in r.findings.lower()]
    abnormal = [r for r in REPORTS if r.label != "normal"]
    assert len(named) < 0.55 * len(abnormal)


def facts(report: Report) -> set[str]:
    """The findings that the impression states, by the last words of each."""
    ends = {f.name: f.impression.split("}")[-1].strip().split(",")[0].lower() for f in FINDINGS}
    ends["pulmonary edema"], ends["granuloma"] = "pulmonary edema", "granulomatous"
    return {name for name, end in ends.items() if end in report.impression.lower()}


def test_no_report_denies_what_its_impression_states() -> None:
    for report in REPORTS:
        for absent, wordings in NEGATIONS:
            if absent & facts(report):
                said = sentences(report.findings)
                assert not {w[0].upper() + w[1:] + "." for w in wordings} & set(said)


def test_negations_name_findings_that_are_not_there() -> None:
    negated = [r for r in REPORTS if "pneumothorax" in r.findings.lower()]
    there = [r for r in negated if "pneumothorax" in r.impression]
    assert len(negated) > 4 * len(there)


def test_a_resolved_finding_is_not_in_the_impression() -> None:
    gone = [
        r for r in REPORTS if re.search(r"effusion .*(has resolved|no longer seen)", r.findings)
    ]
    shown = [r for r in REPORTS if "previously seen pleural effusion has resolved." in r.findings]
    assert gone
    assert shown
    assert all("effusion" not in r.impression for r in shown)


def test_some_words_are_misspelt_and_none_that_carries_a_side() -> None:
    known = {word for r in REPORTS for word in re.findall("[a-z]+", r.findings.lower())}
    counts = dict.fromkeys(known, 0)
    for report in REPORTS:
        for word in re.findall("[a-z]+", report.findings.lower()):
            counts[word] += 1
    rare = {word for word, count in counts.items() if count <= 3}
    assert len(rare) > 100
    sided = [r for r in REPORTS if re.search(r"\bleft\b", r.impression.lower())]
    assert all(re.search(r"\b(left|lll|lul)\b", r.findings.lower()) for r in sided)


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_rows_are_the_generated_ones(name: str) -> None:
    shipped = gzip.decompress((SHIPPED / f"{name}.jsonl.gz").read_bytes()).decode()
    assert shipped == json_lines(name)
    assert [row.values for row in read_rows(name)] == [
        json.loads(line) for line in shipped.splitlines()
    ]
