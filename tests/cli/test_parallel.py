"""`inlay train` and `inlay plan` on several processes: what they write, predict and refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from inlay.cli.main import main
from inlay.memory.devices import DEVICES
from inlay.memory.parallel import Division, links_of, scaling, step_of
from inlay.memory.plan import Plan
from inlay.memory.simulate import Frozen
from inlay.tasks.config import load_config
from inlay.train.processes.launch import Launch, LaunchOptions

TRAIN = ["train", "--model", "pocket", "--data", "reports", "--method", "lora"]


def launch(folder: Path, changes: Mapping[str, object] | None = None, **options: object) -> Launch:
    run = {"model": "pocket", "data": "reports", "output": str(folder / "out"), **(changes or {})}
    found = Launch(load_config(None, run), LaunchOptions(**options))  # type: ignore[arg-type]
    found.write("model: pocket\n")
    return found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus", "2", "--processes", "2"], "'gpus' and 'processes' exclude each other"),
        (["--nodes", "2"], "'nodes' and 'launcher' need 'gpus'"),
        (["--gpus", "0"], "'gpus' must be a whole number above 0"),
        (["--processes", "3"], "a step of 16 rows (batch_size 4 x gradient_accumulation 4) cannot"),
        (["--gpus", "2", "--launcher", "mpi"], "one of 'torchrun', 'slurm', 'ray'"),
        (["--parallel", "zero"], "'parallel' must be one of 'auto', 'ddp', 'fsdp', 'hsdp'"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_wrong_launch_is_a_sentence(
    verb: str, words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [verb, *TRAIN[1:], "--output", str(tmp_path / "out"), *words]
    assert main(line) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_gpus_than_there_are_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main([*TRAIN, "--output", str(tmp_path / "out"), "--gpus", "4"]) == 2
    assert "4 GPUs were asked for and this machine has 1" in capsys.readouterr().err


def test_a_launch_inside_a_launch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*TRAIN, "--output", str(tmp_path / "out"), "--processes", "2"]) == 2
    assert "a launcher has started 2 processes already" in capsys.readouterr().err


def test_several_machines_get_a_command_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpus", "4", "--nodes", "2", "--output", str(tmp_path / "out")]
    assert main([*TRAIN, *words]) == 0
    script = tmp_path / "out" / "launch" / "torchrun.sh"
    assert f"sh {script}" in capsys.readouterr().out
    text = script.read_text()
    assert "--nproc-per-node 4 --nnodes 2" in text
    assert f"-m inlay train {tmp_path / 'out' / 'launch' / 'run.yaml'}" in text
    run = load_config(script.with_name("run.yaml"))
    assert (run.model, run.method, run.output) == ("pocket", "lora", str(tmp_path / "out"))
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set HEAD to the name or address" in done.stderr


def test_a_slurm_script_asks_for_what_the_run_needs(tmp_path: Path) -> None:
    written = launch(tmp_path, gpus=8, nodes=4, launcher="slurm")
    text = written.script.read_text()
    for line in ("--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}\n" in text
    assert "--rdzv-endpoint $HEAD:29500" in text
    assert subprocess.run(["sh", "-n", str(written.script)], check=False).returncode == 0


@pytest.mark.parametrize(("changes", "threads"), [({}, 1), ({"threads": 3}, 3)])
@pytest.mark.parametrize("where", [{"gpus": 4}, {"processes": 4}])
def test_a_slurm_job_has_a_core_for_every_thread_and_hands_them_on(
    where: dict[str, int], changes: dict[str, int], threads: int, tmp_path: Path
) -> None:
    text = launch(tmp_path, changes, nodes=2, launcher="slurm", **where).script.read_text()
    assert f"#SBATCH --cpus-per-task={4 * threads}\n" in text
    assert f"\nsrun --cpus-per-task {4 * threads} " in text
    assert (f"export OMP_NUM_THREADS={threads}\n" in text) == ("processes" in where)


def test_a_slurm_script_is_submitted_where_slurm_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = launch(tmp_path, processes=2, nodes=2, launcher="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert written.start() == 0
    assert "there is no sbatch on this machine" in capfd.readouterr().out
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\necho "submitted $1"\n')
    program.chmod(0o755)
    assert written.start() == 0
    assert f"submitted {written.script}" in capfd.readouterr().out


def test_a_ray_job_is_python_with_a_worker_a_process(tmp_path: Path) -> None:
    written = launch(tmp_path, processes=2, nodes=3, launcher="ray")
    text = written.script.read_text()
    compile(text, str(written.script), "exec")
    assert "num_workers=6, use_gpu=False" in text
    assert "TorchConfig(backend='gloo')" in text
    assert str(written.run_file) in text


def test_each_ray_worker_sees_its_own_gpu_alone(tmp_path: Path) -> None:
    text = launch(tmp_path, gpus=2, launcher="ray").script.read_text()
    assert '"TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "0"' in text  # as ray.train.constants has it


@pytest.mark.parametrize("local", [3, 6, 8])
def test_no_more_devices_divide_the_weights_than_there_are(local: int) -> None:
    links = links_of(DEVICES["h100"], local)
    plan = Plan(DEVICES["h100"], (), None, 10**6, 0, Frozen(total=1000, outside=200, blocks=8))
    for one, step in scaling(Division(local, 1, local, 4), plan, 0.5, links, 4 * local):
        assert one.shards == one.size
        assert one.passes == max(1, ceil(4 * local / one.size))
        assert step.compute == 0.5 * one.passes


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("NVIDIA H100 80GB HBM3", "NVLink"),
        ("NVIDIA A100-SXM4-40GB", "NVLink"),
        ("NVIDIA A100-PCIE-40GB", "PCIe"),
        ("NVIDIA GeForce RTX 4090", "PCIe"),
        ("NVIDIA A40", "PCIe"),
    ],
)
def test_a_gpu_is_linked_as_the_table_says_by_whatever_name(name: str, wire: str) -> None:
    links = links_of(replace(DEVICES["l4"], name=name), 8)
    assert f"({wire})" in links.said[0]


def test_a_step_adds_what_is_received_to_the_arithmetic() -> None:
    frozen = Frozen(total=1000, outside=200, blocks=8)
    alone = Division(local=1, nodes=1, shards=1, passes=8)
    links = links_of(DEVICES["h100"], 8)
    one = step_of(alone, 10**6, frozen, 0.5, links)
    assert (one.seconds, one.gradient_bytes, one.gathered_bytes) == (4.0, 0, 0)
    four = step_of(Division(local=4, nodes=1, shards=4, passes=2), 10**6, frozen, 0.5, links)
    assert four.gradient_bytes == 2 * 3 / 4 * 4 * 10**6
    assert four.gathered_bytes == 2 * 3 / 4 * (2 * 800 + 200)
    assert four.seconds == pytest.approx(max(1.0, four.gathers) + four.gradients)
    cpu = step_of(
        Division(4, 1, 4, 2), 10**6, frozen, 0.5, links_of(DEVICES["h100"], 4).__class__(
            1e9, 1e9, False, ()
        )
    )  # fmt: skip
    assert cpu.seconds == pytest.approx(1.0 + cpu.gathers + cpu.gradients)


@pytest.mark.slow
def test_a_plan_covers_gpus_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--model", "pocket", "--method", "lora", "--device", "h100", "--json"]
    line += ["--gradient-accumulation", "32", "--gpus", "8", "--nodes", "2"]
    found = {}
    for parallel in ("ddp", "fsdp", "hsdp"):
        assert main([*line, "--parallel", parallel]) == 0
        found[parallel] = json.loads(capsys.readouterr().out)
    shards = {name: plan["processes"]["shards"] for name, plan in found.items()}
    assert shards == {"ddp": 1, "fsdp": 16, "hsdp": 8}
    weights = {name: plan["options"][0]["bytes"]["weights"] for name, plan in found.items()}
    assert weights["fsdp"] < weights["hsdp"] < weights["ddp"]
    assert found["ddp"]["step"]["gathered_bytes"] == 0 < found["hsdp"]["step"]["gathered_bytes"]
    devices = [row["devices"] for row in found["fsdp"]["scaling"]]
    assert devices == [2**n for n in range(11)]
    assert [row["shards"] for row in found["fsdp"]["scaling"]][-1] == 1024
    assert any("NVLink" in sentence for sentence in found["fsdp"]["assumptions"])


@pytest.mark.slow
def test_a_plan_is_drawn_with_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "pocket", "--method", "lora", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 processes on one machine" in out
    assert "predicted, not measured" in out
    assert "gloo" in out
