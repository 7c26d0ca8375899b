"""Kill runs with SIGKILL at many moments, resume each, and print what they ended in, as JSON.

One process imports everything and forks a child for every run, so that a kill costs no import.
Usage: train_kills.py FOLDER NAME:KILLS ..., where a name is a method's, a task's, `images` or
`images-dpo`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heads_tiny import make_any
from train_tiny import adapter_hash, losses_of
from vision_tiny import make_vision_run

from inlay.memory.probe import warm_up
from inlay.run.config import RunConfig
from inlay.tasks import TASKS
from inlay.train.run import train


def child(work: Callable[[], None]) -> int:
    """Run something in a forked process and return how it ended; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_flush(config: RunConfig, count: int) -> Callable[[], None]:
    """Return a run that kills itself before the file is flushed that many times."""

    def work() -> None:
        flush, left = os.fsync, [count]

        def counted(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        os.fsync = counted
        train(config)

    return work


def killed_after(config: RunConfig, seconds: float) -> Callable[[], None]:
    """Return a run that the kernel ends after a time, without a word."""

    def work() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        train(config)

    return work


def flushes_of(config: RunConfig, path: Path) -> Callable[[], None]:
    """Return an uninterrupted run that writes down how often it flushes a file."""

    def work() -> None:
        flush, count = os.fsync, [0]

        def counted(handle: int) -> None:
            count[0] += 1
            flush(handle)

        os.fsync = counted
        train(config)
        path.write_text(str(count[0]))

    return work


def run_of(folder: Path, name: str) -> Callable[..., RunConfig]:
    """Return what makes runs of a method, of a task, or of answers about images."""
    about, _, task = name.partition("-")
    if about == "images":
        judged = {"task": task} if task else {}
        return lambda output, **more: make_vision_run(
            folder, output=output, targets=["language"], **judged, **more
        )
    kind = {"task": name} if name in TASKS else {"method": name}
    return lambda output, **more: make_any(folder, output, **kind, **more)


def attempts(folder: Path, name: str, kills: int) -> list[dict[str, Any]]:
    """Run a method or task once undisturbed and then with kills; return how each ended."""
    made = run_of(folder, name)
    whole = made(f"{name}-whole")
    started = time.monotonic()
    assert child(flushes_of(whole, folder / "flushes")) == 0
    seconds, flushes = time.monotonic() - started, int((folder / "flushes").read_text())
    ends: list[dict[str, Any]] = [{"moments": [], **outcome(whole)}]
    chance = random.Random(0)
    for number in range(kills):
        config = made(f"{name}-{number}", resume=True)
        first = chance.randrange(flushes * number // kills, flushes * (number + 1) // kills)
        second = chance.uniform(0.02, 0.4) * seconds
        moments = {
            f"before flush {first} of {flushes}": child(killed_at_flush(config, first)),
            f"then after {second:.2f} of {seconds:.2f} s": child(killed_after(config, second)),
        }
        code = child(lambda config=config: train(config) and None)
        ends.append({"moments": moments, "code": code, **(outcome(config) if code == 0 else {})})
    return ends


def outcome(config: RunConfig) -> dict[str, Any]:
    """Return what a run that ended left behind."""
    return {
        "adapter": adapter_hash(config.output),
        "metrics": losses_of(config.output),
        "left": sorted(p.name for p in Path(config.output).rglob("*.tmp")),
    }


def main() -> None:
    """Try the methods and tasks that the words name, as `name:kills`."""
    torch.set_num_threads(1)
    warm_up()
    train(make_any(Path(sys.argv[1]) / "before", "out"))  # imports and proofs, once for all
    gc.collect()
    gc.freeze()  # what children have in common is not gone through, nor copied, by each
    ends: dict[str, list[dict[str, Any]]] = {}
    for word in sys.argv[2:]:
        name, kills = word.split(":")
        folder = Path(sys.argv[1]) / name
        folder.mkdir()
        ends[name] = attempts(folder, name, int(kills))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
