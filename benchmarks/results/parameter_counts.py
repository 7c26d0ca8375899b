"""Count what each method trains on pocket's, an 8B and a 70B shape, on the meta device.

python -m benchmarks.results.parameter_counts
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import inlay
from benchmarks.lib.machine import write
from inlay.methods.base import Method
from inlay.model.adapters.report import report
from inlay.model.load.folder import EMBEDDED

SHAPES = {
    "pocket": AutoConfig.from_pretrained(EMBEDDED["pocket"]),
    "8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
METHODS: dict[str, Method] = {
    "LoRA r16, all linear": inlay.LoRA(rank=16),
    "LoRA r16, attention and MLP outputs": inlay.LoRA(rank=16),
    "LoRA r4, query and value": inlay.LoRA(rank=4),
    "DoRA r16, all linear": inlay.DoRA(rank=16),
    "IA3": inlay.IA3(),
    "bottleneck, Houlsby, size 64": inlay.Bottleneck(variant="houlsby", size=64),
    "bottleneck, Pfeiffer, size 64": inlay.Bottleneck(variant="pfeiffer", size=64),
    "prefix, 16 tokens": inlay.PrefixTuning(tokens=16),
    "prompt, 16 tokens": inlay.PromptTuning(tokens=16),
    "norms": inlay.NormTuning(),
    "full": inlay.Full(),
}
TARGETS = {
    "LoRA r16, attention and MLP outputs": "residual",
    "LoRA r4, query and value": ("q_proj", "v_proj"),
}


def main() -> None:
    """Attach every method to every shape and write the counts."""
    rows = []
    for shape, config in SHAPES.items():
        for label, method in METHODS.items():
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            inlay.attach(model, method, targets=TARGETS.get(label))
            found = report(model)
            row = {"shape": shape, "method": label, "trained": found.trainable}
            rows.append(row | {"base": found.total, "percent": round(found.percent, 4)})
            print(f"{shape:7} {label:38} {found.trainable:>15,} {found.percent:9.4f} %")
    print(write("parameter_counts", {"rows": rows}))


if __name__ == "__main__":
    main()
