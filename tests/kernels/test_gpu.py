"""The Triton kernels against pure torch: interpreted on any CPU, compiled where there is a GPU.

Each runs in a process of its own, since Triton decides once whether it interprets.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "support"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(file: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command.append(str(HERE / file))
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted() -> None:
    run("gpu_cases.py", TRITON_INTERPRET="1")


@needs_triton
def test_compiled_for_hopper(tmp_path: Path) -> None:
    run("gpu_compile.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_this_gpu() -> None:
    run("gpu_cases.py", TRITON_INTERPRET="0")
