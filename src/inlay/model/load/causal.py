"""What a checkpoint's class is for: whether it writes text, as tasks without a head need."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from inlay.errors import InlayError, ModelError, first_line
from inlay.methods.base import evaluating
from inlay.model.load.pretrained import model_class
from inlay.model.merge.fidelity import first_tensor

ROW = 12
"""Tokens of the row that a model is tried on."""
MOVED = {True: 1e-4, False: 0.02}
"""How far a word's logits may move when a later word changes, in full precision or less."""
PYTHON = (
    "inlay.attach, inlay.save_adapter and inlay.merge work on it in Python, with a training loop "
    "of your own"
)
CHOOSE = "choose a causal language model, such as one of type llama, qwen3 or gpt2"
OTHERS: dict[str, tuple[str, str]] = {
    "SEQUENCE_CLASSIFICATION": ("gives a class for a whole row", "give --task classify"),
    "TOKEN_CLASSIFICATION": ("gives a class for each token", "give --task classify"),
    "MASKED_LM": (
        "fills in masked words from both sides",
        "give --task classify or embed, which put a head on it, or " + CHOOSE,
    ),
    "QUESTION_ANSWERING": ("marks an answer in a text", PYTHON),
    "IMAGE_CLASSIFICATION": ("gives a class for an image", PYTHON),
    "CTC": ("spells out sound", PYTHON),
    "AUDIO_CLASSIFICATION": ("gives a class for a sound", PYTHON),
    "": (
        "has no head that writes text",
        "give --task classify, reward or embed, which put a head on it, or " + CHOOSE,
    ),
}
"""Mapping of transformers' -> what its classes do, and what to do with one."""


def check_writes(config: PreTrainedConfig) -> None:
    made_as = model_class(config)
    if not (isinstance(made_as, type) and issubclass(made_as, PreTrainedModel)):
        return
    name, kind = made_as.__name__, f"a {config.model_type} model"
    check_one_text(name, config)
    if not made_as.can_generate():
        does, instead = OTHERS[purpose_of(name)]
        raise ModelError(
            f"{name}, {kind}, {does}, while this task trains models that continue text; {instead}"
        )
    missing = needs(made_as)
    if missing:
        raise ModelError(
            f"{name} takes {' and '.join(missing)} with every row, and rows of text have none; "
            f"{CHOOSE}, or {PYTHON}"
        )


def check_one_text(name: str, config: Any) -> None:
    """Raise for an encoder-decoder, whose answer does not continue its input."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder: a source goes into its encoder, and an answer comes "
            f"from its decoder, while this works on models that continue their own text; "
            f"{CHOOSE}, or {PYTHON}"
        )


def purpose_of(class_name: str) -> str:
    """Return the first mapping of `OTHERS` that names a class; the last one is the rest."""
    for mapping in OTHERS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        if class_name in names.values():
            return mapping
    return ""


def needs(made_as: type[PreTrainedModel]) -> list[str]:
    given = inspect.signature(made_as.forward).parameters.values()
    return [
        p.name
        for p in given
        if p.default is p.empty
        and p.kind is p.POSITIONAL_OR_KEYWORD
        and p.name not in ("self", "input_ids")
    ]


def check_continues(model: nn.Module) -> None:
    """Raise unless a model takes text alone and is causal: else the loss teaches it to copy."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    name = type(model).__name__
    row = torch.arange(ROW) % (max(int(config.get_text_config().vocab_size), 5) - 4) + 2
    other = row.clone()
    other[-1] = row[0]
    try:
        first, second = (logits(model, ids) for ids in (row, other))
    except InlayError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} cannot be run on a row of text alone ({type(error).__name__}: "
            f"{first_line(error)}); {CHOOSE}, or {PYTHON}"
        ) from error
    full = first.dtype in (torch.float32, torch.float64)
    moved = float((first - second)[:, :-1].abs().max() / first.abs().max().clamp_min(1e-6))
    if moved > MOVED[full]:
        raise ModelError(
            f"in {name} a word sees the words behind it (its logits move by {moved:.2g} of the "
            "largest when the last word changes), so that training on the next word would teach "
            'it to copy; set "is_decoder": true in its config.json if it was trained as a '
            f"decoder, give --task classify or embed, or {CHOOSE}"
        )


def logits(model: Any, ids: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        device = next(model.parameters()).device
        return first_tensor(model(input_ids=ids[None].to(device), use_cache=False))
