"""Runs on the tiny model by several processes; how each process ended is printed as JSON.

One process imports everything and forks those of a world, so that they cost no import.
Usage: parallel_worker.py FOLDER '[[size, {key: value, ...}, ...], ...]'. A world is a list:
how many processes, or a pair of that and how many to a machine, then runs, one after another. A
run may have a `fault`: {"rank", "step", "how"}, how being kill, spoil or nan.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heads_tiny import make_any
from train_tiny import adapter_hash, make_run
from vision_tiny import make_vision_run

from inlay.errors import InlayError
from inlay.memory.probe import warm_up
from inlay.model.adapters.registry import adapter_places
from inlay.model.stream.shard import resident_bytes
from inlay.train.output.adapter_state import tensors_of
from inlay.train.run import train
from inlay.train.trainer import AdapterLoop

NONE_DROPPED = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0
)
LOG, STEP = AdapterLoop.log, AdapterLoop.training_step


def break_at(fault: dict[str, Any] | None, rank: int) -> None:
    """Let the process of a rank go wrong in a step."""
    AdapterLoop.log, AdapterLoop.training_step = LOG, STEP
    if fault is None or fault["rank"] != rank:
        return

    def log(self: AdapterLoop, *args: Any, **kwargs: Any) -> None:
        LOG(self, *args, **kwargs)
        if self.state.global_step == fault["step"] and fault["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.global_step == fault["step"] and fault["how"] == "spoil":
            with torch.no_grad():
                next(iter(dict(adapter_places(self.adapted, "default")).values())).B[0, 0] += 1e-3

    def training_step(self: AdapterLoop, *args: Any, **kwargs: Any) -> Any:
        loss = STEP(self, *args, **kwargs)
        if self.state.global_step + 1 == fault["step"] and fault["how"] == "nan":
            self.step_loss = float("nan")
        return loss

    AdapterLoop.log, AdapterLoop.training_step = log, training_step


def one_run(folder: Path, rank: int, fault: dict[str, Any] | None = None, **run: Any) -> None:
    """Take part in a run; write what this process holds at its end beside its output."""
    break_at(fault, rank)
    make = make_vision_run if "family" in run else make_any
    config = make(folder, **{"output": "out", **run})
    leave_out_dropout(Path(config.model))
    result = train(config)
    assert result.model is not None
    frozen = {type(p).__name__ for p in result.model.parameters() if not p.requires_grad}
    own = tensors_of(result.model, "default")
    found = {
        "frozen_bytes": resident_bytes(result.model),
        "types": sorted(frozen),
        "adapter": {p: {n: x.tolist() for n, x in t.items()} for p, t in own.items()},
        "written": adapter_hash(config.output) if result.leads else None,
    }
    Path(f"{config.output}.{rank}.json").write_text(json.dumps(found))


def leave_out_dropout(model: Path) -> None:
    """Write into a model's configuration that it drops nothing: one process draws it otherwise."""
    file = model / "config.json"
    found = json.loads(file.read_text())
    if found | NONE_DROPPED != found:
        file.write_text(json.dumps(found | NONE_DROPPED))


def child(folder: Path, rank: int, local: int, runs: Sequence[dict[str, Any]], errors: Path) -> int:
    """Fork a process of a world; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % local))
        for run in runs:
            one_run(folder, rank, **run)
        code = 0
    except InlayError as error:
        print(f"inlay: {error}", file=sys.stderr)
        code = 2
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
    return 0


def world(folder: Path, wanted: int | list[int], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Let so many processes do these runs; return how each ended and what it said."""
    size, local = wanted if isinstance(wanted, list) else (wanted, wanted)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="localhost")
    files = [folder / f"errors.{rank}" for rank in range(size)]
    pids = [child(folder, rank, local, runs, file) for rank, file in enumerate(files)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {"codes": codes, "errors": [file.read_text() for file in files]}


def main() -> None:
    """Let every world do its runs."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warm_up()
    train(make_run(folder, "before"))  # imports and proofs, once for all
    gc.collect()
    gc.freeze()  # what children have in common is not gone through, nor copied, by each
    print(json.dumps([world(folder, size, runs) for size, *runs in json.loads(sys.argv[2])]))


if __name__ == "__main__":
    main()
