"""Two and four processes over gloo: one process's curve, divided weights, kills, other numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from train_tiny import adapter_hash, losses_of, make_run

pytestmark = [pytest.mark.slow, pytest.mark.processes]
WORKER = Path(__file__).parents[2] / "support" / "parallel_worker.py"
SAME = {
    "dropout": 0.0, "log_every": 1, "batch_size": 2, "gradient_accumulation": 4, "epochs": 1.0,
    "generate_rows": 0,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "bins": {"packing": "bfd", "max_length": 24, "gradient_accumulation": 2},
    "nf4": {"storage": "nf4"},
    "int8": {"storage": "int8"},
    "dpo": {"task": "dpo"},
}
CUT: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1}
"""Two processes run halves of each pass, whose loss is not the mean of theirs."""
TASKS: dict[str, dict[str, Any]] = {
    "kto": {"task": "kto", **CUT},
    "orpo": {"task": "orpo", **CUT},
    "embed": {"task": "embed", "kind": "triplets", **CUT},
    "scored": {"task": "embed", "kind": "scored_pairs", **CUT},
    "reward": {"task": "reward"},
    "classify": {"task": "classify"},
    "tags": {"task": "classify", "kind": "tokens", "base": "causal"},
    "grpo": {"task": "grpo", "beta": 0.1, "generate_rows": 32},
    "images": {"family": "llava"},
    "image_pairs": {"family": "llava", "task": "dpo", **CUT},
}
RUNS |= TASKS
LEFT = ("kto", "embed", "reward", "tags", "grpo")
"""Runs that are killed on two processes and go on in one."""

MOVED = {
    **SAME, "gradient_accumulation": 2, "save_every": 2, "evaluate": False, "max_steps": 8,
    "output": "moved", "parallel": "fsdp", "resume": True,
}  # fmt: skip
WRONG = {**SAME, "gradient_accumulation": 2, "save_every": 4, "parallel": "ddp"}
DROPPING = {**SAME, "dropout": 0.3, "evaluate": False, "max_steps": 3}
REFUSED: dict[str, dict[str, Any]] = {
    "'stream' does not go with 2 processes": {"parallel": "fsdp", "stream": "host"},
    "'eight_bits' does not go with 2 processes": {"parallel": "fsdp", "eight_bits": True},
    "'cache_vision' does not go with 2 processes": {"cache_vision": True},
    "'cache_trunk' does not go with 2 processes": {"cache_trunk": True},
    "a step of 3 rows": {"batch_size": 1, "gradient_accumulation": 3},
    "the 4 answers to a prompt are compared in one process": {"task": "grpo"},
}


def curves(size: int, parallel: str, names: Iterable[str], machines: int = 1) -> list[Any]:
    """Return a world in which every run of these names is divided so."""
    named = ((name, {**SAME, **RUNS[name], "parallel": parallel}) for name in names)
    return [
        [size, size // machines],
        *({**run, "output": f"{name}-{size}-{parallel}"} for name, run in named),
    ]


def fault(rank: int, step: int, how: str) -> dict[str, Any]:
    """Return what goes wrong in one process of a run."""
    return {"fault": {"rank": rank, "step": step, "how": how}}


def left(name: str) -> dict[str, Any]:
    """Return a run that goes on where it was killed."""
    return {**SAME, **RUNS[name], "save_every": 2, "output": f"{name}-left", "resume": True}


WHOLE = [name for name in RUNS if name not in TASKS] + ["embed"]
WORLDS: dict[str, list[Any]] = {
    "one": curves(1, "auto", RUNS),
    "two, whole": curves(2, "ddp", WHOLE),
    "two, divided": curves(2, "fsdp", RUNS),
    "four": curves(4, "fsdp", ("nf4", "dpo", "kto", "scored")),
    "two machines": curves(4, "hsdp", ("nf4",), machines=2),
    "killed of two": [2, {**MOVED, **fault(1, 3, "kill")}],
    "killed of one": [1, {**MOVED, **fault(0, 5, "kill")}],
    "moved": [4, MOVED],
    "stayed": [1, {**MOVED, "output": "stayed", "resume": False}],
    "spoil": [2, {**WRONG, "output": "spoil", **fault(1, 3, "spoil")}],
    "nan": [2, {**WRONG, "output": "nan", **fault(1, 3, "nan")}],
    "dropping two": [2, {**DROPPING, "output": "drop-2"}],
    "dropping four": [4, {**DROPPING, "output": "drop-4"}],
    **{sentence: [2, run] for sentence, run in REFUSED.items()},
    **{
        f"{name} {how}": [size, {**left(name), **wrong}]
        for name in LEFT
        for how, size, wrong in (("killed", 2, fault(1, 3, "kill")), ("goes on", 1, {}))
    },
}
"""Processes and what they do one after another, in the order in which they are started."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every world has done its runs; `ends.json` says how each ended."""
    folder = tmp_path_factory.mktemp("parallel")
    words = [sys.executable, str(WORKER), str(folder), json.dumps(list(WORLDS.values()))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=WORKER.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    found = zip(WORLDS, json.loads(done.stdout.splitlines()[-1]), strict=True)
    (folder / "ends.json").write_text(json.dumps(dict(found)))
    return folder


def end(folder: Path, world: str) -> dict[str, Any]:
    """Return the exit codes of a world's processes and what they said."""
    return json.loads((folder / "ends.json").read_text())[world]


@pytest.mark.parametrize(
    "world",
    ["one", "two, whole", "two, divided", "four", "two machines", "dropping two", "dropping four"],
)
def test_every_process_ends_well(folder: Path, world: str):
    found = end(folder, world)
    assert set(found["codes"]) == {0}, found["errors"]
    assert not any(told(found))


def held(folder: Path, run: str, size: int) -> list[dict[str, Any]]:
    """Return what each process of a run held."""
    return [json.loads(Path(f"{folder / run}.{rank}.json").read_text()) for rank in range(size)]


CASES = [(name, 2, "ddp") for name in WHOLE] + [(name, 2, "fsdp") for name in RUNS]
CASES += [(name, 4, "fsdp") for name in ("nf4", "dpo", "kto", "scored")] + [("nf4", 4, "hsdp")]


@pytest.mark.parametrize(("name", "size", "parallel"), CASES)
def test_the_curve_is_one_processs(folder: Path, name: str, size: int, parallel: str):
    same_lines(folder, f"{name}-1-auto", f"{name}-{size}-{parallel}")


@pytest.mark.parametrize(
    ("name", "size"), [("packed", 2), ("nf4", 2), ("int8", 2), ("nf4", 4), ("dpo", 4)]
)
def test_frozen_weights_are_divided(folder: Path, name: str, size: int):
    (one,) = held(folder, f"{name}-1-auto", 1)
    for process in held(folder, f"{name}-{size}-fsdp", size):
        assert process["types"] == ["DTensor"]
        assert process["frozen_bytes"] == pytest.approx(one["frozen_bytes"] / size, rel=0.1)


def test_weights_are_divided_within_a_machine(folder: Path):
    (one,) = held(folder, "nf4-1-auto", 1)
    for process in held(folder, "nf4-4-hsdp", 4):
        assert process["types"] == ["DTensor"]
        assert process["frozen_bytes"] == pytest.approx(one["frozen_bytes"] / 2, rel=0.1)


@pytest.mark.parametrize("name", ["packed", "nf4"])
def test_whole_weights_stay_whole(folder: Path, name: str):
    (one,) = held(folder, f"{name}-1-auto", 1)
    for process in held(folder, f"{name}-2-ddp", 2):
        assert process["types"] == ["Parameter"]
        assert process["frozen_bytes"] == one["frozen_bytes"]


@pytest.mark.parametrize(("name", "size", "parallel"), CASES)
def test_every_process_ends_with_the_same_adapter(
    folder: Path, name: str, size: int, parallel: str
):
    run = f"{name}-{size}-{parallel}"
    first, *others = held(folder, run, size)
    assert len(others) == size - 1
    assert all(process["adapter"] == first["adapter"] for process in others)
    assert first["written"] == adapter_hash(folder / run)
    assert [process["written"] for process in others] == [None] * (size - 1)
    record = json.loads((folder / run / "run.json").read_text())
    divided_by = {"ddp": 1, "fsdp": size, "hsdp": 2}[parallel]
    assert record["parallel"]["processes"] == size
    assert record["parallel"]["weights_divided_by"] == divided_by
    assert record["comparison"]["metrics"]


def test_comparisons_do_not_depend_on_how_a_run_is_divided(folder: Path):
    def measured(run: str) -> dict[str, float]:
        record = json.loads((folder / run / "run.json").read_text())
        return {m["name"]: m["tuned"]["value"] for m in record["comparison"]["metrics"]}

    one = measured("nf4-1-auto")
    for run in ("nf4-2-ddp", "nf4-2-fsdp", "nf4-4-fsdp"):
        assert measured(run) == pytest.approx(one, rel=1e-3)


def told(ended: dict[str, Any]) -> list[str]:
    """Return what the processes of a world told the user."""
    lines = [line for errors in ended["errors"] for line in errors.splitlines()]
    return [line for line in lines if line.startswith("inlay: ")]


def test_a_killed_run_goes_on_on_other_numbers_of_processes(folder: Path):
    two, one = end(folder, "killed of two"), end(folder, "killed of one")
    assert two["codes"] == [2, -9]
    (sentence,) = told(two)
    assert "process 0 of 2 lost the others" in sentence
    assert "checkpoint-2" in sentence
    assert "--resume" in sentence
    assert one["codes"] == [-9]
    for world in ("moved", "stayed"):
        assert set(end(folder, world)["codes"]) == {0}, end(folder, world)["errors"]
    same_lines(folder, "stayed", "moved")


@pytest.mark.parametrize("name", LEFT)
def test_every_kind_of_task_goes_on_in_another_number_of_processes(folder: Path, name: str):
    assert end(folder, f"{name} killed")["codes"] == [2, -9]
    assert set(end(folder, f"{name} goes on")["codes"]) == {0}, end(folder, f"{name} goes on")
    same_lines(folder, f"{name}-1-auto", f"{name}-left")


def same_lines(folder: Path, one: str, other: str) -> None:
    """Raise unless two runs wrote the same metrics, to rounding.

    Of a run on rewards, the means over passes are of other answers in each number of processes.
    """
    by_pass = ("kl", "entropy") if one.startswith("grpo") else ()
    for expected, found in zip(losses_of(folder / one), losses_of(folder / other), strict=True):
        for name in by_pass:
            assert (expected.pop(name, None) is None) == (found.pop(name, None) is None)
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("spoil", "process 1 holds another adapter than process 0"),
        ("nan", "the loss became nan at step 3"),
    ],
)
def test_what_goes_wrong_in_one_process_is_told_once(folder: Path, how: str, sentence: str):
    found = end(folder, how)
    assert found["codes"] == [2, 2], found["errors"]
    (line,) = told(found)
    assert sentence in line
    assert "the last good state is" in line


def test_dropout_is_the_passs_whoever_runs_it(folder: Path):
    same_lines(folder, "drop-2", "drop-4")


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_was_not_shown_on_several_processes_is_refused_by_name(folder: Path, sentence: str):
    found = end(folder, sentence)
    assert found["codes"] == [2, 2]
    (line,) = told(found)
    assert sentence in line


def test_the_command_starts_processes_and_says_what_killed_one(folder: Path):
    import psutil

    config = make_run(folder, "command", epochs=200.0, save_every=2, evaluate=False)
    run_file = folder / "command.yaml"
    run_file.write_text(json.dumps({**config.model_dump(exclude={"hyperparameters"}), "rank": 4}))
    words = [sys.executable, "-m", "inlay", "train", str(run_file), "--processes", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as begun:
        while not (folder / "command" / "checkpoints" / "checkpoint-2").is_dir():
            assert begun.poll() is None, begun.communicate()
        workers = psutil.Process(begun.pid).children()
        max(workers, key=lambda p: p.pid).kill()
        _, errors = begun.communicate()
    assert begun.returncode == 2
    assert "Traceback" not in errors
    told = [line for line in errors.splitlines() if line.startswith("inlay: ")]
    assert "process 1 of 2 was killed by SIGKILL" in told[-1]
    assert len(told) <= 2
    written = folder / "command" / "launch"
    assert {path.name for path in written.iterdir()} == {"run.yaml", "torchrun.sh"}
