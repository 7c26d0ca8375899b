"""P-tuning: the model reads [E'; x], E' = W3 relu(W2 relu(W1 E + b1) + b2) + b3."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.methods.base import (
    Kind,
    Method,
    Params,
    PromptMethod,
    checked_positive,
    checked_probability,
    stored,
    without_autocast,
)
from inlay.methods.models import input_embedding, table_of

COMPUTED = "prompt_embeddings"
"""HF PEFT's key of E'."""


class Trained(NamedTuple):
    """A tensor's shape, the bound of its uniform start (0: unit normal), its key in the file."""

    shape: tuple[int, ...]
    bound: float
    key: str


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Virtual tokens whose embeddings a small network computes: the prompt encoder.

    E (tokens, width) and the encoder train; the frozen model reads E' = encoder(E) before every
    sequence. The `MLP` has W1 (size, width), W2 (size, size), W3 (width, size) and biases; the
    `LSTM` is `encoder_layers` bidirectional layers of `size`, with `dropout` between them, then
    W2 relu(W1 h + b1) + b2 with W1 (2 size, 2 size) and W2 (width, 2 size). `size` is the width
    unless given. The MLP trains tokens * width + 2 size * width + size * size + 2 size + width
    parameters. E starts from a unit normal, the encoder as torch's layers do; attaching changes
    the outputs. With `submodules` E has as many times `tokens` rows, as HF PEFT has for an
    encoder-decoder (2), whose encoder reads the first `tokens`. Its learning rate is 4 times
    LoRA's. A folder holds E, the encoder and, for HF PEFT, E'. HF PEFT's own folders hold E'
    alone: such an adapter is `finished`, has no encoder, and E' itself trains.
    Paper: arXiv 2103.10385.

    Raises:
        AdapterError: tokens, size or encoder_layers not positive, an unknown encoder, dropout or
            layers given for an MLP.

    >>> from transformers import LlamaConfig
    >>> PTuning(tokens=8, size=16).count_for(LlamaConfig(hidden_size=64))
    2912
    """

    tokens: int = 32
    encoder: Literal["MLP", "LSTM"] = "MLP"
    size: int | None = None
    encoder_layers: int = 2
    dropout: float = 0.0
    finished: bool = False
    submodules: int | None = None

    name = "p-tuning"
    paper = "2103.10385"
    learning_rate_factor = 4.0
    peft_type = "P_TUNING"
    peft_keys = {
        "tokens": "num_virtual_tokens",
        "encoder": "encoder_reparameterization_type",
        "size": "encoder_hidden_size",
        "encoder_layers": "encoder_num_layers",
        "dropout": "encoder_dropout",
        "submodules": "num_transformer_submodules",
    }

    def __post_init__(self) -> None:
        checked_positive(self.tokens, "tokens")
        checked_positive(self.submodules or 1, "submodules")
        checked_positive(self.encoder_layers, "encoder_layers")
        checked_probability(self.dropout, "dropout")
        if self.size is not None:
            checked_positive(self.size, "size")
        if self.encoder not in ("MLP", "LSTM"):
            raise AdapterError(f"encoder must be 'MLP' or 'LSTM', not {self.encoder!r}")
        if self.encoder == "MLP" and (self.encoder_layers != 2 or self.dropout):
            raise AdapterError("encoder_layers and dropout go with encoder='LSTM'")

    def tensors(self, width: int) -> dict[str, Trained]:
        """Return every trained tensor, in the order of HF PEFT's modules."""
        if self.finished:
            return {"embeddings": Trained((self.rows, width), 0.0, COMPUTED)}
        found = {"E": Trained((self.rows, width), 0.0, "prompt_encoder.embedding.weight")}
        size = self.size or width
        widths = (width, size, size, width)
        if self.encoder == "LSTM":
            widths = (2 * size, 2 * size, width)
            for layer, end in product(range(self.encoder_layers), ("", "_reverse")):
                ih, hh = (4 * size, 2 * size if layer else width), (4 * size, size)
                shapes = {"weight_ih": ih, "weight_hh": hh, "bias_ih": ih[:1], "bias_hh": hh[:1]}
                for name, shape in shapes.items():
                    key = f"prompt_encoder.lstm_head.{name}_l{layer}{end}"
                    found[f"{name}_l{layer}{end}"] = Trained(shape, size**-0.5, key)
        for n, (read, written) in enumerate(pairwise(widths), 1):
            key = f"prompt_encoder.mlp_head.{2 * n - 2}"
            found[f"W{n}"] = Trained((written, read), read**-0.5, f"{key}.weight")
            found[f"b{n}"] = Trained((written,), read**-0.5, f"{key}.bias")
        return found

    def init(self, model: nn.Module, seed: torch.Generator) -> Params:
        embedding, trained = input_embedding(model), dict[str, Tensor]()
        for name, (shape, bound, _) in self.tensors(embedding.embedding_dim).items():
            drawn = torch.empty(shape)
            if bound:
                drawn.uniform_(-bound, bound, generator=seed)
            else:
                drawn.normal_(generator=seed)
            trained[name] = stored(table_of(embedding), *shape).copy_(drawn)
        return Params(trained)

    def count_for(self, config: Any) -> int:
        width = config.get_text_config(decoder=True).hidden_size
        return sum(math.prod(each.shape) for each in self.tensors(width).values())

    @property
    def has_embeddings(self) -> bool:
        return True

    def embeddings(self, p: Params) -> Tensor:
        return self.prompt(p, p.training)

    @without_autocast
    def prompt(self, p: Params, training: bool) -> Tensor:
        """DEFINITION: E', (tokens, width)."""
        if self.finished:
            return p.embeddings
        h = p.E
        if self.encoder == "LSTM":
            weights = [getattr(p, n) for n in p.names() if n.startswith(("weight", "bias"))]
            start = h.new_zeros(2 * self.encoder_layers, 1, weights[1].shape[1])
            layers, dropout = self.encoder_layers, self.dropout
            given = (weights, True, layers, dropout, training, True, True)
            h = torch.lstm(h[None], (start, start), *given)[0][0]
        for n in range(1, 4 if self.encoder == "MLP" else 3):
            h = F.linear(h if n == 1 else h.relu(), getattr(p, f"W{n}"), getattr(p, f"b{n}"))
        return h

    def computed(self, p: Params) -> Mapping[str, Tensor]:
        return {} if self.finished else {COMPUTED: self.prompt(p, False)}

    def held_in(self, keys: Collection[str]) -> PTuning:
        encoder = any(key.startswith("prompt_encoder.") for key in keys)
        return dataclasses.replace(self, finished=not encoder)

    @classmethod
    def from_peft(cls, config: Mapping[str, object]) -> Method:
        mlp = config.get("encoder_reparameterization_type") != "LSTM"
        unread = ("encoder_num_layers", "encoder_dropout") if mlp else ()
        return super().from_peft({k: v for k, v in config.items() if k not in unread})

    def peft_tensors(self, kind: Kind) -> dict[str, str]:
        return {name: each.key for name, each in self.tensors(1).items()}
