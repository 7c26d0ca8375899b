"""The command's flags and the run file's keys are those of command_options.txt.

A flag that goes, or changes its type or default, breaks somebody's script. Where that is meant:

    python tests/house/test_command_options.py      # rewrites command_options.txt; commit it
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from inlay.cli.main import VERBS
from inlay.methods.catalog import catalog
from inlay.run.flags import Flag
from inlay.run.hyperparameters import method_flags
from inlay.tasks.config import flags

FROZEN = Path(__file__).with_name("command_options.txt")


def command_options() -> str:
    """Return every verb's flags and the run file's keys, one a line."""
    sections: dict[str, Iterable[str]] = {
        f"inlay {verb}": map(flag_line, flags_of_verb(verb)) for verb in VERBS
    }
    sections["run file"] = map(key_line, flags())
    for method in catalog():
        sections[f"run file, method {method}"] = map(key_line, method_flags(method))
    return "\n".join(f"[{title}]\n" + "".join(lines) for title, lines in sections.items())


def flags_of_verb(verb: str) -> Iterator[argparse.Action]:
    parser = importlib.import_module(f"inlay.cli.{verb}").parser([])
    yield from sorted(parser._actions, key=lambda action: (action.option_strings, action.dest))


def flag_line(action: argparse.Action) -> str:
    """Return a flag as typed, how many values it takes, what they look like, and its default."""
    name = ", ".join(action.option_strings) or action.dest
    if action.nargs == 0:
        return f"{name}\n"
    values = {None: "one", "+": "one or more", "?": "one or none"}[action.nargs]  # type: ignore[index]
    default = re.search(r"\(default: (.*)\)$", action.help or "")
    shown = f"; default {default[1]}" if default else ""
    return f"{name} {action.metavar}: {values}{shown}\n"


def key_line(flag: Flag) -> str:
    return f"{flag.key}: {flag.expected}; default {flag.default!r}\n"


def test_the_commands_options_are_the_frozen_ones() -> None:
    assert command_options() == FROZEN.read_text(), (
        "the command's options have changed; where that is meant, run "
        "`python tests/house/test_command_options.py` and say it in CHANGELOG.md"
    )


if __name__ == "__main__":
    FROZEN.write_text(command_options())
