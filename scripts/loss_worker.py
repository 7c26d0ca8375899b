"""Train the runs of a file one after another; a process of `compare_losses.py`.

    python loss_worker.py SOURCE TODO DONE FOLDER

It uses nothing of Inlay but its command, which every commit has.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMINGS = ("seconds", "tokens_per_second", "memory_bytes")
OF_THE_PROCESS = ("runtime", "allocator")
"""Parts of the planned memory that depend on what ran in the process before."""


def main(source: str, todo: str, done: str, folder: str) -> None:
    import inlay

    if not Path(inlay.__file__).is_relative_to(Path(source).resolve()):
        raise SystemExit(f"inlay comes from {inlay.__file__}, not from {source}")
    for keys in json.loads(Path(todo).read_text()):
        found = trained(keys, Path(folder) / "run")
        with Path(done).open("a") as file:
            file.write(json.dumps(found) + "\n")
        gc.collect()


def trained(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one run by the command; return what is compared of it."""
    from inlay.cli.main import main as command

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    output = folder / "out"
    (folder / "run.yaml").write_text(json.dumps({**keys, "output": str(output)}))
    said = io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = command(["--debug", "train", str(folder / "run.yaml")])
    took = time.process_time() - began
    if code != 0:
        last = [line for line in said.getvalue().splitlines() if line.strip()][-3:]
        return {"code": code, "said": "\n".join(last).replace(str(folder), ""), "processor": took}
    return {"code": 0, "said": "", "processor": took, **results(output)}


def results(output: Path) -> dict[str, Any]:
    run = json.loads((output / "run.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    memory = run.get("memory", {})
    parts = {k: v for k, v in memory.get("parts", {}).items() if k not in OF_THE_PROCESS}
    comparison = run.get("comparison")
    return {
        "metrics": [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines],
        "adapter": {
            str(path.relative_to(output)): hashes(path)
            for path in sorted((output / "adapter").rglob("*.safetensors"))
        },
        "comparison": figures(comparison),
        "texts": list(texts(comparison)),
        "plan": {"activations": memory.get("activations"), "parts": parts},
        "steps_per_second": speed(lines),
    }


def hashes(path: Path) -> dict[str, Any]:
    """Return dtype, shape and hash of each tensor of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: [
            entry["dtype"],
            entry["shape"],
            hashlib.sha256(
                raw[slice(*(8 + size + at for at in entry["data_offsets"]))]
            ).hexdigest(),
        ]
        for name, entry in header.items()
    }


def figures(value: Any) -> Any:
    """Return a JSON value without its texts but names."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k == "name" or not isinstance(v, str)}
        return {k: v if k == "name" else figures(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [figures(item) for item in value]
    return value


def texts(value: Any) -> Iterator[str]:
    """Yield the texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def speed(lines: list[dict[str, Any]]) -> float:
    """Return steps a second after the first step, or 0 where there are too few."""
    steps = [line for line in lines if "loss" in line]
    took = steps[-1]["seconds"] - steps[0]["seconds"] if len(steps) > 2 else 0.0
    return (steps[-1]["step"] - steps[0]["step"]) / took if took > 0 else 0.0


if __name__ == "__main__":
    main(*sys.argv[1:])
