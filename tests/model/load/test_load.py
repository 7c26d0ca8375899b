"""Loading: the embedded base, folders, and every way in which a folder can be wrong."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
)

from inlay.errors import ModelError, StorageError
from inlay.model.load.folder import EMBEDDED
from inlay.model.load.pretrained import load
from inlay.model.load.quantize import quantize
from inlay.storage.int8 import Int8Linear
from inlay.storage.nf4 import NF4Linear

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
WIDTHS = {"hidden_size": 40, "intermediate_size": 98, "vocab_size": 99}
GPT2 = {"n_embd": 36, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 32}


def built(name: str) -> PreTrainedModel:
    """A tiny model whose widths are no multiples of 64, with biases that are not zero."""
    model = tiny(name, GPT2, HEADS | WIDTHS)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama"])
@pytest.mark.parametrize(("storage", "double_quant"), [
    ("dense", True), ("nf4", True), ("nf4", False), ("int8", True),
])  # fmt: skip
def test_quantised_while_read_equals_quantised_in_memory(
    folders: dict[str, Path], name: str, storage: str, double_quant: bool
) -> None:
    loaded, tokenizer = load(str(folders[name]), storage, double_quant=double_quant)
    expected = quantize(built(name), storage, double_quant=double_quant)
    found = loaded.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[n], t) for n, t in expected.state_dict().items())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert tokenizer("a finding").input_ids
    if name == "qwen2":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_saved_and_loaded_again_is_bit_equal(
    folders: dict[str, Path], tmp_path: Path, name: str, storage: str
) -> None:
    first, tokenizer = load(str(folders[name]), storage)
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    kinds = {type(m) for m in again.modules()} & {NF4Linear, Int8Linear}
    assert {k.storage for k in kinds} == ({storage} - {"dense"})
    found = again.state_dict()
    assert all(torch.equal(found[n], t) for n, t in first.state_dict().items())


def test_several_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    built("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    for file in folders["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, _ = load(str(tmp_path), "nf4")
    expected = quantize(built("llama")).state_dict()
    assert all(torch.equal(expected[n], t) for n, t in loaded.state_dict().items())
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002.*which model.safetensors.index.json"):
        load(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        load(str(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_dtype(folders: dict[str, Path], storage: str, dtype: str | torch.dtype) -> None:
    loaded, _ = load(str(folders["llama"]), storage, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {wanted}
    expected = quantize(built("llama").to(wanted), storage)
    found = loaded.state_dict()
    assert all(torch.equal(found[n], t) for n, t in expected.state_dict().items())
    assert loaded(torch.arange(6).view(1, 6)).logits.dtype == wanted


def test_pocket() -> None:
    loaded, tokenizer = load("pocket", "nf4")
    assert loaded.config._name_or_path == "pocket"
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, NF4Linear)
    ids = tokenizer("The", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3


def test_what_is_loaded_trains_in_transformers(folders: dict[str, Path]) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    loaded, _ = load(str(folders["llama"]), "nf4")
    validate_quantization_for_training(loaded)
    loaded.enable_input_require_grads()
    loaded(torch.arange(6).view(1, 6)).logits.sum().backward()
    assert loaded.to(torch.bfloat16).dtype == torch.bfloat16


def test_verbosity_is_given_back(folders: dict[str, Path]) -> None:
    level = logging.getLogger("transformers").level
    load(str(folders["llama"]))
    assert logging.getLogger("transformers").level == level


@pytest.mark.slow
def test_without_bitsandbytes_and_without_a_word(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded, tokenizer = load(str(folders["llama"]), "nf4")
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; "
        "from inlay.model.load.pretrained import load; "
        "load(sys.argv[1]); load(sys.argv[2]); load(sys.argv[2], 'int8')"
    )
    run = [sys.executable, "-c", code, str(tmp_path), str(folders["llama"])]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def refused(folder: Path | str, said: str, storage: str = "dense") -> None:
    with pytest.raises(ModelError, match=said) as caught:
        load(str(folder), storage)
    assert "\n" not in str(caught.value)


def test_no_such_model(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "there is no folder")
    refused("nobody/nothing-of-that-name", "neither a folder nor reachable on the hub")
    refused("pocke", "Did you mean 'pocket'")
    refused("", "neither|no folder|no config")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file; a model is a folder")


def test_missing_files(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    refused(llama, "has no tokenizer")
    (llama / "model.safetensors").unlink()
    refused(llama, "holds neither model.safetensors nor")
    torch.save({}, llama / "pytorch_model.bin")
    refused(llama, r"pytorch_model.bin, and only safetensors is read, because .* can run code")
    (llama / "config.json").unlink()
    refused(llama, "has no config.json")
    (llama / "adapter_config.json").write_text("{}")
    refused(llama, "holds an adapter; give the model it was trained on")


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_weights(llama: Path, cut: int, storage: str) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(llama, r"model.safetensors is truncated or damaged", storage)


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_incomplete_or_foreign_weights(llama: Path, storage: str) -> None:
    file = llama / "model.safetensors"
    whole = load_file(file)
    one = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != one}, file, {"format": "pt"})
    refused(llama, rf"lacks 1 of the model's weights, such as {one}", storage)
    save_file({**whole, "model.surplus.weight": torch.zeros(2)}, file, {"format": "pt"})
    refused(llama, "holds 1 weights that the model has no place for", storage)
    save_file({**whole, one: torch.zeros(3, 40)}, file, {"format": "pt"})
    refused(llama, "shape|mismatch|ignore_mismatched_sizes", storage)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_weight_that_is_not_finite(llama: Path, storage: str) -> None:
    file = llama / "model.safetensors"
    whole = load_file(file)
    whole["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(whole, file, {"format": "pt"})
    with pytest.raises(
        StorageError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds a NaN"
    ):
        load(str(llama), storage)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": 3}', "\ufffd"]
)
def test_damaged_configuration(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    refused(llama, "configuration|weights")


def test_configuration_of_another_shape(llama: Path) -> None:
    said = json.loads((llama / "config.json").read_text())
    for key, value in [("hidden_size", 48), ("num_hidden_layers", 3), ("hidden_size", "x")]:
        (llama / "config.json").write_text(json.dumps({**said, key: value}))
        for storage in ("dense", "nf4"):
            refused(llama, "weights|configuration|shape", storage)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_configuration_that_names_no_known_class(llama: Path, storage: str) -> None:
    said = json.loads((llama / "config.json").read_text())
    for architectures in (["Nothing"], None):
        (llama / "config.json").write_text(json.dumps({**said, "architectures": architectures}))
        assert isinstance(load(str(llama), storage)[0], LlamaForCausalLM)


def test_damaged_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    refused(llama, "the tokenizer in .* cannot be used")


def test_other_quantisations_are_refused(llama: Path, tmp_path: Path) -> None:
    said = json.loads((llama / "config.json").read_text())
    fp4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    for quantization, name in [({"quant_method": "gptq", "bits": 4}, "gptq"), (fp4, "fp4")]:
        (llama / "config.json").write_text(
            json.dumps({**said, "quantization_config": quantization})
        )
        refused(llama, f"is quantised with {name}")
    packed, tokenizer = load(str(EMBEDDED["pocket"]), "nf4")
    packed.save_pretrained(tmp_path / "nf4")
    tokenizer.save_pretrained(tmp_path / "nf4")
    refused(tmp_path / "nf4", "is held in nf4 already, so it cannot be loaded as int8", "int8")
    load(str(tmp_path / "nf4"), "nf4")


def test_damaged_packed_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    packed, tokenizer = load(str(folders["llama"]), "nf4")
    packed.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    layer = "model.layers.1.mlp.up_proj"
    state = f"{layer}.weight.quant_state.bitsandbytes__nf4"
    for name, value in [
        (state, torch.zeros(3, dtype=torch.uint8)),
        (state, None),
        (f"{layer}.weight.absmax", None),
        (f"{layer}.weight", whole[f"{layer}.weight"][:-1].clone()),
        ("model.norm.weight", torch.zeros(3)),
    ]:
        broken = {k: v for k, v in {**whole, name: value}.items() if v is not None}
        save_file(broken, file, {"format": "pt"})
        with pytest.raises(ModelError, match=r"model\.norm: |model\.layers\.1\.mlp\.up_proj"):
            load(str(tmp_path))


def test_bad_words() -> None:
    with pytest.raises(StorageError, match="Did you mean 'nf4'"):
        load("pocket", "nf44")
    with pytest.raises(ModelError, match="Did you mean 'bfloat16'"):
        load("pocket", dtype="bfloat")
    with pytest.raises(ModelError, match="dtype must be"):
        load("pocket", dtype=torch.int8)
    with pytest.raises(ModelError, match="no device 'toaster'"):
        load("pocket", device="toaster")
    with pytest.raises(ModelError, match="device 'cuda:99' was asked for"):
        load("pocket", device="cuda:99")


def test_deepcopy_of_a_loaded_model(folders: dict[str, Path]) -> None:
    loaded, _ = load(str(folders["llama"]), "nf4")
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(copy.deepcopy(loaded)(ids).logits, loaded(ids).logits)
    assert isinstance(loaded.lm_head, nn.Linear)
