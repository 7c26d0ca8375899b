"""The measured shapes, their random weights, and the minimum work of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import inlay

QWENS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    },
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
}  # fmt: skip
"""The shapes of Qwen2.5-0.5B and -1.5B, with tied embeddings."""
LLAMAS: dict[str, dict[str, int]] = {
    "tiny llama": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
"""The shapes of Llama 3."""

RANK, ALPHA = 16, 32
Config = Qwen2Config | LlamaConfig


class Product(NamedTuple):
    """A kind of matrix product: `count` weights of (rows, columns) in the model."""

    rows: int
    columns: int
    count: int

    @property
    def parameters(self) -> int:
        """The parameters of all its weights."""
        return self.rows * self.columns * self.count


def shape_config(shape: str, layers: int | None = None, vocab: int | None = None) -> Config:
    """Return a shape's configuration, perhaps with fewer layers or a smaller vocabulary."""
    asked: dict[str, Any] = {"num_hidden_layers": layers, "vocab_size": vocab}
    changed = {name: value for name, value in asked.items() if value}
    if shape in LLAMAS:
        return LlamaConfig(
            **LLAMAS[shape] | changed, max_position_embeddings=131_072, rope_theta=500_000.0
        )
    return Qwen2Config(
        **QWENS[shape] | changed, max_position_embeddings=32_768, tie_word_embeddings=True
    )


def save_base(config: Config, folder: Path, seed: int = 0) -> None:
    """Write a base model of random bf16 weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def save_start(base: Path, folder: Path, rank: int = RANK, seed: int = 0) -> None:
    """Write the adapter that every contestant starts from."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    inlay.attach(model, inlay.LoRA(rank=rank, alpha=ALPHA), seed=seed)
    inlay.save_adapter(model, folder, base_model=str(base))


def layer_products(config: Config) -> list[Product]:
    """Return the products of the blocks: q and o, k and v, gate and up, down."""
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d // config.num_attention_heads * config.num_key_value_heads
    return [
        Product(d, d, 2 * layers),
        Product(kv, d, 2 * layers),
        Product(config.intermediate_size, d, 2 * layers),
        Product(d, config.intermediate_size, layers),
    ]


def head_product(config: Config) -> Product:
    """Return the product of the output head."""
    return Product(config.vocab_size, config.hidden_size, 1)


def lora_parameters(config: Config, rank: int = RANK) -> int:
    """Count the parameters of a LoRA on every linear layer of the blocks."""
    return sum(rank * (p.rows + p.columns) * p.count for p in layer_products(config))


def floor_flops(config: Config, tokens: int, rank: int = RANK) -> float:
    """Return the minimum FLOP of an exact step on one sequence with a label at every token.

    A token takes 4P + 4H + 3.5 * 2LdS + 6 * (LoRA parameters): P of the blocks, H of the head, L
    layers of width d, S tokens; the frozen weights have no gradient, so 4 and not 6.
    """
    linear = sum(product.parameters for product in layer_products(config))
    attention = 2 * config.num_hidden_layers * config.hidden_size * tokens
    head = head_product(config).parameters
    per_token = 4 * linear + 4 * head + 3.5 * attention + 6 * lora_parameters(config, rank)
    return float(per_token * tokens)
