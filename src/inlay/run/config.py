"""The keys of a run that every task knows; a task's own keys stand in a subclass beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    StringConstraints,
)

from inlay.storage.table import StorageName

Text = Annotated[str, StringConstraints(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def as_word(value: object) -> object:
    """Return the word that YAML takes for a truth value: `stream: off`."""
    return "off" if value is False else value


class RunConfig(BaseModel):
    """What defines a training run of any task. Build one with `inlay.tasks.config.load_config`.

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


class RunWithImages(RunConfig):
    """The keys of a run whose rows may have images."""

    max_pixels: PositiveInt | None = Field(
        None, description="rows with images: maximum pixels of an image; larger images are shrunk"
    )
    allow_urls: bool | None = Field(
        False, description="rows with images: fetch images that are given as a URL; default: off"
    )
    cache_vision: Literal["auto"] | bool = Field(
        "auto",
        description="rows with images: run a frozen vision tower and projector once per row and "
        "keep their output; default auto: over several epochs",
    )


def beta(default: float) -> Any:
    return Field(
        default,
        description="dpo, kto, grpo: how strongly the tuned model is kept near the base; orpo: "
        "weight of the odds-ratio loss; default 0.1, for grpo 0",
    )
