"""Start a run on several processes: the launch command as files in the run folder, and its start.

Nothing here imports torch before something is started.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.errors import TrainingError, UsageError
from inlay.files import write_text
from inlay.run.config import RunConfig
from inlay.train.output.saving import saving

PORT = 29500
FOLDER = "launch"
RUN_FILE = "run.yaml"
TOLD_CODES = (1, 2, 130)
"""Exit codes of a process that has said itself why it ended."""


class LaunchOptions(BaseModel):
    """Where a run's processes are started; no part of the run, which means the same anywhere."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    gpus: PositiveInt | None = Field(
        None, description="GPUs per machine, one process each; starts the run on them"
    )
    processes: PositiveInt | None = Field(
        None, description="CPU processes per machine, instead of gpus"
    )
    nodes: PositiveInt = Field(1, description="number of machines")
    launcher: Literal["torchrun", "slurm", "ray"] = Field(
        "torchrun",
        description="what starts the processes: torchrun on this machine, a Slurm job or a Ray job",
    )

    @property
    def local(self) -> int:
        """Processes of one machine."""
        return self.gpus or self.processes or 1

    @property
    def size(self) -> int:
        """Processes of all machines."""
        return self.nodes * self.local


def follows() -> bool:
    """Return whether this process is one of several and not the first."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return several and os.environ.get("RANK", "0") != "0"


def check_options(options: LaunchOptions) -> None:
    """Raise unless these options say how many processes each machine has."""
    if (options.gpus is None) == (options.processes is None):
        raise UsageError(
            "'nodes' and 'launcher' need 'gpus' (a process for each GPU of a machine) or "
            "'processes' (on its CPU): give one of the two"
            if options.gpus is None
            else "'gpus' and 'processes' exclude each other; give one of them"
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UsageError(
            f"a launcher has started {os.environ['WORLD_SIZE']} processes already; leave out "
            "'gpus', 'processes' and 'nodes', or start without the launcher"
        )


def check_divisible(rows: int, accumulation: int, processes: int) -> None:
    """Raise unless the rows of a step can be divided equally among the processes."""
    if rows * accumulation % processes:
        raise UsageError(
            f"a step of {rows * accumulation} rows (batch_size {rows} x gradient_accumulation "
            f"{accumulation}) cannot be divided among {processes} processes; make it a multiple "
            f"of {processes}. A step has the same rows on any number of processes"
        )


@dataclass(frozen=True)
class Launch:
    """One run on several processes, and its files in the run folder."""

    config: RunConfig
    options: LaunchOptions

    @property
    def folder(self) -> Path:
        return Path(self.config.output).expanduser().resolve() / FOLDER

    @property
    def run_file(self) -> Path:
        return self.folder / RUN_FILE

    @property
    def script(self) -> Path:
        names = {"torchrun": "torchrun.sh", "slurm": "slurm.sh", "ray": "ray_job.py"}
        return self.folder / names[self.options.launcher]

    def write(self, run: str) -> None:
        texts = {"torchrun": self.torchrun, "slurm": self.slurm, "ray": self.ray}
        with saving("the launch files", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.run_file, run)
            write_text(self.script, texts[self.options.launcher]())

    def command(self, head: str) -> str:
        options = self.options
        words = [sys.executable, "-m", "torch.distributed.run"]
        words += ["--nproc-per-node", str(options.local)]
        line = shlex.join(words)
        if options.nodes == 1:
            line += " --standalone"
        else:
            name = f"inlay-{crc32(str(self.folder).encode()):08x}"
            line += f" --nnodes {options.nodes} --rdzv-backend c10d --rdzv-id {name}"
            line += f" --rdzv-endpoint {head}:{PORT}"
        return f"{line} -m inlay train {shlex.quote(str(self.run_file))}"

    def environment(self, cores: int | None = None) -> dict[str, str]:
        """Return what the processes' environment has besides: on a CPU no GPU, and its cores.

        Without `cores`, each process has its part of this machine's.
        """
        if self.options.gpus is not None:
            return {}
        cores = cores or len(os.sched_getaffinity(0)) // self.options.local
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, cores))}

    def torchrun(self) -> str:
        start = f"{self.exports()}exec {self.command('$HEAD')}\n"
        if self.options.nodes == 1:
            return f"#!/bin/sh\n{start}"
        usage = "# On each machine:  HEAD=name-of-the-first-machine sh torchrun.sh\n"
        check = ': "${HEAD:?set HEAD to the name or address of the first machine}"\n'
        return f"#!/bin/sh\n{usage}{check}{start}"

    def exports(self, cores: int | None = None) -> str:
        own = self.environment(cores)
        return "".join(f"export {name}={value}\n" for name, value in own.items())

    def slurm(self) -> str:
        """Return a Slurm batch script: one torchrun a machine.

        The cores are asked for twice: srun does not take those of the job (Slurm 22.05 and later).
        """
        options, threads = self.options, self.config.threads or 1
        cores = options.local * threads
        wanted = {
            "job-name": "inlay",
            "nodes": options.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": cores,
            "output": f"{self.folder}/slurm-%j.log",
            **({"gpus-per-node": options.gpus} if options.gpus else {}),
        }
        lines = "".join(f"#SBATCH --{name}={value}\n" for name, value in wanted.items())
        head = 'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\nexport HEAD\n'
        start = f"srun --cpus-per-task {cores} {self.command('$HEAD')}\n"
        return f"#!/bin/sh\n{lines}{self.exports(threads)}{head}{start}"

    def ray(self) -> str:
        """Return a Ray Train job: a worker a process, each of which runs the command."""
        on_gpu = self.options.gpus is not None
        return RAY_JOB.format(
            run=str(self.run_file),
            workers=self.options.size,
            gpu=on_gpu,
            backend="nccl" if on_gpu else "gloo",
        )

    def start(self) -> int:
        """Start the run where that can be done here, else say where; return the exit code."""
        if self.options.launcher == "slurm":
            return self.submitted("sbatch", ["sbatch", str(self.script)])
        if self.options.launcher == "ray":
            words = ["ray", "job", "submit", "--", sys.executable, str(self.script)]
            return self.submitted("ray", words)
        if self.options.nodes > 1:
            print(f"written: {self.script}\nrun on each of the {self.options.nodes} machines:")
            print(f"  HEAD=name-of-the-first-machine sh {shlex.quote(str(self.script))}")
            return 0
        self.check_gpus()
        return self.run_here()

    def submitted(self, program: str, words: list[str]) -> int:
        """Hand the script to a program, if this machine has it."""
        if shutil.which(program) is None:
            print(f"written: {self.script}")
            print(f"there is no {program} on this machine; where it is, run:")
            print(f"  {shlex.join(words)}")
            return 0
        return subprocess.run(words, check=False).returncode

    def check_gpus(self) -> None:
        import torch

        if self.options.gpus is not None and torch.cuda.device_count() < self.options.gpus:
            raise UsageError(
                f"{self.options.gpus} GPUs were asked for and this machine has "
                f"{torch.cuda.device_count()} that PyTorch can use; --processes trains on the CPU"
            )

    def run_here(self) -> int:
        """Run torchrun in this process; say what ended a process that could not say it itself."""
        import logging

        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        elastic, before = logging.getLogger("torch.distributed.elastic"), dict(os.environ)
        level, own = elastic.level, self.environment()
        elastic.setLevel(logging.CRITICAL + 1)
        os.environ.update(own)
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.options.local,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "inlay", "train", str(self.run_file))
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
            told = [code for code in ended.values() if code in TOLD_CODES]
            lost = {rank: code for rank, code in ended.items() if code not in TOLD_CODES}
            if not lost:
                return told[0]
            raise TrainingError(self.what_ended(lost)) from None
        finally:
            elastic.setLevel(level)
            for name in own:
                os.environ.pop(name)
            os.environ.update(before)
        return 0

    def what_ended(self, ended: Mapping[int, int]) -> str:
        """Return the sentence for processes that could not say themselves why they ended."""
        rank, code = next(iter(ended.items()))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        kernel = "; the kernel does so when memory runs out: dmesg says"
        memory = kernel if code == -signal.SIGKILL else ""
        return (
            f"process {rank} of {self.options.local} {how}{memory}; the run has stopped. What was "
            f"saved lies in {self.config.output}; run the same command with --resume"
        )


RAY_JOB = '''"""A Ray Train job: {workers} workers, each of which takes part in one run of inlay."""

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config):
    from inlay.tasks.config import load_config
    from inlay.train.run import train

    train(load_config(config["run"]))


ray.init(runtime_env={{"env_vars": {{"TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "0"}}}})
trainer = TorchTrainer(
    work,
    train_loop_config={{"run": {run!r}}},
    scaling_config=ScalingConfig(num_workers={workers}, use_gpu={gpu}),
    torch_config=TorchConfig(backend={backend!r}),
)
trainer.fit()
'''
