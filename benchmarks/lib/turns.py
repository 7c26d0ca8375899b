"""Processes that take turns: each has its own allocator and its own peak of memory.

A worker is a module of `benchmarks` that talks JSON lines with its parent. It works only when it
is asked to, so that at any time one contestant has the whole machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from inlay.kernels.native import return_free_memory

KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "68719476736"}
"""Makes glibc keep freed blocks in the process instead of returning them to the kernel."""


class SkippedError(Exception):
    """A contestant cannot take part; the message says why."""


class WorkerError(Exception):
    """A worker died or raised; the message holds its last words."""


def launched(module: str, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a module in a process of its own that writes its standard error to a file."""
    with log.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
        )


class Worker:
    """One contestant's process, from the parent's side."""

    def __init__(
        self, module: str, spec: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "stderr"
        settings = {"TOKENIZERS_PARALLELISM": "false", **(environment or {})}
        self.process = launched(f"benchmarks.{module}", self.log, settings)
        try:
            self.ready = self.ask(**spec)
        except (SkippedError, WorkerError):
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Hand over the machine with a request; return the answer when it is back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"a worker ended with {self.process.wait()}:\n{self.last_words()}")
        answer = json.loads(line)
        if "skipped" in answer:
            raise SkippedError(answer["skipped"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def last_words(self) -> str:
        """Return the end of what the worker wrote to its standard error."""
        return self.log.read_text()[-2000:]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Parent:
    """The parent, from the worker's side; whatever libraries print goes to standard error."""

    def __init__(self) -> None:
        self.out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> dict[str, Any]:
        """Wait for the next request; leave when the parent is gone."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        return json.loads(line)

    def answer(self, **values: Any) -> None:
        """Hand the machine back."""
        self.out.write(json.dumps(values) + "\n")
        self.out.flush()


def serve(work: Callable[[Parent, dict[str, Any]], None]) -> None:
    """Run a worker's `work` on the first request; send exceptions to the parent."""
    parent = Parent()
    try:
        work(parent, parent.wait())
    except SkippedError as reason:
        parent.answer(skipped=str(reason))
    except Exception:
        parent.answer(error=traceback.format_exc())


class PeakMemory:
    """The peak of this process's memory above the memory held at the start, in bytes."""

    def __init__(self) -> None:
        return_free_memory()
        self.before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def above(self) -> int:
        """Return the peak since the start, less the memory held at the start."""
        return status("VmHWM") - self.before


def status(key: str) -> int:
    """Return one of the kernel's figures for this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
