"""`inlay train`: tune an adapter, from flags or a run file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import yaml

from inlay.cli import show, summary
from inlay.cli.options import Parser, checked
from inlay.cli.progress import progress
from inlay.methods.catalog import catalog
from inlay.run.config import RunConfig
from inlay.run.flags import flags_of
from inlay.run.hyperparameters import method_flags
from inlay.tasks import TASKS
from inlay.tasks.config import flags, load_config
from inlay.train.processes.launch import (
    Launch,
    LaunchOptions,
    check_divisible,
    check_options,
    follows,
)

ABOUT = "Tune an adapter on a frozen model and measure it against the base on held-out rows."
USAGE = """inlay train --model M --data D --output DIR [flags]
       inlay train RUN.yaml [flags]
       inlay train RUN.yaml --gpus N [--nodes M] [--launcher slurm|ray]"""
EXAMPLES = """examples:
  inlay train --model pocket --data reports --output run
  inlay train --model Qwen/Qwen3-0.6B --data my.csv --prompt question --completion answer \\
              --storage nf4 --rank 32 --output run
  inlay train run.yaml --learning-rate 1e-4 --output run2
  inlay train --task dpo --model pocket --data pairs.jsonl --output preferred
  inlay train --task grpo --model pocket --data problems.jsonl --rewards final_number \\
              --output rewarded
  inlay train run.yaml --gpus 8
  inlay train run.yaml --print-config > resolved.yaml"""
GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model", "revision", "storage", "double_quant", "head_storage",
        "embedding_storage", "stream", "dtype", "eight_bits",
    ),
    "method": ("method", "targets", "exclude", "layers", "modules_to_save", "trainable_tokens"),
    "data": (
        "task", "data", "eval_data", "format", "prompt", "completion", "text", "text_pair", "label",
        "kind", "anchor", "positive", "negative", "score", "pooling", "split", "split_by",
        "skip_empty", "max_rows", "max_pixels", "allow_urls", "max_length", "packing",
    ),
    "training": (
        "epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "scheduler",
        "beta", "desirable_weight", "undesirable_weight", "optimizer", "warmup", "weight_decay",
        "max_grad_norm", "activations",
        "cache_trunk", "cache_vision", "seed", "threads", "parallel",
    ),
    "rewards": (
        "rewards", "num_generations", "max_completion_tokens", "temperature", "top_p", "generation",
    ),
    "evaluation": ("evaluate", "eval_rows", "generate_rows", "generate_tokens"),
    "output": ("output", "log_every", "save_every", "keep_checkpoints", "resume", "overwrite"),
}  # fmt: skip
"""The keys of a run by their section in the help."""


def parser(argv: Sequence[str]) -> Parser:
    found = Parser("train", USAGE, ABOUT, EXAMPLES)
    add_run(found, argv)
    found.add_flags("several processes", flags_of(LaunchOptions))
    found.add_switches(print_config="print the resolved run as YAML and exit")
    return found


def add_run(to: Parser, argv: Sequence[str], shown: Sequence[str] = tuple(GROUPS)) -> None:
    to.add_word("run_file", "RUN.yaml", "keys and values of a run; flags override them")
    method = method_named(argv)
    by_key = {flag.key: flag for flag in flags()}
    for title in shown:
        to.add_flags(title, (by_key[key] for key in GROUPS[title]))
        if title == "method":
            own = (replace(flag, help=flag.expected) for flag in method_flags(method))
            to.add_flags(f"hyperparameters of {method}", own)
    to.add_hidden(by_key.values())
    to.add_hidden(flag for other in catalog() for flag in method_flags(other))


def method_named(argv: Sequence[str]) -> str:
    """Return the method given in `argv`; LoRA if there is none."""
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        name = following if word == "--method" else word.removeprefix("--method=")
        if name in catalog():
            return name
    return "lora"


def config_from(given: dict[str, Any]) -> RunConfig:
    return load_config(given.pop("run_file", None), given)


def run(given: dict[str, Any]) -> int:
    only_print = given.pop("print_config", False)
    launch = {key: given.pop(key) for key in LaunchOptions.model_fields if key in given}
    config = config_from(given)
    if only_print:
        print(as_yaml(config), end="")
        return 0

    if launch:
        return launched(config, checked(LaunchOptions, launch))
    from inlay.train.run import train

    with nullcontext() if follows() else progress() as drawn:
        result = train(config, on_event=drawn)
    if not result.leads:
        return 0
    if result.model is None:
        print(f"The run in {config.output} is already finished; --overwrite trains it again.")
        return 0
    summary.what_trained(result.run)
    if result.run["comparison"]:
        summary.comparison(result.run["comparison"], TASKS[config.task].titles)
        summary.classes(result.run["comparison"])
        for example in result.run["comparison"]["examples"][:1]:
            summary.example(example)
    next_steps(config)
    return 0


def launched(config: RunConfig, options: LaunchOptions) -> int:
    check_options(options)
    check_divisible(config.batch_size, config.gradient_accumulation, options.size)
    launch = Launch(config, options)
    launch.write(as_yaml(config))
    return launch.start()


def next_steps(config: RunConfig) -> None:
    where = shlex.quote(config.output)
    show.heading("in " + config.output)
    show.facts(
        [
            ("adapter/", "the trained adapter; HF PEFT can read it"),
            ("report.html", "curves and comparison on one page"),
            ("run.json", "configuration, versions, hashes, results"),
            ("metrics.jsonl", "the metrics of every logged step"),
        ]
    )
    show.heading("next")
    print(f"  inlay eval --adapter {where} --data MORE_ROWS")
    if not TASKS[config.task].has_head:
        print(f"  inlay generate --adapter {where} --prompt TEXT")
    print(f"  inlay merge --adapter {where} --output {shlex.quote(config.output + '-merged')}")


def as_yaml(config: RunConfig) -> str:
    values = config.model_dump()
    spec = catalog()[config.method]
    defaults = {name: field.default for name, field in spec.fields.items()}
    values |= defaults | values.pop("hyperparameters")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
