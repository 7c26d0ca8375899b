"""HF PEFT's LoRA on the same model that sees images: equal loss, gradients and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText
from vision_rows import MIXED, rows_of
from vision_tiny import FAMILIES, image_batch, make_vision_model

import inlay
from inlay.checkpoint.adapter import load_adapter, save_adapter
from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import image_reader
from inlay.data.tokens import encode
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.pretrained import load

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft's own
)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_hf_pefts(tmp_path: Path, family: str):
    folder = make_vision_model(tmp_path / family, family)
    reader = image_reader(folder, None)
    rows = encode(rows_of(*MIXED), reader, 512)
    batch = image_batch(rows, ImageInputs(reader), 1)

    model: Any = load(str(folder))[0]
    targets = ["language", "vision"] + ["projector"] * (family != "gemma3")
    inlay.attach(model, inlay.LoRA(rank=4, alpha=8), targets=targets)
    torch.manual_seed(1)
    for _, params in adapter_places(model, "default"):
        for tensor in params.parameters():
            torch.nn.init.normal_(tensor, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    model.train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()

    base = AutoModelForImageTextToText.from_pretrained(folder)
    theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    theirs.train()
    their_loss = theirs(**batch, use_cache=False).loss
    their_loss.backward()
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-5)

    ours = {
        (place, name): getattr(params, name).grad
        for place, params in adapter_places(model, "default")
        for name in params.names()
    }
    count = 0
    for key, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        place, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        gradient = ours[place, rest.split(".")[0]]
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-3, atol=2e-6)
        count += 1
    assert count == len(ours)


def test_an_adapter_of_hf_peft_is_read(tmp_path: Path):
    folder = make_vision_model(tmp_path / "llava", "llava")
    base = AutoModelForImageTextToText.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False
    )
    theirs: Any = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model: Any = load(str(folder))[0]
    load_adapter(model, tmp_path / "theirs")
    reader = image_reader(folder, None)
    rows = encode(rows_of(*MIXED), reader, 512)
    batch = image_batch(rows, ImageInputs(reader), 1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-5
        )
