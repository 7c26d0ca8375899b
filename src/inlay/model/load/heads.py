"""A model's head: what stands on the last hidden states in place of the language model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from inlay.errors import ModelError
from inlay.kernels.loss import IGNORED
from inlay.model.seams.transformers import initialise_weights, mark_initialised

Purpose = Literal["sequence", "tokens", "embedding"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

MAPPINGS: dict[Purpose, Any] = {
    "sequence": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "tokens": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "embedding": MODEL_MAPPING,
}
"""What a head is for -> transformers' classes for it, by a model's configuration."""
SINGLE = ("LABEL_0",)
"""What transformers calls the one output of a regression or a reward model."""
POOLER = "pooler"
"""What encoders call the layer on their first token, which some checkpoints do not hold."""
NEW = "inlay_new_modules"


@dataclass(frozen=True)
class Head:
    """What a model gives: classes of a row or of its tokens, a number, or the hidden states alone.

    Args:
        purpose: `sequence` for one output a row, `tokens` for one a token, `embedding` for none.
        labels: the classes in the order of the outputs; one for a number, none for `embedding`.
        problem: what the outputs of a row mean, in transformers' words.
        seed: of a new head's initial values.
    """

    purpose: Purpose
    labels: tuple[str, ...] = SINGLE
    problem: Problem | None = None
    seed: int = 0

    def described(self) -> dict[str, object]:
        """Return the head as an adapter's folder describes it."""
        labels = [] if self.purpose == "embedding" else list(self.labels)
        return {"purpose": self.purpose, "labels": labels, "problem": self.problem}


def head_from(saved: Mapping[str, Any], where: str) -> Head:
    purpose: Any = saved.get("purpose")
    labels: Any = saved.get("labels")
    problem: Any = saved.get("problem")
    known = purpose in get_args(Purpose) and (problem is None or problem in get_args(Problem))
    if not known or not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise ModelError(f"{where} does not describe a head of this version; it is damaged")
    return Head(purpose, tuple(labels), problem)


def head_of(model: nn.Module) -> Head | None:
    if not isinstance(model, PreTrainedModel):
        return None
    for purpose, mapping in MAPPINGS.items():
        cls = mapping.get(type(model.config), None)
        if isinstance(cls, type) and isinstance(model, cls):
            labels = () if purpose == "embedding" else labels_in(model.config)
            return Head(purpose, labels, getattr(model.config, "problem_type", None))
    return None


def labels_in(config: PreTrainedConfig) -> tuple[str, ...]:
    names: Any = config.id2label or {}
    return tuple(str(names[number]) for number in sorted(names))


def class_with(config: PreTrainedConfig, head: Head) -> type[PreTrainedModel]:
    cls = MAPPINGS[head.purpose].get(type(config), None)
    if cls is None:
        raise ModelError(
            f"transformers has no model of type {config.model_type!r} for {head.purpose!r}; "
            "choose another model or another task"
        )
    return cls[0] if isinstance(cls, tuple) else cls


def configured(config: PreTrainedConfig, head: Head) -> bool:
    """Write a head's labels into a configuration; say whether the checkpoint's own head is kept.

    It is kept where it gives the same classes in the same order.
    """
    if head.purpose == "embedding":
        return True
    kept = (
        class_with(config, head).__name__ in (config.architectures or ())
        and labels_in(config) == head.labels
    )
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: number for number, label in enumerate(head.labels)}
    config.problem_type = head.problem
    return kept


def head_modules(model: nn.Module) -> tuple[str, ...]:
    head = head_of(model)
    if head is None or head.purpose == "embedding":
        return ()
    base = getattr(model, "base_model_prefix", "")
    children = model.named_children()
    return tuple(n for n, m in children if n != base and any(True for _ in m.parameters()))


def to_train(model: nn.Module) -> tuple[str, ...]:
    """Return the modules that train whole: the head, and others that the checkpoint lacked."""
    heads = head_modules(model)
    return tuple(dict.fromkeys((*heads, *model.__dict__.get(NEW, ())))) if heads else ()


def not_adapted(model: nn.Module) -> tuple[str, ...]:
    """Return the layers that no method should go to.

    They train whole because the checkpoint lacks them, or, as a pooler beside hidden states that
    are pooled otherwise, take no part in what the model is used for.
    """
    head = head_of(model)
    if head is None:
        return ()
    if head.purpose != "embedding":
        return model.__dict__.get(NEW, ())
    return tuple(name for name, m in model.named_modules() if POOLER in name.split(".") and owns(m))


def owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def check_head_complete(
    model: PreTrainedModel, folder: object, report: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Return the parameters that the checkpoint lacks; raise unless they are the head's alone."""
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    new = sorted({*report["missing_keys"], *mismatched})
    heads = head_modules(model)
    lacking = [
        key for key in new if key.split(".")[0] not in heads and POOLER not in key.split(".")
    ]
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} weights of the model below its head, such as "
            f"{lacking[0]}; they would be random. The checkpoint is incomplete or of another "
            "architecture"
        )
    left = [key for key in sorted(report["unexpected_keys"]) if has_block(key)]
    if left:
        raise ModelError(
            f"{folder} holds {len(left)} weights that the model has no place for, such as "
            f"{left[0]}; its config.json describes another architecture"
        )
    return new


def has_block(key: str) -> bool:
    return any(part.isdigit() for part in key.split("."))


@torch.no_grad()
def initialise(model: PreTrainedModel, new: Sequence[str], kept: bool, seed: int) -> None:
    """Initialise parameters from the seed; a head with other classes is new at any shape."""
    heads = head_modules(model)
    own = [n for n, _ in model.named_parameters() if not kept and n.split(".")[0] in heads]
    names = sorted({name.rpartition(".")[0] for name in (*new, *own)})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in names:
            module = model.get_submodule(name)
            for tensor in (module, *module.parameters()):
                mark_initialised(tensor, False)
            initialise_weights(model, module)
    model.__dict__[NEW] = tuple(name for name in names if name.split(".")[0] not in heads)


def head_loss(
    head: Head, logits: Tensor, labels: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Return a head's loss, as transformers defines it: the mean over rows, or over tagged tokens.

    Args:
        head: what the outputs mean.
        logits: (rows, classes), or (rows, tokens, classes) of a head on tokens.
        labels: (rows), (rows, classes), or (rows, tokens) with -100 where nothing is predicted.
        count: what the sum over tokens is divided by; default: how many are tagged.
    """
    logits = logits.float()
    if head.purpose == "tokens":
        flat = logits.flatten(0, 1), labels.flatten()
        return F.cross_entropy(*flat, reduction="sum") / (
            (labels != IGNORED).sum() if count is None else count
        )
    if head.problem == "single_label_classification":
        return F.cross_entropy(logits, labels)
    if head.problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits.squeeze(-1), labels)


def pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give model and tokenizer the same padding token, by default the end token.

    A causal model's row is read at its last token that is not this one.
    """
    known: Any = tokenizer
    if known.pad_token_id is None:
        if known.eos_token is None:
            raise ModelError(
                "the tokenizer has neither a padding token nor an end token, so that rows of "
                "different lengths cannot share a batch; set pad_token in tokenizer_config.json"
            )
        known.pad_token = known.eos_token
    model.config.get_text_config().pad_token_id = known.pad_token_id
