"""Each method's forward, in eval and in training, against the same tensors in HF PEFT."""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from inlay.checkpoint.adapter import load_adapter
from inlay.methods.base import Method
from inlay.methods.dora import DoRA
from inlay.methods.ia3 import IA3
from inlay.methods.lora import LoRA
from inlay.methods.norms import NormTuning
from inlay.methods.prefix import PrefixTuning
from inlay.methods.prompt import PromptTuning
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapter_places

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # peft reads what transformers renamed
    "ignore:Unsupported layer type.*RMSNorm:UserWarning",  # peft's norm tuning says so of any
)
IDS = torch.arange(12).view(2, 6)
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
            attention_bias=True,
        )
    ).eval()  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=61, initializer_range=0.15,
            bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    ).eval()  # fmt: skip


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def peft_model(base: Any, config: Any) -> Any:
    """A model adapted by HF PEFT, its tensors moved away from where they started."""
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def with_their_tensors(base: Any, method: Method, theirs: Any, **where: Any) -> Any:
    """Attach our method with HF PEFT's tensors."""
    attach(base, method, **where)
    state = peft.get_peft_model_state_dict(theirs)
    used = set()
    for name, params in adapter_places(base, "default"):
        for ours, key in method.peft_tensors("linear").items():
            if ours in dict(params.named_parameters()):
                whole = f"base_model.model.{name}.{key}" if name else key
                getattr(params, ours).data.copy_(state[whole])
                used.add(whole)
    assert used == set(state)
    return base.eval()


CASES: dict[str, tuple[Any, Any, Method, dict[str, Any]]] = {
    "dora": (
        llama,
        peft.LoraConfig(**LORA, use_dora=True),
        DoRA(rank=4, alpha=6),
        {"targets": ["q_proj", "up_proj"]},
    ),
    "dora-rslora": (
        llama,
        peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
        DoRA(rank=4, alpha=6, rslora=True),
        {"targets": ["q_proj", "up_proj"]},
    ),
    "ia3-llama": (llama, peft.IA3Config(task_type="CAUSAL_LM"), IA3(), {}),
    "ia3-gpt2": (gpt2, peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True), IA3(), {}),
    "norms": (
        llama,
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=r".*norm"),
        NormTuning(),
        {},
    ),
    "prefix-llama": (
        llama,
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuning(tokens=3),
        {},
    ),
    "prefix-gpt2": (
        gpt2,
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuning(tokens=3),
        {},
    ),
    "prompt-llama": (
        llama,
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptTuning(tokens=3),
        {},
    ),
    "prompt-gpt2": (
        gpt2,
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptTuning(tokens=3),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_are_pefts(case: str, padded: bool) -> None:
    build, config, method, where = CASES[case]
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, 4:] = 0
    theirs = peft_model(build(), config)
    ours = with_their_tensors(build(), method, theirs, **where)
    wanted = logits(theirs, attention_mask=mask)[:, -IDS.shape[1] :][mask.bool()]
    got = logits(ours, attention_mask=mask)[mask.bool()]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, logits(build(), attention_mask=mask)[mask.bool()], atol=1e-3)


def test_dora_drops_out_as_peft_does() -> None:
    """The same seed drops the same inputs, so that training outputs agree too."""
    config = peft.LoraConfig(**{**LORA, "target_modules": ["up_proj"]}, use_dora=True)
    config.lora_dropout = 0.3
    theirs = peft_model(llama(), config)
    ours = with_their_tensors(
        llama(), DoRA(rank=4, alpha=6, dropout=0.3), theirs, targets="up_proj"
    )
    outputs = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(5)
        outputs.append(logits(model))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], logits(ours.eval()), atol=1e-3)


@pytest.mark.parametrize("feedforward", [["down_proj"], r".*\.down_proj", None])
def test_ia3_reads_pefts_feedforward(feedforward: Any) -> None:
    method = IA3.from_peft({"feedforward_modules": feedforward})
    down = method.for_layer("model.layers.0.mlp.down_proj")
    assert down.scales_input == bool(feedforward)
    assert not method.for_layer("model.layers.0.self_attn.k_proj").scales_input


def test_ia3_written_for_peft_names_the_same_layers() -> None:
    again = IA3.from_peft(IA3().to_peft())
    for name in ("layers.0.mlp.down_proj", "h.0.mlp.c_proj", "layer.0.output.dense"):
        assert again.for_layer(name).scales_input
    for name in ("layers.0.self_attn.v_proj", "layer.0.attention.output.dense"):
        assert not again.for_layer(name).scales_input


def test_ia3_takes_a_word_for_any_ending_as_peft_does() -> None:
    """HF PEFT's feed-forward words end a name, within a component too."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        named = {"k_proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8), "proj": nn.Linear(8, 8)}
        return nn.Sequential(OrderedDict(named))

    config = peft.IA3Config(
        target_modules=["k_proj", "up_proj", "proj"], feedforward_modules=["proj"]
    )
    x = torch.randn(3, 8)
    theirs = peft_model(base(), config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_adapter(base(), folder)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dora_leaves_a_row_of_zeros_one() -> None:
    """Pruned and padded rows have no direction: the weight and the forward pass agree on them."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data[1] = 0
    model: Any = attach(nn.Sequential(layer), DoRA(rank=2))
    x = torch.randn(3, 4)
    weight, _ = model[0].adapted_weight()
    torch.testing.assert_close(model(x), x @ weight.T)
    torch.testing.assert_close(weight, layer.weight)


@pytest.mark.parametrize("dora", [False, True])
def test_a_padding_token_gets_no_gradient_as_in_peft(dora: bool) -> None:
    base = nn.Sequential(nn.Embedding(9, 6, padding_idx=2))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=dora)
    theirs = peft_model(copy.deepcopy(base), config)
    method = (DoRA if dora else LoRA)(rank=2, alpha=4)
    attach(base, method, targets=["0"])
    (_, params), state = next(adapter_places(base, "default")), dict(theirs.named_parameters())
    for ours, key in {"A": "lora_embedding_A", "B": "lora_embedding_B"}.items():
        own = next(p for name, p in state.items() if key in name)
        getattr(params, ours).data.copy_(own)
    ids = torch.tensor([[1, 2, 8, 2]])
    for model in (base, theirs):
        model(ids).square().sum().backward()
    own = next(p for name, p in state.items() if "lora_embedding_A" in name)
    assert params.A.grad is not None
    assert not params.A.grad[:, 2].any()
    assert params.A.grad.any()
    if not dora:
        torch.testing.assert_close(params.A.grad, own.grad)
