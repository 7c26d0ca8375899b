"""What a model that sees images is made of, found by structure, and how it is held and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from vision_tiny import FAMILIES, make_vision_model

import inlay
from inlay.errors import ModelError, TargetError
from inlay.model.adapters.targets import adaptable_kinds, find_targets
from inlay.model.load.pretrained import load
from inlay.model.load.vision import parts_of
from inlay.storage.registry import kind

PROJECTORS = {
    "llava": {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"},
    "qwen2_5_vl": {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"},
    "qwen3_vl": {
        f"model.visual.{place}.linear_fc{n}"
        for place in ("merger", "deepstack_merger_list.0")
        for n in (1, 2)
    },
    "idefics3": {"model.connector.modality_projection.proj"},
    "smolvlm": {"model.connector.modality_projection.proj"},
    "gemma3": set(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("vision")
    return {family: make_vision_model(place / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_and_cover_every_linear_layer(folders: dict[str, Path], family: str):
    model, processor = load(str(folders[family]))
    assert type(processor).__name__.endswith("Processor")
    parts = parts_of(model)
    linear = {n: parts.get(n) for n, m in model.named_modules() if kind(m) == "linear"}
    assert set(linear.values()) <= {"language", "vision", "projector"}
    assert {n for n, part in linear.items() if part == "projector"} == PROJECTORS[family]
    assert linear["lm_head"] == "language"
    for name, part in linear.items():
        if name not in PROJECTORS[family] and name != "lm_head":
            seeing = "visual" in name or "vision" in name
            assert part == ("vision" if seeing else "language"), name
    if family == "gemma3":
        assert parts["model.multi_modal_projector"] == "projector"


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_by_part(folders: dict[str, Path], family: str):
    model, _ = load(str(folders[family]))
    parts = parts_of(model)
    asked = ["language", "vision"] + (["projector"] if PROJECTORS[family] else [])
    for part in asked:
        found = find_targets(model, part)
        assert found.names
        assert {parts[name] for name in found.names} == {part}
    both = find_targets(model, asked).names
    every = find_targets(model, "all-linear")
    assert set(every.names) == set(both)
    unread = [name for name in every.left_out if "vision_tower" in name]
    assert all("vision_tower.encoder.layers.2." in name for name in unread)
    assert bool(unread) == (family == "llava")  # it reads the last but one of three blocks
    assert "lm_head" not in both
    if not PROJECTORS[family]:
        with pytest.raises(TargetError, match=r"the part 'projector' .* modules_to_save"):
            find_targets(model, "projector")


def test_a_model_without_parts_keeps_the_words_for_layers():
    model = nn.ModuleDict({"vision": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert parts_of(model) == {}
    assert find_targets(model, "vision").names == ("vision",)
    with pytest.raises(TargetError, match="matches no layer"):
        find_targets(model, "language")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_part_is_packed(folders: dict[str, Path], family: str, storage: str):
    read, _ = load(str(folders[family]), storage)
    held, _ = load(str(folders[family]))
    inlay.quantize(held, storage)
    dense, _ = load(str(folders[family]))
    for model in (read, held):
        parts = parts_of(model)
        kinds = {n: type(m).__name__.lower() for n, m in model.named_modules()}
        packed = {name for name, held in kinds.items() if held.startswith(storage)}
        assert packed == set(find_targets(dense, "language").names)
        assert {parts[name] for name in packed} == {"language"}
    ids = torch.arange(100, 120)[None]
    torch.testing.assert_close(read(input_ids=ids).logits, held(input_ids=ids).logits)


def test_a_processor_that_is_not_there_or_damaged_is_said(tmp_path: Path):
    folder = make_vision_model(tmp_path / "llava", "llava")
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"the processor in .*llava cannot be used"):
        load(str(folder))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    _, reader = load(str(folder))
    assert "Tokenizer" in type(reader).__name__


def test_the_chunked_loss_is_on_and_leaves_with_the_adapter(folders: dict[str, Path]):
    from inlay.model.fast.causal_lm import FastCausalLM

    for family, folder in folders.items():
        model: Any = load(str(folder))[0]
        inlay.attach(model, inlay.LoRA(rank=2), targets="language")
        assert isinstance(model, FastCausalLM), family
        inlay.detach(model)
        assert not isinstance(model, FastCausalLM)


def test_experts_are_among_the_linear_layers_of_the_language_part():
    text = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 61}
    seeing = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 4}
    seeing |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    with torch.device("meta"):
        config = Qwen3VLMoeConfig(text_config=text, vision_config=seeing)
        model = Qwen3VLMoeForConditionalGeneration(config)
    found = find_targets(model, "language", kinds=adaptable_kinds(inlay.LoRA()))
    assert sum("experts" in name for name in found.names) == 2 * 2
