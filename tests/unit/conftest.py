"""Folders of the tiny models that a test module builds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import NAMES
from transformers import AutoTokenizer

from inlay.model.load.folder import EMBEDDED


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every model of the module's own `built`, saved with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["pocket"])
    found: dict[str, Path] = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name)
        request.module.built(name).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the saved Llama, to be changed."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))
