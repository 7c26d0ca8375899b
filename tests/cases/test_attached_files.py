"""What is written of a model with adapters: the adapter, never the base under its name."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import inlay
from inlay.errors import AdapterError, CheckpointError
from inlay.model.adapters.registry import adapter_places
from inlay.model.seams.transformers import RESUMES, TAKES_BEST

IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained of a model with adapters")


def llama(tie: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tie, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(model: Any, name: str = "default") -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for _, params in adapter_places(model, name):
            for p in params.parameters():
                p += 0.05 * torch.randn_like(p)
    return model


def made(**options: Any) -> Any:
    return moved(inlay.attach(llama(), inlay.LoRA(rank=4), **options))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def test_save_pretrained_writes_the_adapter(tmp_path: Path) -> None:
    model = made()
    with pytest.warns(UserWarning, match=r"writes the adapter alone, .*inlay\.merge"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(inlay.load_adapter(llama(), tmp_path)), logits(model))
    with pytest.raises(AdapterError, match="was given made_up=3"):
        model.save_pretrained(tmp_path, made_up=3)
    inlay.detach(model)
    model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_several_adapters_lie_as_hf_peft_lays_them(tmp_path: Path) -> None:
    model = moved(inlay.attach(made(), inlay.LoRA(rank=2), name="b"), "b")
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "b" / "adapter_config.json").exists()
    model.set_adapter("b")
    assert (model.active_adapters(), list(model.active_adapters)) == (["b"], ["b"])


def test_values_that_a_library_gathered_are_written(tmp_path: Path) -> None:
    model = made()
    state = {f"_orig_mod.{key}": value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    inlay.save_adapter(model, tmp_path / "own")
    given, own = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("given", "own"))
    assert all(torch.equal(given[key], 2 * own[key]) for key in own)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=3e-2, use_cpu=True, seed=1,
        report_to=[], disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="constant", **options,
    )  # fmt: skip


ROWS = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]


def test_trainers_checkpoints_resume_and_its_model_is_the_adapter(tmp_path: Path) -> None:
    whole = made()
    Trainer(
        whole, arguments(tmp_path / "a", max_steps=4, save_strategy="no"), train_dataset=ROWS
    ).train()
    first = made()
    half = arguments(tmp_path / "b", max_steps=2, save_steps=2)
    Trainer(first, half, train_dataset=ROWS).train()
    resumed = made()
    rest = arguments(tmp_path / "b", max_steps=4, save_steps=100)
    trainer = Trainer(resumed, rest, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), atol=1e-5, rtol=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = inlay.load_adapter(llama(), tmp_path / "saved")
    assert torch.equal(logits(again), logits(resumed))


def test_trainer_takes_the_best_model(tmp_path: Path) -> None:
    model = inlay.attach(
        llama(tie=True), inlay.LoRA(rank=4), modules_to_save=["embed_tokens", "lm_head"]
    )
    options = arguments(
        tmp_path, max_steps=2, save_steps=1, eval_steps=1, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = inlay.load_adapter(llama(tie=True), tmp_path / "checkpoint-1")
    assert torch.equal(logits(model.eval()), logits(best))


def test_trainer_has_the_methods_that_are_followed() -> None:
    model = made()
    for name in (RESUMES, TAKES_BEST):
        assert inspect.unwrap(vars(Trainer)[name]) is not vars(Trainer)[name]
    assert [*inspect.signature(inspect.unwrap(vars(Trainer)[RESUMES])).parameters] == [
        "self", "resume_from_checkpoint", "model",
    ]  # fmt: skip
    assert [*inspect.signature(inspect.unwrap(vars(Trainer)[TAKES_BEST])).parameters] == ["self"]
    inlay.detach(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_a_copy_is_a_model_of_its_own(how: str, tmp_path: Path) -> None:
    model = made()
    before = logits(model)
    if how == "torch":
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        again = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), before)
    assert type(again) is type(model)
    again.save_pretrained(tmp_path / "copy")
    inlay.detach(again)
    assert type(again) is LlamaForCausalLM
    assert torch.equal(logits(again), logits(llama()))
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(inlay.load_adapter(llama(), tmp_path / "copy")), before)


# Adapters as people have them.


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = inlay.save_adapter(made(), tmp_path_factory.mktemp("own"))
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def inside(word: str) -> Any:
    return lambda key: PREFIX + word + key.removeprefix(PREFIX)


def named(key: str) -> str:
    return key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")


RENAMES: dict[str, Any] = {
    "as it is": lambda key: key,
    "compiled": inside("_orig_mod."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "parallel inside": inside("module._orig_mod."),
    "regions": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "twice": inside(PREFIX),
    "in memory": named,
    "body": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
}


def folder_of(where: Path, config: dict[str, Any], tensors: dict[str, Any], binary: bool) -> Path:
    where.mkdir()
    (where / "adapter_config.json").write_text(json.dumps(config))
    if binary:
        torch.save(tensors, where / "adapter_model.bin")
    else:
        save_file(tensors, where / "adapter_model.safetensors")
    return where


@pytest.mark.parametrize("name", RENAMES)
def test_keys_of_other_writers_are_converted(name: str, own: Any, tmp_path: Path) -> None:
    config, tensors = own
    renamed = {RENAMES[name](key): value.clone() for key, value in tensors.items()}
    folder = folder_of(tmp_path / "x", config, renamed, binary=name in ("parallel", "as it is"))
    if name == "as it is":
        model = inlay.load_adapter(llama(), folder)
    else:
        with pytest.warns(UserWarning, match="was converted to this model's names"):
            model = inlay.load_adapter(llama(), folder)
    assert torch.equal(logits(model), logits(made()))


def test_a_key_of_no_place_is_refused_as_it_is(own: Any, tmp_path: Path) -> None:
    tensors = {key.replace("layers.", "blocks."): value for key, value in own[1].items()}
    with pytest.raises(CheckpointError, match=r"not used by it: .*blocks"):
        inlay.load_adapter(llama(), folder_of(tmp_path / "x", own[0], tensors, binary=False))


def test_newer_options_that_are_off_are_named(own: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", own[0] | {"of_the_future": None}, own[1], binary=False)
    with pytest.warns(UserWarning, match=r"does not know \(of_the_future\)"):
        inlay.load_adapter(llama(), folder)


def test_an_adapter_of_the_whole_model_on_its_body(own: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", *own, binary=False)
    with pytest.warns(UserWarning, match="was converted"):
        body = inlay.load_adapter(llama().model, folder)
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS)[0] for m in (body, made().model))
    assert torch.equal(found, wanted)


def test_a_whole_state_of_hf_peft_in_memory(own: Any, tmp_path: Path) -> None:
    config, tensors = own
    state = {named(key): value for key, value in tensors.items()}
    for key, value in llama().state_dict().items():
        at = key.replace(".weight", ".base_layer.weight") if "proj" in key else key
        state[PREFIX + at] = value
    folder = folder_of(tmp_path / "x", config, {"state_dict": state}, binary=True)
    with pytest.warns(UserWarning, match="was converted"):
        model = inlay.load_adapter(llama(), folder)
    assert torch.equal(logits(model), logits(made()))


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_bin_that_needs_code_is_refused_with_the_line_that_converts(
    own: Any, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    folder = folder_of(tmp_path / "x", own[0], {"a": Code(ran)}, binary=True)
    with pytest.raises(CheckpointError, match=r"more than tensors.*python -c .*save_file"):
        inlay.load_adapter(llama(), folder)
    assert not ran.exists()


# Wrappers.


def test_verbs_look_through_wrappers(tmp_path: Path) -> None:
    wrapped = torch.nn.DataParallel(torch.compile(llama(), backend="eager"))
    assert inlay.attach(wrapped, inlay.LoRA(rank=4)) is wrapped
    moved(wrapped)
    model: Any = wrapped.module._orig_mod  # pyright: ignore
    inlay.save_adapter(wrapped, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith(f"{PREFIX}model.layers.") for key in keys)
    other = torch.nn.DataParallel(llama())
    inlay.load_adapter(other, tmp_path)
    assert torch.equal(logits(other.module), logits(model))
    assert inlay.report(wrapped).trainable == inlay.report(model).trainable
    with inlay.disabled(wrapped):
        base = logits(model)
    assert torch.equal(base, logits(llama()))
    before = logits(model)
    assert inlay.merge(wrapped).layers == 14
    torch.testing.assert_close(logits(model), before)
    assert inlay.detach(other) is other


def test_regions_that_are_compiled_are_looked_through(tmp_path: Path) -> None:
    model = llama()
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    moved(inlay.attach(model, inlay.LoRA(rank=4)))
    inlay.save_adapter(model, tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "_orig" in k]
    assert torch.equal(logits(inlay.load_adapter(llama(), tmp_path)), logits(made()))


def test_names_that_transformers_has_changed_since(tmp_path: Path) -> None:
    """LLaVA's language model lay at `language_model.model` until transformers 4.52."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "num_key_value_heads": 2,
    }  # fmt: skip
    image = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "image_size": 32, "patch_size": 8,
    }  # fmt: skip

    def llava() -> Any:
        torch.manual_seed(0)
        config = LlavaConfig(
            text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**image),
            image_token_index=63,
        )  # fmt: skip
        return LlavaForConditionalGeneration(config).eval()

    model = moved(inlay.attach(llava(), inlay.LoRA(rank=2), targets=["q_proj"]))
    folder = inlay.save_adapter(model, tmp_path / "new")
    config = json.loads((folder / "adapter_config.json").read_text())
    new = load_file(folder / "adapter_model.safetensors")
    before = {
        f"{PREFIX}model.language_model.": f"{PREFIX}language_model.model.",
        f"{PREFIX}model.vision_tower.": f"{PREFIX}vision_tower.",
    }
    old = dict(new)
    for now, then in before.items():
        old = {key.replace(now, then): value for key, value in old.items()}
    assert f"{PREFIX}language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in old
    config["target_modules"] = r"language_model\.model\..*q_proj|vision_tower\..*q_proj"
    with pytest.warns(UserWarning, match="was converted"):
        again = inlay.load_adapter(llava(), folder_of(tmp_path / "old", config, old, binary=False))
    ids = IDS.clamp(max=60)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
