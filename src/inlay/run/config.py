"""One definition of a run: the YAML file's keys, the command's flags and the docs come from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
)

from inlay.errors import UsageError
from inlay.methods.catalog import catalog
from inlay.run.flags import Flag, flags_of, from_text
from inlay.run.hyperparameters import checked_hyperparameters, method_flags, method_of
from inlay.run.run_file import read_yaml
from inlay.run.sentences import located, validated, wrong
from inlay.storage.table import StorageName
from inlay.train.tasks import TASKS, task_problems

Text = Annotated[str, StringConstraints(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def as_word(value: object) -> object:
    """Return the word that YAML takes for a truth value: `stream: off`."""
    return "off" if value is False else value


class RunConfig(BaseModel):
    """Everything that defines a training run. Build one with `load_config`.

    A hyperparameter of the chosen method (`rank`, `alpha`, ...) stands beside the other keys and
    is kept in `hyperparameters`; only what the user set is there, the method knows the rest.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Text = Field(description="base model: a folder, a hub id, or 'pocket' (embedded)")
    data: Text = Field(
        description="training data: a file, a hub id, or the generated 'reports' or 'arithmetic'"
    )
    output: Text = Field(description="folder that receives everything the run writes")
    task: Text = Field(
        "sft",
        description="training task: sft (answers), dpo or orpo (a preferred and another answer), "
        "kto (desirable and undesirable answers), grpo (answers with a high reward), reward (a "
        "score for an answer), classify (labels), embed (texts of similar meaning)",
    )

    revision: Text | None = Field(None, description="branch, tag or commit of a hub model")
    storage: StorageName = Field("dense", description="storage format of the frozen weights")
    double_quant: bool = Field(True, description="nf4: quantise the block scales too")
    head_storage: StorageName = Field(
        "dense", description="storage format of the output head, which `storage` leaves dense"
    )
    embedding_storage: Literal["dense", "host"] = Field(
        "dense", description="host: keep the embedding in host memory and look up its rows there"
    )
    stream: Annotated[Literal["off", "disk", "host"], BeforeValidator(as_word)] = Field(
        "off",
        description="keep the frozen weights on disk or in host memory and load each block when it "
        "is needed",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype to compute in; auto keeps the model's own"
    )

    eight_bits: bool = Field(
        False,
        description="multiply frozen weights in 8 bits: not exact, but faster on a CPU without AMX "
        "and on a GPU with FP8; refused where it changes the loss on the run's own rows by over "
        "0.5%",
    )

    method: Text = Field("lora", description="fine-tuning method; see `inlay methods`")
    hyperparameters: dict[str, Any] = Field(
        default_factory=dict, description="the method's own hyperparameters"
    )
    targets: Text | Annotated[list[Text], Field(min_length=1)] | None = Field(
        None,
        description="layers to adapt: 'all-linear', a group, names, suffixes or regexes; "
        "default: the method's own",
    )
    exclude: list[Text] = Field(default_factory=list, description="layers to leave out")
    layers: Text | None = Field(None, description="Transformer blocks to adapt, such as '0-3,8'")
    modules_to_save: list[Text] = Field(
        default_factory=list, description="modules to train and save in full, such as a new head"
    )
    trainable_tokens: list[Text | int] = Field(
        default_factory=list,
        description="tokens or token ids whose embedding rows (and rows of a tied head) train with "
        "the adapter, such as added tokens",
    )

    eval_data: Text | None = Field(
        None, description="held-out data; default: a part split off the training data"
    )
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = Field(
        "auto", description="shape of the data's rows; auto recognises it by their columns"
    )
    prompt: Text | None = Field(
        None,
        description="column with the prompt, or a template with columns in braces, such as "
        "'Findings: {findings}'",
    )
    completion: Text | None = Field(None, description="column or template of the answer")
    text: Text | None = Field(
        None, description="column or template to train on in full, instead of prompt and completion"
    )
    kind: Literal["auto", "single", "multi", "regression", "tokens"] | None = Field(
        None,
        description="classify: single (one class per row), multi (several), regression (a number), "
        "tokens (a tag per word) or auto: from the data",
    )
    text_pair: Text | None = Field(
        None, description="classify: column or template of a second text; default: text_pair"
    )
    label: Text | None = Field(
        None, description="classify: column of the label; default: label, labels or tags"
    )
    anchor: Text | None = Field(
        None,
        description="embed: column or template of the first text; default: anchor, or sentence1",
    )
    positive: Text | None = Field(
        None,
        description="embed: column or template of a text that matches the anchor; default: "
        "positive, or sentence2",
    )
    negative: Text | None = Field(
        None,
        description="embed: column or template of a text that does not match the anchor; default: "
        "negative, if there is one",
    )
    score: Text | None = Field(
        None, description="embed: column with the similarity of the two texts; default: score"
    )
    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] | None = Field(
        None,
        description="embed: how token vectors become one vector per text; auto: the model's own "
        "pooling, else mean",
    )
    split: list[Fraction] = Field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        min_length=3,
        max_length=3,
        description="fractions for train, validation and test; they add up to 1",
    )
    split_by: Text | None = Field(
        None,
        description="column that groups rows: rows of equal value stay in one part of the split",
    )
    skip_empty: bool = Field(
        False, description="leave out rows with an empty prompt or completion instead of stopping"
    )
    max_rows: PositiveInt | None = Field(None, description="read at most this many rows")
    max_pixels: PositiveInt | None = Field(
        None, description="rows with images: maximum pixels of an image; larger images are shrunk"
    )
    allow_urls: bool | None = Field(
        None, description="rows with images: fetch images that are given as a URL; default: off"
    )
    max_length: PositiveInt = Field(1024, description="maximum tokens per row; longer rows are cut")
    packing: Literal["auto", "bfd"] | bool = Field(
        "auto",
        description="join the rows of a batch without padding, each row attending to itself only; "
        "auto: where the model can keep rows apart; bfd: also fill sequences up to max_length",
    )

    epochs: float = Field(3, gt=0, allow_inf_nan=False, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(
        None, description="stop after this many optimiser steps, whatever `epochs` says"
    )
    batch_size: PositiveInt = Field(4, description="rows in one forward pass")
    gradient_accumulation: PositiveInt = Field(4, description="forward passes per optimiser step")
    learning_rate: Literal["auto"] | Positive = Field(
        "auto", description="peak learning rate; auto: from the model's width and the method"
    )
    beta: NotNegative | None = Field(
        None,
        description="dpo, kto, grpo: how strongly the tuned model is kept near the base; orpo: "
        "weight of the odds-ratio loss; default 0.1, for grpo 0",
    )
    desirable_weight: Literal["auto"] | Positive | None = Field(
        None,
        description="kto: weight of desirable rows in the loss; default auto: both labels weigh "
        "about the same",
    )
    undesirable_weight: Literal["auto"] | Positive | None = Field(
        None, description="kto: weight of undesirable rows in the loss; default auto"
    )
    rewards: Annotated[list[Text | dict[str, Any]], Field(min_length=1)] | None = Field(
        None,
        description="grpo: reward functions: final_number, json, regex, length or "
        "FILE.py:function, each a name or a mapping with name, weight and arguments",
    )
    num_generations: Annotated[int, Field(ge=2)] | None = Field(
        None, description="grpo: answers generated per prompt; default 8"
    )
    max_completion_tokens: PositiveInt | None = Field(
        None, description="grpo: maximum tokens per answer; default 256"
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="grpo: sampling temperature; default 1"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="grpo: sample from the most likely tokens up to this probability; default 1 "
        "(all tokens)",
    )
    generation: Literal["transformers", "vllm"] | None = Field(
        None,
        description="grpo: library that generates the answers; default transformers, in this "
        "process",
    )
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw", description="8bit: optimiser state in 8-bit blocks, from bitsandbytes"
    )
    scheduler: Literal["linear", "constant", "cosine"] = Field(
        "linear", description="learning-rate schedule after the warmup"
    )
    warmup: NotNegative = Field(
        0.03, description="warmup steps; below 1: the fraction of all steps"
    )
    weight_decay: NotNegative = Field(0.0, description="AdamW's weight decay")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="gradients are clipped to this norm"
    )
    activations: Literal[
        "auto", "keep-all", "keep-products", "recompute-mlp", "layer-inputs", "offload"
    ] = Field(
        "auto",
        description="activations that the forward pass keeps for the backward pass; the others are "
        "recomputed; auto: as many as fit",
    )
    cache_trunk: Literal["auto"] | bool = Field(
        "auto",
        description="run the blocks below the lowest adapted block once per row and keep their "
        "output; auto: over several epochs, if at most the top half is adapted",
    )
    cache_vision: Literal["auto"] | bool | None = Field(
        None,
        description="rows with images: run a frozen vision tower and projector once per row and "
        "keep their output; default auto: over several epochs",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="seed of the row order, the adapter and sampled answers; not of the split",
    )
    threads: PositiveInt | None = Field(None, description="CPU threads; default: torch's choice")
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="several processes: ddp: each holds all frozen weights; fsdp: sharded over all "
        "processes; hsdp: sharded over the processes of one machine; auto: ddp if it fits",
    )

    evaluate: bool = Field(True, description="compare base and tuned on held-out rows at the end")
    eval_rows: PositiveInt = Field(200, description="maximum held-out rows to measure the loss on")
    generate_rows: int = Field(32, ge=0, description="maximum held-out rows to generate text for")
    generate_tokens: PositiveInt = Field(128, description="maximum tokens to generate per row")

    log_every: PositiveInt = Field(10, description="steps between two lines of metrics.jsonl")
    save_every: PositiveInt = Field(100, description="steps between two checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints to keep")
    resume: bool = Field(
        False, description="continue from the last complete checkpoint in `output`"
    )
    overwrite: bool = Field(False, description="replace an existing run in `output`")


def flags() -> list[Flag]:
    """Return a flag for every key of `RunConfig` but `hyperparameters`, in order."""
    return [flag for flag in flags_of(RunConfig) if flag.key != "hyperparameters"]


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> RunConfig:
    """Return the run that a YAML file and overrides (flags) define; overrides win.

    An override may be a value or the text of one (`"3"`, `["q_proj", "v_proj"]`, `["a=1"]`).

    Raises:
        UsageError: with one line for each problem of the file, its keys and its values.
    """
    lines: dict[str, int] = {}
    values: dict[str, object] = {}
    if path is not None:
        values, lines = read_yaml(Path(path))
    typed = parsed_overrides(overrides or {}, str(values.get("method", "lora")))
    for key in typed:
        lines.pop(key, None)
    return checked_config({**values, **typed}, source=str(path or ""), lines=lines)


def checked_config(
    values: Mapping[str, object], *, source: str = "", lines: Mapping[str, int] | None = None
) -> RunConfig:
    """Return the run these keys define, hyperparameters of the method among them.

    Raises:
        UsageError: with one line for each problem.
    """
    own = {k: v for k, v in values.items() if k in RunConfig.model_fields}
    rest = {k: v for k, v in values.items() if k not in RunConfig.model_fields}
    method, problems = method_of(own.get("method", RunConfig.model_fields["method"].default))
    nested = own.pop("hyperparameters", {})
    if not isinstance(nested, dict) or not all(isinstance(k, str) for k in nested):
        problems["hyperparameters"] = wrong(
            "hyperparameters", nested, "a mapping from names to values"
        )
        nested = {}
    for key in nested.keys() & rest.keys():
        problems[key] = f"{key!r} is given twice, by itself and in 'hyperparameters'"
    if method:
        hyper, found = checked_hyperparameters(method, {**nested, **rest}, RunConfig.model_fields)
        own["hyperparameters"] = hyper
        problems |= found
    config, found = validated(RunConfig, own)
    problems |= {key: text for key, text in found.items() if key not in problems}
    if isinstance(config, RunConfig):
        problems |= contradictions(config)
    if problems or not isinstance(config, RunConfig):
        raise UsageError("\n".join(located(problems, source, lines or {})))
    return config.model_copy(update=TASKS[config.task].settled(config.model_dump()))


def contradictions(config: RunConfig) -> dict[str, str]:
    """Return the problems of keys that are right by themselves and wrong together."""
    problems = task_problems(config.model_dump())
    if abs(sum(config.split) - 1) > 1e-6:
        total = f"{sum(config.split):g}"
        problems["split"] = f"'split' must add up to 1; {config.split} adds up to {total}"
    elif config.split[0] == 0:
        problems["split"] = f"'split' {config.split} leaves nothing to train on"
    if config.resume and config.overwrite:
        problems["resume"] = "'resume' and 'overwrite' exclude each other; give one of them"
    if config.text and (config.prompt or config.completion):
        problems["text"] = (
            "'text' trains on a whole column, so it excludes 'prompt' and 'completion'"
        )
    elif bool(config.prompt) != bool(config.completion) and TASKS[config.task].rows != "prompt":
        given, lacking = ("prompt", "completion") if config.prompt else ("completion", "prompt")
        problems[given] = f"{given!r} needs {lacking!r} beside it; name both, or neither"
    if config.format != "auto" and (config.text or config.prompt or config.completion):
        problems["format"] = "'format' and named columns exclude each other; give one of them"
    return problems


def parsed_overrides(overrides: Mapping[str, object], method: str) -> dict[str, object]:
    """Return overrides with the text of flags turned into values; None means not given."""
    given = {k: v for k, v in overrides.items() if v is not None}
    name = str(given.get("method", method))
    known = {flag.key: flag for flag in flags()}
    if name in catalog():
        known |= {flag.key: flag for flag in method_flags(name)}
    return {k: from_text(known[k], v) if k in known else v for k, v in given.items()}
