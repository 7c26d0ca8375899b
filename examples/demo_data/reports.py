"""Generated radiology reports: findings in many words, and the impression that follows from them.

The facts of a case are drawn first. The findings are written from them in varied wording, mostly
without naming the diagnosis, among statements of what is normal or absent; the impression is
written from the facts alone. No sentence of the findings is the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from demo_data.findings import FINDINGS, NEGATIONS, NORMAL, Finding

__all__ = ["Report", "generate_reports"]

NORMAL_SHARE = 0.25
NAMED_SHARE = 0.3
CHANGE_SHARE = 0.35
RESOLVED_SHARE = 0.15
ABBREVIATED_SHARE = 0.25
MISSPELT_SHARE = 0.3
WORD_MISSPELT = 0.08
FEWEST_LETTERS = 6
"""Shorter words are not misspelt: an error in `left` could make another word."""

NOTHING_ACUTE = "No acute cardiopulmonary abnormality."
ACUTE = 3
CHANGES = {
    "new": ("this was not present on the prior study", "this is new since the previous exam"),
    "unchanged": (
        "this is similar to the prior study",
        "no interval change from the previous exam",
        "unchanged from prior",
    ),
    "increased": ("this has progressed since the prior study", "larger than on the last exam"),
    "decreased": ("this has improved since the prior study", "less than on the last exam"),
}
"""Sentences that compare with the prior film, by the word that the impression uses."""
FIXED = frozenset({"new", "unchanged"})
GROWING = frozenset({"pleural effusion", "pneumothorax", "pneumonia", "atelectasis"}) | {
    "pulmonary edema",
    "lung nodule",
    "lymphadenopathy",
}
RESOLVING = ("pleural effusion", "pneumothorax", "pulmonary edema")
RESOLVED = (
    "the previously seen {name} has resolved",
    "the {name} described on the prior study is no longer seen",
    "interval resolution of the earlier {name}",
)
OPENINGS = (
    "PA and lateral views of the chest",
    "frontal and lateral views were obtained",
    "single portable view of the chest",
    "comparison is made with the prior radiograph",
)
ABBREVIATIONS = (
    ("left lower lobe", "LLL"),
    ("right lower lobe", "RLL"),
    ("left upper lobe", "LUL"),
    ("right upper lobe", "RUL"),
    ("costophrenic", "CP"),
    ("without", "w/o"),
    ("bilateral", "b/l"),
    ("with ", "w/ "),
    ("there is no", "no"),
)
WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Report:
    """One radiology report."""

    uid: str
    findings: str
    impression: str
    label: str
    """The most urgent finding, or `normal`."""


@dataclass(frozen=True)
class Fact:
    """A finding of one case, independent of the words that describe it."""

    finding: Finding
    grade: str
    side: str
    site: str
    change: str

    @property
    def impression(self) -> str:
        """The sentence of the impression that states this fact."""
        text = filled(self.finding.impression, self)
        return sentence(f"{text}, {self.change}" if self.change else text)


def generate_reports(count: int, seed: int) -> list[Report]:
    """Return that many reports, no two with the same findings; the same seed gives the same.

    Fewer reports with the same seed are the first ones of more.
    """
    random = Random(seed)
    found: dict[str, Report] = {}
    while len(found) < count:
        facts = draw_facts(random)
        findings = write_findings(facts, random)
        if findings not in found:
            uid = f"r{seed}-{len(found) + 1:05d}"
            found[findings] = Report(uid, findings, write_impression(facts), label_of(facts))
    return list(found.values())


# The facts


def draw_facts(random: Random) -> list[Fact]:
    """Return the facts of one case, the most urgent first; none for a normal case."""
    if random.random() < NORMAL_SHARE:
        return []
    number = random.choices((1, 2, 3), weights=(5, 3, 2))[0]
    facts = [draw_fact(finding, random) for finding in random.sample(FINDINGS, number)]
    return sorted(facts, key=lambda fact: (-fact.finding.urgency, fact.finding.name))


def draw_fact(finding: Finding, random: Random) -> Fact:
    """Return one finding with its grade, side, site and change drawn."""
    changes = [c for c in CHANGES if c in FIXED or finding.name in GROWING]
    if finding.urgency < ACUTE:
        changes.remove("new")
    return Fact(
        finding,
        grade=random.choice(list(finding.looks)),
        side=random.choice(finding.sides or ("",)),
        site=random.choice(finding.sites or ("",)),
        change=random.choice(changes) if random.random() < CHANGE_SHARE else "",
    )


def label_of(facts: list[Fact]) -> str:
    """Return the name of the most urgent finding."""
    return facts[0].finding.name if facts else "normal"


def write_impression(facts: list[Fact]) -> str:
    """Return the impression: the facts, most urgent first, or that nothing is acute."""
    stated = [fact.impression for fact in facts]
    if all(fact.finding.urgency < ACUTE for fact in facts):
        stated.append(NOTHING_ACUTE)
    return " ".join(stated)


# The words


def write_findings(facts: list[Fact], random: Random) -> str:
    """Return the findings in words: what is seen, normal and absent, in any order."""
    blocks = [describe(fact, random) for fact in facts]
    blocks += normal_statements(facts, random) + negations(facts, random)
    if random.random() < RESOLVED_SHARE:
        blocks += resolved(facts, random)
    random.shuffle(blocks)
    if random.random() < 0.5:
        blocks.insert(0, sentence(random.choice(OPENINGS)))
    text = " ".join(blocks)
    if random.random() < ABBREVIATED_SHARE:
        text = abbreviated(text)
    return misspelt(text, random) if random.random() < MISSPELT_SHARE else text


def describe(fact: Fact, random: Random) -> str:
    """Return one finding in words, with its comparison."""
    by_name = random.random() < NAMED_SHARE
    wordings = fact.finding.named if by_name else fact.finding.looks[fact.grade]
    text = sentence(filled(random.choice(wordings), fact))
    return f"{text} {sentence(random.choice(CHANGES[fact.change]))}" if fact.change else text


def normal_statements(facts: list[Fact], random: Random) -> list[str]:
    """Return normal statements about some of the regions without findings."""
    found = {fact.finding.region for fact in facts}
    free = [region for region in NORMAL if region not in found]
    chosen = random.sample(free, random.randint(min(2, len(free)), min(4, len(free))))
    return [sentence(random.choice(NORMAL[region])) for region in chosen]


def negations(facts: list[Fact], random: Random) -> list[str]:
    """Return some true statements of absence."""
    there: set[str] = set()
    for fact in facts:
        there |= {fact.finding.name} | fact.finding.denied
    true = [wordings for absent, wordings in NEGATIONS if not absent & there]
    chosen = random.sample(true, min(len(true), random.randint(1, 3)))
    return [sentence(random.choice(wordings)) for wordings in chosen]


def resolved(facts: list[Fact], random: Random) -> list[str]:
    """Return a sentence about a resolved finding, which the impression does not list."""
    there = {fact.finding.name for fact in facts}
    gone = [name for name in RESOLVING if name not in there]
    if not gone:
        return []
    return [sentence(random.choice(RESOLVED).format(name=random.choice(gone)))]


def filled(wording: str, fact: Fact) -> str:
    """Return a wording with a fact's side, site and grade."""
    return wording.format(side=fact.side, site=fact.site, grade=fact.grade)


def sentence(text: str) -> str:
    """Return a text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def abbreviated(text: str) -> str:
    """Return a text in the short forms of a busy reader."""
    for long, short in ABBREVIATIONS:
        text = text.replace(long, short)
    return text


def misspelt(text: str, random: Random) -> str:
    """Return a text with some of its longer words mistyped."""

    def mistype(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < FEWEST_LETTERS or random.random() > WORD_MISSPELT:
            return word
        at = random.randrange(1, len(word) - 2)
        return random.choice(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[:at] + word[at] + word[at:],
            )
        )

    return WORD.sub(mistype, text)
