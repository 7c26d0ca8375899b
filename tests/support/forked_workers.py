"""Workers of the benchmarks as forks of one process that has imported the libraries already.

Each worker would else spend some seconds on imports, and a smoke run has up to ten of them. They
are still processes of their own, with a memory of their own.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "inlay.train.run",
        "inlay.tasks.sft.run",
        "peft",
        "bitsandbytes",
        "trl.trainer.sft_trainer",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


class Forked:
    """What `turns.Worker` needs of a `subprocess.Popen`."""

    def __init__(self, module: str, log: Path, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self.process = FORKS.Process(
            target=serve, args=(module, theirs, str(log), dict(environment)), daemon=True
        )
        self.process.start()
        theirs.close()
        with ours:
            self.stdin, self.stdout = ours.makefile("w"), ours.makefile("r")

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def serve(module: str, parent: socket.socket, log: str, environment: dict[str, str]) -> None:
    """Run a worker's module on a socket for its standard input and output."""
    os.environ.update(environment)
    stderr, stream = os.open(log, os.O_WRONLY | os.O_CREAT), parent.detach()
    for source, number in ((stream, 0), (stream, 1), (stderr, 2)):
        os.dup2(source, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__")
