"""The initial values of a new adapter: those that HF PEFT draws from the same seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    PeftConfig,
    PromptEncoder,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
)
from torch import Tensor, nn
from transformers import AutoTokenizer

from inlay.checkpoint.layouts import Layout
from inlay.checkpoint.slots import slots
from inlay.methods.base import Kind, LowRank, Method, PromptMethod
from inlay.methods.models import input_embedding, token_rows
from inlay.methods.params import Params
from inlay.model.adapters.places import module_at, view_at
from inlay.model.adapters.registry import adapter_tensors
from inlay.peft.configs import options_of
from inlay.peft.errors import AdapterError
from inlay.storage.base import FrozenLinear
from inlay.storage.parameters import JOINED

Options = dict[str, Any]
Place = tuple[str, Params, Method | None, Kind | None]
"""A place of an adapter: its name, tensors, method and kind."""

ENCODER = (
    "num_virtual_tokens", "num_transformer_submodules", "token_dim", "inference_mode",
    "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
)  # fmt: skip
"""The options that HF PEFT's prompt encoder reads."""
TRUST = "trust_remote_code"
"""An option of tokenizers that no configuration may turn on."""


@dataclass(frozen=True)
class Drawing:
    model: nn.Module
    place: str
    params: Params
    method: Method
    kind: Kind | None
    options: Options
    layouts: dict[tuple[int, str], Layout]

    @property
    def base(self) -> FrozenLinear:
        found = view_at(self.model, self.place)
        assert found is not None
        return found

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Copy a value into a tensor, through the dtype of a dense base as HF PEFT does."""
        tensor.copy_(value.to(self.base.dtype) if self.base.storage == "dense" else value)


@torch.no_grad()
def draw_initial_values(model: nn.Module, name: str, config: PeftConfig) -> None:
    """Draw the initial values in HF PEFT's order: one torch seed gives the same adapter."""
    options = options_of(config)
    draw = DRAWS.get(options["peft_type"])
    if draw is None:
        return
    layouts = {(id(s.home), s.name): s.layout for s in slots(model, name)}
    for place, params, method, layer_kind in in_order(model, name):
        if method is not None:
            draw(Drawing(model, place, params, method, layer_kind, options, layouts))


def in_order(model: nn.Module, name: str) -> Iterator[Place]:
    """Yield an adapter's places in HF PEFT's order; it draws attention outputs twice."""
    found = list(adapter_tensors(model, name))
    last: list[Place] = []
    for each in found:
        module, parameter = module_at(model, each[0])
        if parameter == JOINED and isinstance(module, nn.MultiheadAttention):
            below = each[0].removesuffix(JOINED) + "out_proj"
            yield from (other for other in found if other[0] == below)
        if parameter is None or parameter == JOINED:
            yield each
        else:
            last.append(each)
    yield from last


def draw_lora(at: Drawing) -> None:
    """Draw A and B of one layer; DoRA's magnitudes are the row norms that they give."""
    assert isinstance(at.method, LowRank)
    p = at.params
    draw = drawn_for_embedding if at.kind == "embedding" else drawn_for_linear
    of_a, of_b = at.layouts[id(p), "A"], at.layouts[id(p), "B"]
    how = at.options["init_lora_weights"]
    a, b = draw(of_a.written(p.A).shape, of_b.written(p.B).shape, how)
    at.put(p.A, of_a.read(a))
    at.put(p.B, of_b.read(b))
    if "magnitude" in p._parameters and bool(p.B.any()) and bool(p.A.any()):
        v = at.base.dequantize().to(p.A.dtype) + at.method.scale * (p.B @ p.A)
        p.magnitude.copy_(torch.linalg.vector_norm(v, dim=1))


def drawn_for_linear(a: torch.Size, b: torch.Size, how: bool | str) -> tuple[Tensor, Tensor]:
    """Draw A and B as two new `nn.Linear`, then again as `init_lora_weights` says."""
    first = [torch.empty(a), torch.empty(b)]
    for value in first:
        nn.init.kaiming_uniform_(value, a=math.sqrt(5))
    if how is False:
        return first[0], first[1]
    if how == "gaussian":
        return nn.init.normal_(first[0], std=1 / a[0]), torch.zeros(b)
    return nn.init.kaiming_uniform_(first[0], a=math.sqrt(5)), torch.zeros(b)


def drawn_for_embedding(a: torch.Size, b: torch.Size, how: bool | str) -> tuple[Tensor, Tensor]:
    """Draw A and B of an embedding: both normal, then A zero and B drawn again, gaussian or not."""
    first = torch.randn(a), torch.randn(b)
    if how is False:
        return first
    return torch.zeros(a), torch.randn(b)


def draw_ia3(at: Drawing) -> None:
    drawn = torch.randn(at.params.l.shape)
    at.put(at.params.l, torch.ones_like(drawn) if at.options["init_ia3_weights"] else drawn)


def draw_prompt(at: Drawing) -> None:
    assert isinstance(at.method, PromptMethod)
    (tensor,) = (getattr(at.params, name) for name in at.params.names())
    drawn = torch.randn(tensor.shape)
    how = at.options.get("prompt_tuning_init", at.options.get("init_weights"))
    if how == "zero":
        drawn = torch.zeros(tensor.shape)
    elif how in ("SAMPLE_VOCAB", "TEXT") and not at.options["inference_mode"]:
        embedding = input_embedding(at.model)
        tokens, rows = at.method.rows, embedding.num_embeddings
        sampled = how == "SAMPLE_VOCAB"
        ids = torch.randint(0, rows, (tokens,)) if sampled else text_ids(tokens, rows, at.options)
        drawn = token_rows(embedding, ids)
    tensor.copy_(drawn)


def text_ids(tokens: int, rows: int, options: Options) -> Tensor:
    rest = {k: v for k, v in (options["tokenizer_kwargs"] or {}).items() if k != TRUST}
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer_name_or_path"], **rest)
    ids: list[int] = tokenizer(options["prompt_tuning_init_text"])["input_ids"]
    if not ids or max(ids) >= rows:
        raise AdapterError(
            f"prompt_tuning_init_text {options['prompt_tuning_init_text']!r} gives no ids of this "
            f"model's vocabulary of {rows} with the tokenizer {options['tokenizer_name_or_path']}; "
            "name the model's own tokenizer and a text"
        )
    return torch.tensor([ids[i % len(ids)] for i in range(tokens)])


def draw_encoder(at: Drawing) -> None:
    kind = PromptEncoderReparameterizationType(at.options["encoder_reparameterization_type"])
    if at.options["encoder_dropout"] and kind == "MLP":
        warnings.warn(
            "encoder_dropout is ignored by HF PEFT's MLP prompt encoder, and so it is here; choose "
            "encoder_reparameterization_type='LSTM', or leave it out",
            stacklevel=2,
        )
    config = PromptEncoderConfig(**{k: v for k, v in at.options.items() if k in ENCODER})
    config.encoder_reparameterization_type = kind
    drawn = PromptEncoder(config).state_dict().values()
    for name, value in zip(at.params.names(), drawn, strict=True):
        getattr(at.params, name).copy_(value)


DRAWS: dict[str, Callable[[Drawing], None]] = {
    "LORA": draw_lora,
    "IA3": draw_ia3,
    "PREFIX_TUNING": draw_prompt,
    "PROMPT_TUNING": draw_prompt,
    "P_TUNING": draw_encoder,
}
