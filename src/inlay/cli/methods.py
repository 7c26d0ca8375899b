"""`inlay methods`: the list of fine-tuning methods, and the page of one method."""

from __future__ import annotations

from typing import Any

from inlay.cli import show
from inlay.cli.options import Parser
from inlay.errors import UsageError, did_you_mean
from inlay.methods.catalog import FieldSpec, MethodSpec, catalog
from inlay.run.hyperparameters import method_flags

ABOUT = "List the fine-tuning methods, or show one: its equation, paper and hyperparameters."


def parser(argv: list[str]) -> Parser:
    del argv
    found = Parser("methods", "inlay methods [METHOD] [--json]", ABOUT)
    found.add_word("method", "METHOD", "one method, such as lora")
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    name = given.get("method")
    if name is not None and name not in catalog():
        hint = did_you_mean(name, catalog())
        raise UsageError(f"there is no method {name!r}; there are {', '.join(catalog())}.{hint}")
    chosen = [catalog()[name]] if name else list(catalog().values())
    if given.get("json"):
        show.as_json([as_dict(spec) for spec in chosen])
    elif name:
        page(chosen[0])
    else:
        show.listing(("method", "what it does"), ((m.name, m.summary) for m in chosen))
        print("\n`inlay methods NAME` shows a method's equation, paper and flags.")
    return 0


def page(spec: MethodSpec) -> None:
    print(f"{spec.name}: {spec.equation or spec.summary}\n")
    print(spec.doc.split("\nRaises:")[0].split("\n>>>")[0].rstrip())
    show.heading("facts")
    show.facts(
        [
            ("class", f"inlay.{spec.class_name}"),
            ("paper", f"arXiv {spec.paper}" if spec.paper else "none"),
            ("default targets", spec.default_targets or "the whole model"),
            ("learning rate", f"{spec.learning_rate_factor:g} x LoRA's"),
            ("can be merged", "yes" if spec.mergeable else "no"),
            ("HF PEFT type", spec.peft_type or "none; Inlay's own adapter folder"),
        ]
    )
    show.heading("flags")
    flags = method_flags(spec.name)
    rows = ((flag.option, described(spec.fields[flag.key], flag.expected)) for flag in flags)
    show.listing(("flag", "value"), rows)
    print(f"\n  inlay train --method {spec.name} --model M --data D --output DIR")


def described(field: FieldSpec, expected: str) -> str:
    return expected + ("; required" if field.default is ... else f"; default {field.default!r}")


def as_dict(spec: MethodSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "class": f"inlay.{spec.class_name}",
        "summary": spec.summary,
        "equation": spec.equation,
        "paper": spec.paper,
        "default_targets": spec.default_targets,
        "learning_rate_factor": spec.learning_rate_factor,
        "mergeable": spec.mergeable,
        "peft_type": spec.peft_type,
        "hyperparameters": {
            field.name: {
                "type": field.annotation,
                "default": None if field.default is ... else field.default,
                "required": field.default is ...,
            }
            for field in spec.fields.values()
        },
    }
