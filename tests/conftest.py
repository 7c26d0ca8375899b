"""What every test runs under: one thread each, as two run at a time; no network, no deadline."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from transformers import AutoTokenizer

from inlay.model.load.folder import EMBEDDED

torch.set_num_threads(1)
hypothesis.settings.register_profile("inlay", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("inlay")


MEMORY, ENOUGH = Path("/dev/shm"), 6 * 2**30
"""A file system in memory, and the free bytes for which the tests' folders go there."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' folders in memory where there is room: a flush to a disk is waited for."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, so that short ones fill the end of every process."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Hide what imports made from the garbage collector, which takes 0.5 s to go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every tiny model of the module's own `built`, saved with a tokenizer."""
    from tiny_models import NAMES

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the class of CPU: which products are taken, and how they round, depends on it."""
    from inlay.kernels import native
    from inlay.kernels.scratch import FAST_HALVES_ON_CPU

    has = {
        "AVX-512": torch.cpu._is_avx512_supported(),
        "bfloat16 arithmetic": bool(FAST_HALVES_ON_CPU),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    said = ", ".join(f"{what} {'yes' if there else 'no'}" for what, there in has.items())
    threads = f"{torch.get_num_threads()} thread(s) of {os.cpu_count()}"
    terminalreporter.write_line(f"CPU: {said}; {threads}; C kernels: {native.status()}")


collect_ignore = ["support", "peers"]
"""Helpers, and what tests run in processes of their own."""
