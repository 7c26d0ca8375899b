"""The plan of a step with images: what it holds is what the same step holds on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vision_rows import MIXED, picture, rows_of, turns
from vision_tiny import FAMILIES, make_vision_model, make_vision_run

from inlay.kernels.cost import planning_for
from inlay.memory import ledger as ledgers
from inlay.memory.devices import Device
from inlay.memory.ledger import Ledger
from inlay.memory.optimisers import adamw
from inlay.memory.policy import Policy, applied
from inlay.memory.simulate import Simulation, Step, simulate
from inlay.memory.skeleton import config_of
from inlay.methods.catalog import build_method
from inlay.model.adapters.attach import attach
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks import TASKS
from inlay.train.adapted_model import built
from inlay.train.images import with_images
from inlay.train.planning import largest_batch, model_loss
from inlay.train.task_run import TaskRun

CPU = Device("cpu", "cpu", 1 << 50, 1e10, 1e11, 1e11)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("vision")
    return {family: make_vision_model(place / family, family) for family in FAMILIES}


def run_of(folder: Path, tmp_path: Path, **changes: Any) -> RunConfig:
    run = make_vision_run(tmp_path, folder.name, **{"dropout": None, "batch_size": 3, **changes})
    return with_images(run.model_copy(update={"model": str(folder)}))


def planning(config: RunConfig, *rows: Any) -> tuple[TaskRun[Any, Any], list[Any]]:
    run = TASKS["sft"].run(config)
    run.read_by(Path(config.model), pictured=True)
    return run, run.encode(rows_of(*rows))


def batch_of(config: RunConfig) -> dict[str, Tensor]:
    run, encoded = planning(config, *MIXED)
    return run.to_plan(encoded, CPU).batch


def counted(
    config: RunConfig, batch: dict[str, Tensor], policy: Policy, patch: pytest.MonkeyPatch
) -> Simulation:
    """Count the same step on real tensors."""
    model: Any = load(config.model, config.storage)[0]
    attach(model, build_method(config.method, config.hyperparameters), targets=config.targets)
    patch.setattr(ledgers, "followed", lambda func, args, kwargs: func(*args, **kwargs))
    ledger = Ledger()
    with planning_for("cpu"), applied(model.train(), policy), ledger:
        return Step(ledger, model, model_loss, policy).result(dict(batch), adamw, 1)


@pytest.mark.parametrize(
    ("targets", "storage", "policy"),
    [(None, "dense", "keep-all"), ("all-linear", "nf4", "layer-inputs")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_planned_is_what_real_tensors_hold(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    targets: str | None,
    storage: str,
    policy: Policy,
) -> None:
    config = run_of(folders[family], tmp_path, targets=targets, storage=storage)
    batch = batch_of(config)
    shape, _ = config_of(config.model)
    planned = simulate(
        lambda: built(shape, config, CPU), batch, model_loss, optimiser=adamw, policy=policy
    )
    real = counted(config, batch, policy, monkeypatch)
    assert planned.trained == real.trained
    assert planned.kept == pytest.approx(real.kept, rel=0.02)
    assert planned.peak == pytest.approx(real.peak, rel=0.02)


def test_larger_images_are_planned_larger(folders: dict[str, Path], tmp_path: Path) -> None:
    config = run_of(folders["qwen2_5_vl"], tmp_path, targets="all-linear", batch_size=1)
    shape, _ = config_of(config.model)
    kept: list[int] = []
    for side in (8, 32):
        row = {"images": [picture(1, (side, side))], "messages": turns("What?", "It.")}
        run, encoded = planning(config, row)
        found = run.to_plan(encoded, CPU)
        pixels = found.batch["pixel_values"]
        assert pixels.shape[0] == (side // 2) ** 2
        assert found.row_bytes >= pixels.nbytes
        step = simulate(lambda: built(shape, config, CPU), found.batch, model_loss, optimiser=adamw)
        kept.append(step.kept)
    assert kept[1] > 3 * kept[0]


def test_the_largest_batch_is_the_one_with_the_most_tokens(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    config = run_of(folders["llava"], tmp_path, batch_size=1)
    run, encoded = planning(config, *MIXED)
    found = run.to_plan(encoded, CPU)
    assert found.batch["pixel_values"].shape[0] == 2
    assert found.count == 3
    batch = run.batch_of(encoded, largest_batch(config, run.lengths(encoded), run.arrange), 1)
    assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))
