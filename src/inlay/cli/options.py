"""Flags made from a pydantic model, so that flags, run files and checks always agree."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from inlay.errors import UsageError, did_you_mean
from inlay.run.flags import Flag, flags_of, from_text
from inlay.run.sentences import validated
from inlay.run.synonyms import SYNONYMS
from inlay.tasks.config import run_keys

Options = TypeVar("Options", bound=BaseModel)


class Once(argparse.Action):
    """Store a flag's value; a flag that is given twice is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of printing its usage and exiting."""

    def __init__(self, verb: str, usage: str, about: str, examples: str = ""):
        super().__init__(
            prog=f"inlay {verb}",
            usage=usage,
            description=about,
            epilog=examples,
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.hidden: set[str] = set()

    def add_flags(self, title: str, flags: Iterable[Flag]) -> None:
        """Add a titled group of flags; the pydantic model checks their text later."""
        group = self.add_argument_group(title)
        for flag in flags:
            self.add_flag(group, flag, help_of(flag))

    def add_hidden(self, flags: Iterable[Flag]) -> None:
        for flag in flags:
            if flag.option not in self._option_string_actions:
                self.add_flag(self, flag, argparse.SUPPRESS)
                self.hidden.add(flag.option)

    def add_flag(self, to: argparse._ActionsContainer, flag: Flag, text: str) -> None:
        how: dict[str, Any] = {"dest": flag.key, "help": text}
        if flag.kind == "switch":
            how |= {"action": argparse.BooleanOptionalAction, "default": None}
        elif flag.kind == "value":
            how |= {"action": Once, "metavar": metavar(flag)}
        else:
            how |= {"action": "extend", "nargs": "+", "metavar": metavar(flag)}
        to.add_argument(flag.option, **how)

    def add_switches(self, **switches: str) -> None:
        group = self.add_argument_group("other")
        every = switches | {
            "help": "show this help and exit",
            "debug": "show the traceback of an unexpected error",
        }
        for key, text in every.items():
            option = "--" + key.replace("_", "-")
            group.add_argument(option, action="store_true", default=None, help=text)

    def add_word(self, name: str, shown_as: str, text: str) -> None:
        group = self.add_argument_group("argument")
        group.add_argument(name, nargs="?", metavar=shown_as, help=text)

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """Raise UsageError for an unknown flag, one without its value, or an extra word."""
        namespace, rest = self.parse_known_args(list(argv))
        if rest:
            raise UsageError(self.unknown(rest))
        return {key: value for key, value in vars(namespace).items() if value is not None}

    def unknown(self, rest: Sequence[str]) -> str:
        flag = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
        if flag is None:
            return f"unexpected argument {rest[0]!r}."
        known = [o for o in self._option_string_actions if o not in self.hidden]
        synonym = SYNONYMS.get(flag.lstrip("-").replace("-", "_"), "")
        option = "--" + synonym.replace("_", "-")
        hint = f" Did you mean {option!r}?" if option in known else did_you_mean(flag, known)
        return f"there is no flag {flag!r}.{hint}"

    def error(self, message: str) -> NoReturn:
        subject, _, problem = message.removeprefix("argument ").partition(": ")
        words = {
            "expected one argument": "needs a value",
            "expected at least one argument": "needs one or more values",
        }
        if problem.startswith("ignored explicit argument"):
            problem = "takes no value; to turn it off write " + "--no-" + subject.split("/")[0][2:]
        problem = words.get(problem, problem)
        raise UsageError(f"{subject} {problem}".strip() + ".")


def help_of(flag: Flag) -> str:
    text = flag.help.replace("%", "%%")
    nothing = flag.default is None or flag.default is ... or flag.default in ([], {}, ())
    if "default" in text or nothing:
        return text
    return f"{text} (default: {shown(flag.default)})"


def shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list | tuple):
        return " ".join(str(item) for item in default)
    return str(default)


def metavar(flag: Flag) -> str:
    if flag.choices:
        return "|".join(flag.choices)
    if flag.kind == "pairs":
        return "NAME=VALUE"
    return "N" if "number" in flag.expected else "TEXT"


def same(key: str) -> Any:
    """Return the field of a run, for a flag of another verb with the same meaning and default."""
    return run_keys()[key]


def checked(definition: type[Options], given: Mapping[str, Any]) -> Options:
    """Raise UsageError with one line for each problem."""
    known = {flag.key: flag for flag in flags_of(definition)}
    values = {key: from_text(known[key], value) for key, value in given.items() if key in known}
    options, problems = validated(definition, values)
    if options is None:
        raise UsageError("\n".join(problems.values()))
    assert isinstance(options, definition)
    return options
