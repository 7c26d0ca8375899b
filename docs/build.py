"""Write one page a method from its docstring: docs/methods/<name>.md and an index.

python docs/build.py
"""

from __future__ import annotations

from pathlib import Path

from inlay.methods.catalog import REQUIRED, MethodSpec, catalog

FOLDER = Path(__file__).parent / "methods"


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(exist_ok=True)
    for spec in catalog().values():
        (FOLDER / f"{spec.name}.md").write_text(page(spec))
    (FOLDER / "README.md").write_text(index())


def page(spec: MethodSpec) -> str:
    """Return one method's page."""
    fields = spec.fields.values()
    rows = [f"| `{f.name}` | `{f.annotation}` | {default(f.default)} |" for f in fields]
    table = ["| hyperparameter | type | default |", "|---|---|---|", *rows] if rows else []
    facts = [
        f"- paper: {papers(spec.paper)}",
        f"- merges into the base: {'yes' if spec.mergeable else 'no'}",
        f"- default targets: `{spec.default_targets}`",
        f"- learning rate: {spec.learning_rate_factor:g} x LoRA's formula",
        f"- HF PEFT's name: {f'`{spec.peft_type}`' if spec.peft_type else 'none'}",
    ]
    text, mark, example = spec.doc.partition(">>>")
    code = ["```pycon", mark + example.rstrip(), "```", ""] if mark else []
    return "\n".join([f"# {spec.name}", "", text.rstrip(), "", *code, *facts, "", *table, ""])


def papers(ids: str) -> str:
    """Return links to arXiv."""
    return ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in ids.replace(",", " ").split())


def default(value: object) -> str:
    """Return a default as it is written."""
    return "required" if value is REQUIRED else f"`{value!r}`"


def index() -> str:
    """Return the list of methods."""
    rows = [f"| [{s.name}]({s.name}.md) | {s.summary} |" for s in catalog().values()]
    return "\n".join(["# Methods", "", "| method | |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    main()
