"""On models that see images, adapted and fast, values and gradients are plain transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vision_rows import MIXED, rows_of
from vision_tiny import FAMILIES, image_batch, make_vision_model

import inlay
from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import ImageReader, image_reader
from inlay.data.tokens import Encoded, encode
from inlay.kernels.switches import plain
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.pretrained import load
from inlay.train.planning import model_loss


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ImageReader]]:
    place = tmp_path_factory.mktemp("vision")
    folders = {family: make_vision_model(place / family, family) for family in FAMILIES}
    return {family: (folder, image_reader(folder, None)) for family, folder in folders.items()}


def batch_of(reader: ImageReader, dtype: torch.dtype, multiple: int = 32) -> dict[str, Tensor]:
    rows: list[Encoded] = encode(rows_of(*MIXED), reader, 512)
    return image_batch(rows, ImageInputs(reader, dtype), multiple)


def adapted(folder: Path, storage: str, dtype: str) -> Any:
    model, _ = load(str(folder), storage, dtype=dtype)
    targets = ["language", "vision"] + ["projector"] * ("gemma3" not in folder.name)
    inlay.attach(model, inlay.LoRA(rank=4, alpha=8), targets=targets)
    torch.manual_seed(1)
    for _, params in adapter_places(model, "default"):
        for tensor in params.parameters():
            torch.nn.init.normal_(tensor, std=0.2)
    return model.train()


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model_loss(model, dict(batch))
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_paths_compute_what_plain_ones_do(
    readers: dict[str, tuple[Path, ImageReader]], family: str, storage: str
):
    folder, reader = readers[family]
    model, batch = adapted(folder, storage, "float32"), batch_of(reader, torch.float32)
    loss, found = gradients(model, batch)
    with plain():
        own_loss, own = gradients(model, batch)
    assert loss == pytest.approx(own_loss, rel=1e-5)
    assert set(found) == set(own)
    assert all(".adapters." in name for name in found)
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapted_loss_is_that_of_the_merged_weights(
    readers: dict[str, tuple[Path, ImageReader]], family: str
):
    folder, reader = readers[family]
    model, batch = adapted(folder, "dense", "float64"), batch_of(reader, torch.float64)
    with torch.no_grad():
        loss = float(model_loss(model, dict(batch)))
        inlay.merge(model.eval())
        assert float(model_loss(model, dict(batch))) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(readers: dict[str, tuple[Path, ImageReader]], family: str):
    folder, reader = readers[family]
    model = adapted(folder, "dense", "float32")
    losses = [
        gradients(model, batch_of(reader, torch.float32, multiple))[0] for multiple in (1, 32, 64)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
