"""The models of the GPU measurements: random weights, built where they are used, and adapted.

Every contestant of a case builds the same weights from the same seed. A 70B model is never dense:
its NF4 layers are made of random packed bytes, one after another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import inlay
from benchmarks.lib.shapes import ALPHA, RANK, Config, shape_config
from benchmarks.lib.turns import SkippedError
from inlay.storage.nf4 import NF4Linear
from inlay.storage.nf4_blocks import BLOCK, NESTED_BLOCK, dynamic_map

SPREAD = 0.02
"""Standard deviation of the random weights."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Spec = Mapping[str, Any]
"""What a worker is told: shape, layers, tokens, storage, device, policy, seed, ..."""


def config_of(spec: Spec) -> Config:
    """Return the configuration of a shape, perhaps with fewer layers."""
    return shape_config(spec["shape"], spec.get("layers"))


def dense(spec: Spec) -> nn.Module:
    """Return a bf16 model of random weights on the device."""
    torch.manual_seed(spec["seed"])
    with torch.device(spec["device"]):
        model = AutoModelForCausalLM.from_config(config_of(spec), dtype=torch.bfloat16)
    return model.to(spec["device"])


def packed(spec: Spec, place: str) -> nn.Module:
    """Return a model of random NF4 layers, head included, on `place`; nothing is ever dense."""
    torch.manual_seed(spec["seed"])
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config_of(spec), dtype=torch.bfloat16)
    device = torch.device(spec["device"])
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, random_nf4(*layer.weight.shape, device).to(place))
        elif isinstance(layer, nn.Embedding):
            table = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device=device)
            layer.weight = nn.Parameter(table.normal_(std=SPREAD).to(place))
        elif "norm" in name.rsplit(".", 1)[-1]:
            layer.weight = nn.Parameter(torch.ones_like(layer.weight, device=place))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(place)
    return model


def random_nf4(rows: int, columns: int, device: torch.device) -> NF4Linear:
    """Return a doubly quantised layer of random bytes, its weights about SPREAD."""
    blocks = rows * columns // BLOCK
    outer = -(-blocks // NESTED_BLOCK)
    return NF4Linear(
        (rows, columns),
        torch.bfloat16,
        None,
        weight=random_bytes(rows * columns // 2, device).unsqueeze(1),
        absmax=random_bytes(blocks, device),
        nested_absmax=torch.full((outer,), SPREAD, device=device),
        nested_quant_map=dynamic_map(device).clone(),
        nested_offset=torch.tensor(2 * SPREAD, device=device),
    )


def random_bytes(count: int, device: torch.device) -> Tensor:
    """Return random bytes."""
    return torch.randint(256, (count,), dtype=torch.uint8, device=device)


def attached(model: nn.Module, spec: Spec) -> nn.Module:
    """Attach our LoRA to every linear layer of the blocks and keep what the policy says."""
    inlay.attach(model, inlay.LoRA(rank=RANK, alpha=ALPHA))
    if spec["policy"] != "keep-all":
        try:
            from inlay.memory import policy
        except ModuleNotFoundError:
            raise SkippedError("not available in this version: inlay.memory.policy") from None
        policy.apply(model, spec["policy"])
    return model


def ours(spec: Spec) -> nn.Module:
    """Inlay on a plain transformers model, as the README does."""
    model = dense(spec)
    if spec["storage"] == "nf4":
        inlay.quantize(model, "nf4")
    return attached(model, spec)


def ours_in_8_bits(spec: Spec) -> nn.Module:
    """The same, the frozen products computed in FP8."""
    switch: Any = getattr(inlay, "compute_in_8_bits", None)
    if switch is None:
        raise SkippedError("not available in this version: inlay.compute_in_8_bits")
    model = ours(spec)
    switch(model)
    return model


def ours_packed(spec: Spec) -> nn.Module:
    """Inlay on random NF4 layers, all on the GPU but the embedding's table, of which rows are read.

    The head is NF4 too.
    """
    model: Any = packed(spec, spec["device"])
    table = model.model.embed_tokens
    if spec["device"] != "cpu":
        table.to("cpu")
        table.register_forward_pre_hook(lambda _, inputs: tuple(ids.cpu() for ids in inputs))
        table.register_forward_hook(lambda _, __, rows: rows.to(spec["device"]))
    return attached(model, spec)


def ours_streamed(spec: Spec) -> nn.Module:
    """Inlay with the frozen layers in host memory, brought to the GPU just ahead of use."""
    stream: Any = getattr(inlay, "stream", None)
    if stream is None:
        raise SkippedError("not available in this version: inlay.stream")
    return attached(stream(packed(spec, "cpu"), spec["device"]), spec)


def peft(spec: Spec) -> nn.Module:
    """HF peft, keeping all activations: its fastest."""
    from peft import LoraConfig, get_peft_model

    model: Any = bitsandbytes(spec) if spec["storage"] == "nf4" else dense(spec)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )  # fmt: skip
    return get_peft_model(model, lora)


def peft_recomputing(spec: Spec) -> nn.Module:
    """HF peft with gradient checkpointing, as TRL sets it up."""
    model: Any = peft(spec)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def peft_liger(spec: Spec) -> nn.Module:
    """HF peft, keeping all, with Liger's norms, RoPE, SwiGLU and fused loss."""
    installed("liger_kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model: Any = peft(spec)
    _apply_liger_kernel_to_instance(model=model.get_base_model())
    return model


def peft_liger_recomputing(spec: Spec) -> nn.Module:
    """The same with gradient checkpointing."""
    model: Any = peft_liger(spec)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def peft_compiled(spec: Spec) -> nn.Module:
    """HF peft under torch.compile."""
    model: Any = peft(spec)
    model.compile()
    return model


def bitsandbytes(spec: Spec) -> nn.Module:
    """Return the dense model with bitsandbytes' NF4 layers, doubly quantised, computing in bf16.

    A 70B shape is too large to build dense: its peers run on fewer layers.
    """
    installed("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit

    model: Any = dense(spec)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
            bias = layer.bias is not None
            new: Any = Linear4bit(
                layer.in_features, layer.out_features, bias, torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            new.weight = Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=True,
                quant_type="nf4", module=new,
            )  # fmt: skip
            new.bias = layer.bias
            model.set_submodule(name, new.to(spec["device"]))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def unsloth(spec: Spec) -> nn.Module:
    """Unsloth, which loads from a folder, with its own checkpointing."""
    installed("unsloth")
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        dense(spec).save_pretrained(folder)
        inlay.load("pocket")[1].save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=spec["tokens"], dtype=torch.bfloat16,
            load_in_4bit=spec["storage"] == "nf4", local_files_only=True,
        )  # fmt: skip
        return FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS, lora_dropout=0,
            bias="none", use_gradient_checkpointing="unsloth",
        )  # fmt: skip


def installed(package: str) -> None:
    """Raise unless a peer's package is there."""
    if find_spec(package) is None:
        raise SkippedError(f"not installed: {package}")


BUILDERS: dict[str, Callable[[Spec], nn.Module]] = {
    "inlay": ours,
    "inlay, 8-bit compute": ours_in_8_bits,
    "inlay, packed": ours_packed,
    "inlay, streamed": ours_streamed,
    "peft": peft,
    "peft, recomputing": peft_recomputing,
    "peft + TRL": peft,
    "peft + Liger": peft_liger,
    "peft + Liger, recomputing": peft_liger_recomputing,
    "peft, compiled": peft_compiled,
    "unsloth": unsloth,
}
"""Contestant -> how it builds its model; `peft + TRL` leaves the loop to TRL's trainer."""
