"""Mutated adapter folders: refused in a sentence, or loaded as the very adapter that was saved."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay.checkpoint.adapter import load_adapter, save_adapter
from inlay.checkpoint.folder import CONFIG, EXTRAS, TENSORS
from inlay.checkpoint.slots import slots
from inlay.errors import InlayError
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapters

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**30, 0.5, -2.5, "", "x", "(", "lora_only", "gaussian",
    [], ["x"], [1], [[0, 1]], {}, {"x": 1}, {"0": 2}, ["0", "2"], "all-linear", ".*",
)  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = attach(net(), LoRA(rank=2))
    with torch.no_grad():
        for slot in slots(model, "default"):
            slot.tensor.normal_(generator=torch.Generator().manual_seed(1))
    return save_adapter(model, tmp_path_factory.mktemp("saved"))


def mutated_json(path: Path, draw: random.Random) -> None:
    """Change, drop or add one value anywhere in a JSON file."""
    document = json.loads(path.read_text())
    places = list(containers(document))
    place = draw.choice(places)
    key = draw.choice([*place, "new_key"])
    if draw.random() < 0.2:
        place.pop(key, None)
    else:
        place[key] = draw.choice(VALUES)
    path.write_text(json.dumps(document))


def containers(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
        for value in document.values():
            yield from containers(value)


def mutated_bytes(path: Path, draw: random.Random) -> None:
    """Cut a file, or change, insert or repeat some of its bytes."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    match draw.randrange(4):
        case 0:
            del content[at:]
        case 1:
            content[at] ^= 1 << draw.randrange(8)
        case 2:
            content[at:at] = draw.randbytes(draw.randrange(1, 9))
        case _:
            content += content[at:]
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore:.*has options that this version of inlay does not know")
@pytest.mark.parametrize("recorded", [True, False], ids=["inlay", "peft"])
@pytest.mark.parametrize("chunk", range(5))
def test_mutated_folders(saved: Path, tmp_path: Path, chunk: int, recorded: bool) -> None:
    wanted = load_adapter(net(), saved)(X)
    sentences: list[str] = []
    for seed in range(100 * chunk, 100 * chunk + 100):
        draw = random.Random(seed)
        folder = shutil.copytree(saved, tmp_path / str(seed))
        if not recorded:
            (folder / EXTRAS).unlink()
        file = draw.choice((CONFIG, TENSORS, EXTRAS) if recorded else (CONFIG, TENSORS))
        if file == TENSORS or draw.random() < 0.3:
            mutated_bytes(folder / file, draw)
        else:
            mutated_json(folder / file, draw)
        model = net()
        try:
            load_adapter(model, folder)
        except InlayError as error:
            sentences.append(str(error))
            assert adapters(model) == {}
            continue
        if recorded:
            assert torch.equal(model(X), wanted), f"seed {seed}: another adapter was accepted"
        else:
            assert bool(torch.isfinite(model(X)).all())
    assert len(sentences) > 30
    assert all(20 < len(said) < 1500 and "\n" not in said for said in sentences)
