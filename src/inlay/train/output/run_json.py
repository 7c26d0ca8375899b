"""What run.json says of a run: when it begins, of its memory, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from inlay.files import size_of
from inlay.memory.plan import Plan
from inlay.methods.base import Method
from inlay.model.adapters.report import Report
from inlay.run.config import RunConfig
from inlay.train.output import provenance
from inlay.train.output.folder import RunFolder
from inlay.train.recipe import LearningRate
from inlay.train.trainer import AdapterLoop


def begun_record(
    config: RunConfig,
    method: Method,
    found: Report,
    rate: LearningRate,
    *,
    rows: Mapping[str, int],
    started: str,
    device: torch.device,
    parallel: Mapping[str, int],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that is known before the first step; `config` is the user's own."""
    return {
        "model": config.model,
        "task": config.task,
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "finished": False,
        "started": started,
        "config": config.model_dump(),
        "hyperparameters": asdict(method),
        "learning_rate": asdict(rate),
        "rows": dict(rows),
        "trainable": trainable(found),
        "targets": list(found.adapters[0].matched),
        "versions": provenance.versions(),
        "machine": provenance.machine(device),
        "parallel": dict(parallel),
        **inputs,
    }


def ended_record(model: PreTrainedModel, trainer: AdapterLoop, folder: RunFolder) -> dict[str, Any]:
    """Return what is known when all is done."""
    return {
        "finished": True,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": trainer.recorder.seconds,
        "steps": trainer.total_steps,
        "tokens": trainer.recorder.tokens,
        "peak_memory_bytes": provenance.most_memory(model),
        "adapter_bytes": size_of(folder.adapter / "adapter_model.safetensors"),
    }


def planned_record(planned: Plan | None) -> dict[str, Any] | None:
    if planned is None:
        return None
    best = planned.best
    return {"planned_bytes": best.total, "activations": best.policy, "parts": best.bytes}


def trainable(found: Report) -> dict[str, float]:
    return {"count": found.trainable, "percent": found.percent, "total": found.total}
