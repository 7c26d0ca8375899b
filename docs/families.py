"""Write docs/families.md: what came of every class of transformers' mappings, by release.

python docs/families.py     from tests/families/results, which `make families` writes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/families/results"
PAGE = ROOT / "docs/families.md"
TITLES = {
    "CAUSAL_LM": "Causal language models",
    "SEQ_TO_SEQ_CAUSAL_LM": "Sequence to sequence",
    "IMAGE_TEXT_TO_TEXT": "Images and text to text",
    "MASKED_LM": "Masked language models",
    "SPEECH_SEQ_2_SEQ": "Speech to text",
    "CTC": "Speech, CTC",
    "IMAGE_CLASSIFICATION": "Image classification",
    "AUDIO_CLASSIFICATION": "Audio classification",
    "SEQUENCE_CLASSIFICATION": "Sequence classification",
    "TOKEN_CLASSIFICATION": "Token classification",
}
INTRODUCTION = """# Model classes

Each class of transformers' auto mappings is tried on a tiny random model of it. The checks:

- the fast paths equal the plain code, and HF PEFT, in values and gradients;
- a padded row, and a row in a packed sequence, equal the row alone;
- recomputed activations give the same gradients;
- NF4 and int8 weights compute what their dequantised values do;
- the merged model equals the adapted one after it is saved and loaded;
- `detach` gives back the base bit for bit;
- generation is the same in eval and train mode;
- HF PEFT loads the adapter, and the other way round;
- a training step can be planned.

`make families` tries all classes; the tests try some each day, and always those that failed once.

*works*: every check that applies passes. *works, but*: the same, except for what the sentence
says, which Inlay refuses. *not tried*: no tiny model or no input for it could be made here, which
says nothing about the class. *fault*: a value is wrong, or an error has no sentence.
"""


def main() -> None:
    """Write the page from all results there are."""
    PAGE.write_text(page([json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]))


def page(results: list[dict[str, Any]]) -> str:
    """Return the page's text."""
    parts = [INTRODUCTION, counts(results)]
    for mapping, title in TITLES.items():
        names = [r["classes"] for r in results]
        those = sorted(
            {n for classes in names for n, one in classes.items() if one["mapping"] == mapping}
        )
        if those:
            parts.append(table(title, those, results))
    return "\n".join(parts)


def counts(results: list[dict[str, Any]]) -> str:
    """Return how many classes came to what, a line for each release."""
    words = ("works", "works, but", "not tried", "fault")
    rows = [
        [
            release(one),
            *(str(sum(verdict(c)[0] == w for c in one["classes"].values())) for w in words),
        ]
        for one in results
    ]
    return lines(["release", *words], rows)


def table(title: str, names: list[str], results: list[dict[str, Any]]) -> str:
    """Return one mapping's classes and what they came to."""
    rows = [[f"`{name}`", *(told(one["classes"].get(name)) for one in results)] for name in names]
    return f"## {title}\n\n" + lines(["class", *map(release, results)], rows)


def release(one: dict[str, Any]) -> str:
    """Return the name of the transformers release that was tried."""
    return f"transformers {one['releases']['transformers']}"


def told(found: dict[str, Any] | None) -> str:
    """Return a cell of the table."""
    if found is None:
        return "not in it"
    word, why = verdict(found)
    return f"{word}: {why}".replace("|", "\\|") if why else word


def verdict(found: dict[str, Any]) -> tuple[str, str]:
    """Return in a word what came of a class, and the sentences that go with it."""
    if "not built" in found:
        return "not tried", short(found["not built"])
    checks = found["checks"].items()
    wrong = said({c: f for c, f in checks if f["result"] == "FAULT"})
    refused = said({c: f for c, f in checks if f["result"] == "refused"})
    notes = list(dict.fromkeys(short(f["notes"]) for _, f in checks if f.get("notes")))
    if found.get("left out"):
        notes.append(
            f"without the adapter at {short(found['left out'])}, as no gradient reaches it"
        )
    if wrong:
        return "fault", "; ".join(wrong)
    return ("works, but" if refused or notes else "works"), "; ".join([*refused, *notes])


def said(checks: dict[str, Any]) -> list[str]:
    """Return each sentence once, behind the checks that came to it."""
    by_sentence: dict[str, list[str]] = {}
    for check, found in checks.items():
        by_sentence.setdefault(short(found["why"]), []).append(check)
    return [f"{', '.join(names)}: {sentence}" for sentence, names in by_sentence.items()]


def short(sentence: str) -> str:
    """Return a sentence's first 160 characters, without the places of one machine."""
    one = " ".join(sentence.split())
    return one if len(one) <= 160 else one[:157] + "..."


def lines(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    ruled = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


if __name__ == "__main__":
    main()
