"""Pages of the docs site that are made when it is built, from the code they describe.

mkdocs loads this file (`hooks:` in mkdocs.yml). None of these pages is committed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import inlay
from inlay.cli.main import VERBS
from inlay.cli.options import shown
from inlay.cli.train import GROUPS
from inlay.methods.catalog import REQUIRED, MethodSpec, catalog
from inlay.run.config import RunConfig
from inlay.run.flags import Flag, flags_of
from inlay.tasks import TASKS
from inlay.tasks.config import flags

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MOVED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository that are pages of the site under another name."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")
"""A link to a file, which is no picture."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every decision in the navigation."""
    pages = [{title: f"adr/{name}"} for _, title, name in decisions()]
    for section in config.nav or []:
        for entry in next(iter(section.values())):
            if isinstance(entry, dict) and "Decisions" in entry:
                entry["Decisions"] = ["adr/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of the folder."""
    from mkdocs.structure.files import File

    for path, write in GENERATED.items():
        files.append(File.generated(config, path, content=write()))
    for spec in catalog().values():
        files.append(File.generated(config, f"methods/{spec.name}.md", content=method_page(spec)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside the site into their text."""
    here = Path(page.file.src_uri).parent

    def resolved(link: re.Match[str]) -> str:
        text, target = link.groups()
        parts: list[str] = []
        for part in (here / target.partition("#")[0]).parts:
            parts[-1:] = [] if part == ".." and parts else [*parts[-1:], part]
        inside = files.get_file_from_path("/".join(parts)) is not None
        return link.group() if inside else text

    return LINK.sub(resolved, with_keys(markdown))


def with_keys(markdown: str) -> str:
    """Return a task's page with the tables of its keys in place of the mark."""
    return re.sub(r"<!-- keys: (\w+) -->", lambda mark: task_keys(mark[1]), markdown)


def task_keys(name: str) -> str:
    """Return the keys that a task has for itself, and those that do not apply to it."""
    task = TASKS[name]
    own = [
        (f"`{f.key}`", default_cell(default_of(f)), cell(f.help))
        for f in flags_of(task.options)
        if f.key not in RunConfig.model_fields
    ]
    fixed = [(f"`{key}`", cell(fixed.reason)) for key, fixed in task.fixed.items()]
    parts = (
        ["## Keys of this task", "\n".join(table(("key", "default", "meaning"), own))]
        if own
        else []
    )
    if fixed:
        parts += ["## Keys that do not apply", "Each is refused with the reason."]
        parts += ["\n".join(table(("key", "why"), fixed))]
    return "\n\n".join(parts)


def default_cell(value: object) -> str:
    """Return a default as one would write it, or nothing where there is none."""
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else shown(value)}`"


def home() -> str:
    """Return the README with its links made relative to the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for old, new in MOVED.items():
        text = text.replace(f"]({old}", f"]({new}")
    return text.replace("](docs/", "](")


def repository_page(name: str) -> Callable[[], str]:
    """Return what reads a page from the repository's root."""

    def read() -> str:
        text = (ROOT / name).read_text(encoding="utf-8")
        return text.replace("](docs/", "](").replace("](README.md", "](index.md")

    return read


def method_page(spec: MethodSpec) -> str:
    """Return the page of a method: its docstring, how to run it, its hyperparameters."""
    text, mark, example = spec.doc.partition(">>>")
    text, _, errors = text.partition("Raises:")
    facts = [
        ("Paper", papers(spec.paper)),
        ("Merges into the base", "yes" if spec.mergeable else "no"),
        ("Default targets", f"`{spec.default_targets}`"),
        ("Learning rate by `auto`", f"{spec.learning_rate_factor:g} x that of LoRA"),
        ("Type in HF PEFT's files", f"`{spec.peft_type}`" if spec.peft_type else "none"),
        ("Python", f"[`inlay.{spec.class_name}`](../reference/python.md#inlay.{spec.class_name})"),
    ]
    required = [f for f in spec.fields.values() if f.default is REQUIRED]
    assert not required, f"{spec.name}: the example on its page must set {required}"
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            text.rstrip(),
            "",
            *(["Raises " + " ".join(errors.split()), ""] if errors else []),
            *table(("property", "value"), facts),
            "",
            *example_of(spec),
            "",
            *(["## Hyperparameters", "", *hyperparameters(spec), ""] if spec.fields else []),
            *(["```pycon", mark + example.rstrip(), "```", ""] if mark else []),
        ]
    )


def example_of(spec: MethodSpec) -> list[str]:
    """Return how to run a method: on the embedded model, or on one with biases for bitfit."""
    train, load = "--model pocket --data reports", 'inlay.load("pocket")'
    given: list[str] = []
    if spec.name == "bitfit":  # the embedded model has no biases
        given = ["<!-- given: reports.csv -->"]
        train = (
            "--task classify --model path/to/an/encoder --data reports.csv --text findings "
            "--label urgency"
        )
        load = (
            'inlay.load("path/to/an/encoder", head=inlay.Head("sequence", ("no", "yes"), '
            '"single_label_classification"))'
        )
    return [
        *given,
        "```bash",
        f"inlay train {train} --method {spec.name} --output {spec.name}",
        f"inlay methods {spec.name}",
        "```",
        "",
        "```python",
        "import inlay",
        "",
        f"model, tokenizer = {load}",
        f"inlay.attach(model, inlay.{spec.class_name}())",
        "print(inlay.report(model))",
        "```",
    ]


def hyperparameters(spec: MethodSpec) -> list[str]:
    """Return the table of a method's hyperparameters."""
    rows = [(f"`{f.name}`", f"`{f.annotation}`", f"`{f.default!r}`") for f in spec.fields.values()]
    return table(("key or flag", "type", "default"), rows)


def methods_index() -> str:
    """Return the list of methods."""
    rows = [(f"[{s.name}]({s.name}.md)", s.summary) for s in catalog().values()]
    return "\n".join(
        [
            "# Methods",
            "",
            "`method` in a run file, or `--method`, takes one of these names; the default is "
            "`lora`. In Python each is a class. `inlay methods` prints the same list.",
            "",
            *table(("method", "what it trains"), rows),
            "",
        ]
    )


def papers(ids: str) -> str:
    """Return links to arXiv."""
    return ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in ids.replace(",", " ").split())


def run_keys() -> list[tuple[str, list[Flag]]]:
    """Return every key of a run file by the group it belongs to."""
    by_key = {flag.key: flag for flag in flags()}
    groups = [(title, [by_key.pop(key) for key in keys]) for title, keys in GROUPS.items()]
    return [*groups, *([("other", list(by_key.values()))] if by_key else [])]


def run_file_page() -> str:
    """Return the page of the run file's keys."""
    parts = [
        "# The run file",
        "A run file is YAML: a key and a value on each line. Every key is a flag of `inlay train` "
        "too (`learning_rate` is `--learning-rate`), and a flag overrides the file. An unknown "
        "key, a value of the wrong type and keys that contradict each other stop the command "
        "with one sentence for each problem. `inlay train run.yaml --print-config` prints the "
        "run with every default. The hyperparameters of a method "
        "([methods](../methods/index.md)) are keys beside these.",
    ]
    for title, keys in run_keys():
        rows = [
            (f"`{f.key}`", default_cell(default_of(f)), f"{cell(f.help)} *({cell(f.expected)})*")
            for f in keys
        ]
        parts += [f"## {title.capitalize()}", "\n".join(table(RUN_COLUMNS, rows))]
    return "\n\n".join([*parts, ""])


RUN_COLUMNS = ("key", "default", "meaning *(value)*")


def default_of(flag: Flag) -> object:
    """Return a key's default, or None where there is none worth showing."""
    return None if flag.default in ([], {}, ()) else flag.default


def command_page() -> str:
    """Return the page of the command's verbs and flags."""
    parts = [
        "# The command",
        "Exit codes: 0 done, 2 wrong input (with a sentence on what to do), 130 interrupted, "
        "1 a bug in Inlay. `inlay VERB --help` prints the same as this page.",
        "\n".join(table(("verb", "what it does"), [(f"[{v}](#{v})", a) for v, a in VERBS.items()])),
    ]
    for verb in VERBS:
        parts += verb_section(verb)
    return "\n\n".join([*parts, ""])


def verb_section(verb: str) -> list[str]:
    """Return the section of one verb: its usage, what it does, its flags, examples."""
    parser: argparse.ArgumentParser = importlib.import_module(f"inlay.cli.{verb}").parser([])
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    parts = [f"## {verb}", f"```text\n{usage}\n```", parser.description or ""]
    groups = [g for g in parser._action_groups if g._group_actions and g.title not in DEFAULTS]
    same = [g.title for g in groups if g.title in GROUPS or str(g.title).startswith(OWN)]
    if verb != "train" and same:
        parts.append(
            f"Takes the keys of a run in the groups {', '.join(str(t) for t in same)}: "
            "[the run file](run-file.md)."
        )
        groups = [g for g in groups if g.title not in same]
    for group in groups:
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        rows = [(flag_cell(a), cell((a.help or "").replace("%%", "%"))) for a in actions]
        parts.append("\n".join(table((str(group.title), ""), rows)))
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog}\n```")
    return parts


DEFAULTS = ("positional arguments", "options")
OWN = "hyperparameters of "


def flag_cell(action: argparse.Action) -> str:
    """Return a flag as it is typed."""
    words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = f" {action.metavar}" if action.option_strings and action.metavar else ""
    return f"`{words}{value}`".replace("|", "\\|")


def python_page() -> str:
    """Return the page of the public names, which mkdocstrings fills in."""
    methods = {spec.class_name for spec in catalog().values()}
    errors = {n for n in inlay.__all__ if n.endswith("Error")}
    verbs = [n for n in inlay.__all__ if n not in methods | errors]
    sections = (
        ("Functions", VERBS_TEXT, verbs),
        ("Methods", METHODS_TEXT, sorted(methods)),
        ("Errors", ERRORS_TEXT, sorted(errors)),
    )
    parts = ["# Python", "Every public name of `inlay`. `import inlay` does not import torch."]
    for title, text, names in sections:
        parts += [f"## {title}", text, *(f"::: inlay.{name}" for name in names)]
    return "\n\n".join([*parts, ""])


VERBS_TEXT = "Each takes a model, or the folder of one; none wraps the model."
METHODS_TEXT = "A method is a frozen dataclass of its hyperparameters, given to `inlay.attach`."
ERRORS_TEXT = "Every error of Inlay is an `InlayError`, and its message says what to do."


def peft_page() -> str:
    """Return the page of `inlay.peft`."""
    entry = "::: inlay.peft.{}\n    options:\n      members: true"
    main = ("get_peft_model", "PeftModel", "take_over")
    rest = [name for name in peft_names() if name not in main and name[0].islower()]
    classes = [name for name in peft_names() if name not in main and name[0].isupper()]
    parts = [
        "# inlay.peft",
        "HF PEFT's interface on Inlay's layers: see the [guide](../guides/peft.md).",
        *(entry.format(name) for name in (*main, *rest)),
        "## Classes by task",
        "`PeftModel` by the names that HF PEFT has for tasks, and those that load a base with "
        "its adapter: " + ", ".join(f"`{name}`" for name in classes) + ".",
    ]
    return "\n\n".join([*parts, ""])


def peft_names() -> list[str]:
    """Return the public names of `inlay.peft`, read from its source: importing it loads torch."""
    source = (ROOT / "src" / "inlay" / "peft" / "__init__.py").read_text(encoding="utf-8")
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    (names,) = (a.value for a in assigned if ast.unparse(a.targets[0]) == "__all__")
    return list(ast.literal_eval(names))


def decisions_page() -> str:
    """Return the list of decisions."""
    rows = [(number, f"[{title}]({name})") for number, title, name in decisions()]
    text = "Each page says what was decided, why, and what follows. A later one may replace it."
    return "\n".join(["# Decisions", "", text, "", *table(("number", "decision"), rows), ""])


def decisions() -> list[tuple[str, str, str]]:
    """Return the number, title and file of each decision."""
    found = []
    for path in sorted((ROOT / "docs" / "adr").glob("0*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# 0123456789.")
        found.append((str(int(path.name[:4])), title, path.name))
    return found


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]


def cell(text: str) -> str:
    """Return text that may stand in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


GENERATED: dict[str, Callable[[], str]] = {
    "index.md": home,
    "contributing.md": repository_page("CONTRIBUTING.md"),
    "changelog.md": repository_page("CHANGELOG.md"),
    "methods/index.md": methods_index,
    "reference/run-file.md": run_file_page,
    "reference/command.md": command_page,
    "reference/python.md": python_page,
    "reference/peft.md": peft_page,
    "adr/index.md": decisions_page,
}
"""Pages of the site by path, with what writes them."""
