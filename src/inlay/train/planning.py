"""A run's plan: the step it will take, on fake tensors, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.memory.policy import Policy
from inlay.memory.probe import runtime
from inlay.memory.simulate import Simulation, adamw, simulate
from inlay.memory.skeleton import skeleton
from inlay.methods.catalog import build_method
from inlay.model.attach import attach
from inlay.train.trainer import step_loss


def planned_step(
    config: PreTrainedConfig,
    method: str,
    hyperparameters: Mapping[str, Any],
    batch: Mapping[str, Tensor],
    *,
    storage: str,
    dtype: str,
    policy: Policy,
    accumulation: int,
) -> dict[str, Any]:
    from inlay.train import run  # what a run imports
    del run
    held = runtime()

    def build() -> nn.Module:
        model = skeleton(config, storage, double_quant=True, dtype=dtype)
        attach(model, build_method(method, hyperparameters))
        return model.train()

    s = simulate(
        build, batch, step_loss, optimiser=adamw, policy=policy, accumulation=accumulation
    )
    return {"total": s.peak + held, "bytes": {**s.at_peak, "runtime": held}}
