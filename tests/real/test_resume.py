"""On the embedded model and real reports: a killed run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from real_data import REPORTS, needs_reports

RUN = """
model: pocket
data: {data}
output: {output}
prompt: "Findings: {{findings}}\\nImpression:"
completion: impression
split_by: uid
skip_empty: true
max_rows: 150
dropout: 0.05
max_steps: 6
gradient_accumulation: 1
save_every: 2
log_every: 1
eval_rows: 8
generate_rows: 0
evaluate: false
threads: 1
resume: true
"""

PROGRAM = """
import os, signal, sys
from inlay.tasks.config import load_config
from inlay.train.run import train

kill_at = int(sys.argv[2])

def watch(event):
    if event.kind == "step" and event.step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

for path in sys.argv[1].split(","):
    train(load_config(path), on_event=watch)
"""


def run(paths: list[Path], kill_at: int = 0) -> int:
    command = [sys.executable, "-c", PROGRAM, ",".join(map(str, paths)), str(kill_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.slow
@pytest.mark.real
@needs_reports
def test_a_killed_run_on_real_reports_ends_in_the_same_adapter(tmp_path: Path):
    paths: list[Path] = []
    for name in ("whole", "killed"):
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(RUN.format(data=REPORTS, output=tmp_path / name))
    assert run(paths[1:], kill_at=5) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "adapter").exists()
    assert run(paths) == 0
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
