"""Adapters act on models that accelerate has dispatched or offloaded, and in own forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, hooks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.model.adapters.registry import adapter_places

IDS = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(3))
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
MAP: dict[str, Any] = dict.fromkeys((*PARTS, "model.rotary_emb", "lm_head"), "cpu")
CPU = torch.device("cpu")


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).eval()


def on_devices(model: Any, folder: Path) -> Any:
    del folder
    return dispatch_model(model, MAP, force_hooks=True)


def one_block_on_disk(model: Any, folder: Path) -> Any:
    places = {**MAP, "model.layers.1": "disk"}
    return dispatch_model(model, places, "cpu", offload_dir=folder / "disk", force_hooks=True)


def in_host_memory(model: Any, folder: Path) -> Any:
    del folder
    return cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder / "disk"), execution_device=CPU)


WAYS = {f.__name__: f for f in (on_devices, one_block_on_disk, in_host_memory, on_disk)}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (inlay.LoRA(rank=4), {"targets": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    "dora": (inlay.DoRA(rank=2), {"modules_to_save": ["lm_head"]}),
    "bottleneck": (inlay.Bottleneck(), {}),
    "norms": (inlay.NormTuning(), {}),
}


def moved(model: Any) -> Any:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for p in params.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model: Any) -> list[Tensor]:
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    places = [params for _, params in adapter_places(model.eval(), "default")]
    found = [p.grad for params in places for p in params.parameters()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


def instance_forwards(model: nn.Module) -> list[tuple[str, Any, Any]]:
    return [
        (name, vars(m)["_hf_hook"], getattr(vars(m)["_old_forward"], "__func__", None))
        for name, m in model.named_modules()
        if "_hf_hook" in vars(m)
    ]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_adapter_acts_before_and_after_dispatch(
    method: tuple[Any, dict[str, Any]], way: Callable[..., Any], tmp_path: Path
) -> None:
    base = logits(llama())
    plain = moved(inlay.attach(llama(), method[0], **method[1]))
    inlay.save_adapter(plain, tmp_path / "adapter")
    wanted, slopes = logits(plain), gradients(plain)
    assert not torch.allclose(wanted, base, atol=1e-2)
    hooked = way(llama(), tmp_path / "one")
    before = instance_forwards(hooked)
    inlay.load_adapter(hooked, tmp_path / "adapter")
    attached_first = way(inlay.load_adapter(llama(), tmp_path / "adapter"), tmp_path / "two")
    for model in (hooked, attached_first):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
        for one, other in zip(gradients(model), slopes, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        inlay.save_adapter(model, tmp_path / "again")
        inlay.detach(model)
        torch.testing.assert_close(logits(model), base, atol=0, rtol=0)
    assert instance_forwards(hooked) == before


def test_a_merge_keeps_hooks_and_refuses_what_is_away(tmp_path: Path) -> None:
    model = moved(inlay.attach(on_devices(llama(), tmp_path), inlay.LoRA(rank=2)))
    adapted, hooked = logits(model), len(instance_forwards(model))
    inlay.merge(model)
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=1e-3)
    assert len(instance_forwards(model)) == hooked
    away = moved(inlay.attach(in_host_memory(llama(), tmp_path), inlay.LoRA(rank=2)))
    with pytest.raises(inlay.MergeError, match="offloaded"):
        inlay.merge(away)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def doubled(layer: nn.Module) -> Any:
    before = layer.forward
    return lambda x: 2 * before(x)


def by_default(layer: nn.Module) -> Any:
    def forward(x: Tensor, before: Any = layer.forward) -> Tensor:
        return 2 * before(x)

    return forward


def bound(layer: nn.Module) -> Any:
    return functools.partial(hooks_like, layer.forward)


def hooks_like(before: Any, x: Tensor) -> Tensor:
    return 2 * before(x)


WRAPPERS = {f.__name__: f for f in (doubled, by_default, bound)}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("storage", ["dense", "int8"])
def test_an_adapter_acts_inside_an_instances_forward(wrap: Any, storage: str) -> None:
    model, x = inlay.quantize(Net(), storage), torch.randn(3, 64)
    base = model(x)
    layer: Any = model.layer
    layer.forward = own = wrap(layer)
    if storage != "dense" and wrap is bound:  # a positional argument of a partial is not looked at
        with pytest.raises(inlay.AdapterError, match="a forward of its own instance"):
            inlay.attach(model, inlay.LoRA(rank=2))
        return
    moved(inlay.attach(model, inlay.LoRA(rank=2)))
    delta = layer.adapted_weight()[0] - layer.base.dequantize()
    torch.testing.assert_close(model(x), 2 * (base + x @ delta.T), atol=1e-4, rtol=1e-4)
    model(x).sum().backward()
    inlay.detach(model)
    assert layer.forward is own
    torch.testing.assert_close(model(x), 2 * base)


def test_a_forward_that_leads_nowhere_is_refused() -> None:
    model = inlay.quantize(Net(), "int8")
    model.layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(inlay.AdapterError, match="layer has a forward of its own instance"):
        inlay.attach(model, inlay.LoRA(rank=2))


def test_accelerate_still_has_what_the_seam_reads() -> None:
    layer = nn.Linear(2, 2)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(CPU))
    assert {"_hf_hook", "_old_forward", "forward"} <= vars(layer).keys()
    for name, wanted in (
        ("pre_forward", "module"),
        ("post_forward", "module"),
        ("detach_hook", "module"),
    ):
        assert wanted in inspect.signature(getattr(hooks.AlignDevicesHook, name)).parameters
    assert hooks.AlignDevicesHook(CPU).execution_device == CPU
