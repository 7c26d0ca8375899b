"""The wheel holds all that the command needs: built, installed apart from the tree, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("setuptools", reason="builds the wheel without reaching the network")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "inlay"
pytestmark = pytest.mark.slow


def ran(*words: str | Path, folder: Path) -> str:
    """Run a command in a folder, with nothing of the source tree in its path."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy of the tree, as setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignored)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    ran(sys.executable, "-W", "ignore", "-c", code, folder, folder=folder)
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which borrows the other libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    ran(*pip, "install", "-q", "--no-deps", "--no-index", wheel, folder=folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= set(ZipFile(wheel).namelist())


def test_the_command_runs_from_the_wheel_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    where = ran(installed / "python", "-c", "import inlay; print(inlay.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    inlay = installed / "inlay"
    assert "usage: inlay VERB [flags]" in ran(inlay, "--help", folder=tmp_path)
    assert "lora" in ran(inlay, "methods", folder=tmp_path)
    data = ("--model", "pocket", "--data", "reports")
    plan = json.loads(ran(inlay, "plan", *data, "--json", folder=tmp_path))
    assert (plan["model"], plan["trained_parameters"]) == ("pocket", 448_512)
    short = ("--max-rows", "40", "--max-steps", "2", "--generate-rows", "2", "--threads", "1")
    shown = ran(inlay, "train", *data, *short, "--generate-tokens", "4", "--output", "run",
                folder=tmp_path)  # fmt: skip
    assert "base against tuned" in shown
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "adapter", "checkpoints", "metrics.jsonl", "report.html", "run.json",
    }  # fmt: skip
