"""A run's base with its adapter on it: loaded with values, or built without for the plan."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from inlay.memory.devices import Device
from inlay.memory.skeleton import skeleton
from inlay.methods.base import Method
from inlay.methods.catalog import build_method
from inlay.model.adapters.attach import attach
from inlay.model.adapters.tokens import ids_of
from inlay.model.load.eight_bits import compute_in_8_bits
from inlay.model.load.heads import Head, not_adapted, to_train
from inlay.model.load.pretrained import load
from inlay.model.load.vision import tokenizer_in
from inlay.run.config import RunConfig


def load_adapted(
    config: RunConfig, method: Method, head: Head | None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run's base and put its adapter on it."""
    model, reader = load(
        config.model,
        config.storage,
        double_quant=config.double_quant,
        head_storage=config.head_storage,
        embedding_storage=config.embedding_storage,
        dtype=config.dtype,
        device=device,
        stream=config.stream,
        revision=config.revision,
        head=head,
    )
    tokenizer = tokenizer_in(reader)
    attach(
        model,
        method,
        targets=config.targets,
        exclude=[*config.exclude, *not_adapted(model)],
        layers=config.layers,
        modules_to_save=[*config.modules_to_save, *to_train(model)],
        trainable_tokens=ids_of(config.trainable_tokens, tokenizer),
        seed=config.seed,
    )
    return model, tokenizer


def built(
    shape: PreTrainedConfig, config: RunConfig, device: Device, head: Head | None = None
) -> nn.Module:
    """Build the run's model without values, adapted and ready to train."""
    model = skeleton(
        shape,
        config.storage,
        double_quant=config.double_quant,
        dtype=config.dtype,
        head=head,
        head_storage=config.head_storage,
        embedding_on_device=config.embedding_storage == "dense" or device.kind == "cpu",
    )
    attach(
        model,
        build_method(config.method, config.hyperparameters),
        targets=config.targets,
        exclude=[*config.exclude, *not_adapted(model)],
        layers=config.layers,
        modules_to_save=[*config.modules_to_save, *to_train(model)],
        trainable_tokens=range(len(set(config.trainable_tokens))),  # which ones costs the same
    )
    return (compute_in_8_bits(model) if config.eight_bits else model).train()
