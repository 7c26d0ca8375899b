"""What we touch of TRL that it may rename or change: its hooks, in one place.

`tests/model/test_seams.py` holds each hook to the signature that we expect. Modules of TRL are
imported where they are needed: a run of one task does not import the trainers of the others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inlay.data.chat import own_template

HOOKS: dict[str, dict[str, tuple[str, ...]]] = {
    "Trainer": {
        "_clip_grad_norm": ("model",),
        "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
        "_get_train_sampler": ("train_dataset",),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_load_rng_state": ("checkpoint",),
        "_move_model_to_device": ("model", "device"),
        "_save_checkpoint": ("model", "trial"),
    },
    "DPOTrainer": {
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    },
    "KTOTrainer": {
        "_compute_kl_logps": ("model", "batch"),
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "_get_train_sampler": ("train_dataset",),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    },
    "GRPOTrainer": {
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_compute_loss": ("model", "inputs"),
        "_generate_and_score_completions": ("inputs",),
        "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
        "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask"),
        "_get_train_sampler": ("dataset",),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_tokenize_prompts": ("prompts",),
    },
}
"""A trainer -> its private methods that Inlay's trainers override -> their first parameters.

`_save_checkpoint`, which every trainer of TRL has for itself, stands once.
"""


def score_by_fused_head(model: nn.Module, **asked: Any) -> None:
    """Let TRL put its forward on a model that answers `fused_lm_head=True` with scores."""
    from trl.trainer.utils import add_fused_lm_head

    given: Any = model
    add_fused_lm_head(given, **asked)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's version of the chat template that marks the assistant's words.

    None when the tokenizer's own does, or when TRL does not know it; the assistant's words are
    then found by what each turn adds.
    """
    from trl.chat_template_utils import get_training_chat_template

    if own_template(tokenizer) != tokenizer.chat_template:
        return None  # one of several, which TRL does not look among
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


@contextmanager
def checkpointing_left_on() -> Generator[None]:
    """Keep GRPO's trainer from switching activation checkpointing off for its rollouts."""
    from trl.trainer import grpo_trainer

    trl: Any = grpo_trainer
    before = trl.disable_gradient_checkpointing
    trl.disable_gradient_checkpointing = lambda *model: nullcontext()
    try:
        yield
    finally:
        trl.disable_gradient_checkpointing = before


@contextmanager
def unhashed(module: Any) -> Generator[None]:
    """Spare a trainer of TRL the hash of every weight: it names a file that we do not write."""
    before = module.hash_module
    module.hash_module = lambda model: ""
    try:
        yield
    finally:
        module.hash_module = before


@contextmanager
def as_trl_expects(model: PreTrainedModel) -> Generator[None]:
    """Let TRL take a quantised model with adapters of ours, and leave their fp32 alone.

    Trainer wants adapters of HF PEFT on a quantised model; TRL casts what trains there to bf16.
    """
    shown = {"_hf_peft_config_loaded": True, "is_loaded_in_4bit": False, "is_loaded_in_8bit": False}
    before = {name: vars(model)[name] for name in shown if name in vars(model)}
    vars(model).update(shown)
    try:
        yield
    finally:
        for name in shown:
            del vars(model)[name]
        vars(model).update(before)


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Generator[None]:
    """Undo, after training, what the trainers change on the model beside the adapter.

    Its configurations are whole again, too: a trainer may ask for router logits, which generation
    cannot do with, or align special tokens.
    """
    forward, training = vars(model).get("forward"), model.training
    said = [(part, dict(vars(part))) for part in configurations(model)]
    dropouts = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if forward is not None:
            vars(model)["forward"] = forward
        for part, settings in said:
            vars(part).clear()
            vars(part).update(settings)
        model.train(training)
        for module, share in dropouts.items():
            module.p = share


def configurations(model: PreTrainedModel) -> Iterator[object]:
    """Yield a model's configuration, those inside it, and how it generates."""
    waiting: list[object] = [model.config, getattr(model, "generation_config", None)]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PreTrainedConfig | GenerationConfig):
            yield part
            waiting.extend(vars(part).values())
