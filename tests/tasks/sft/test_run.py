from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import (
    adapter_hash,
    broken_at,
    losses_of,
    make_data,
    make_model,
    make_run,
    silence,
)
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.sft_trainer import SFTTrainer

from inlay.errors import DataError, InlayError, TrainingError, UsageError
from inlay.kernels.switches import plain
from inlay.memory.plan import Plan
from inlay.model.adapters.registry import adapter_places
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.sft.trainer import SupervisedTrainer
from inlay.train import planning, stages, trainer
from inlay.train.output import checkpoints
from inlay.train.output.events import Event
from inlay.train.output.folder import RunFolder
from inlay.train.run import TrainResult, train


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult, list[Event]]:
    told: list[Event] = []
    config = make_run(tmp_path_factory.mktemp("run"))
    return config, train(config, on_event=told.append), told


def changed(config: RunConfig, **changes: Any) -> RunConfig:
    return load_config(None, {**config.model_dump(), **changes})


def test_a_run_leaves_everything_behind(done: tuple[RunConfig, TrainResult, list[Event]]):
    config, result, _ = done
    output = Path(config.output)
    assert {p.name for p in output.iterdir()} == {
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "report.html",
        "run.json",
    }
    run = json.loads((output / "run.json").read_text())
    assert run == json.loads(json.dumps(result.run))
    assert run["finished"] is True
    assert run["config"] == config.model_dump()
    assert run["hyperparameters"]["rank"] == 4
    assert run["learning_rate"] == {"value": 0.01, "reason": "given by the user"}
    assert run["rows"] == {"train": 23, "validation": 3, "test": 4}
    assert run["trainable"]["count"] == sum(
        p.numel() for p in result.model.parameters() if p.requires_grad
    )
    assert {"python", "torch", "transformers", "trl", "inlay"} <= set(run["versions"])
    assert len(run["base_sha256"]) == len(run["data_sha256"]) == 64
    assert 0 < run["adapter_bytes"] < run["model_bytes"]
    assert run["peak_memory_bytes"] > 50_000_000
    assert run["comparison"]["rows"] == run["rows"]["test"]
    assert "<html" in (output / "report.html").read_text().lower()


def test_training_learns(done: tuple[RunConfig, TrainResult, list[Event]]):
    lines = losses_of(done[0].output)
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert measured[-1] < measured[0] - 0.1
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8, 10, 12]


def test_events_tell_of_every_step(done: tuple[RunConfig, TrainResult, list[Event]]):
    told = done[2]
    steps = [event for event in told if event.kind == "step"]
    assert [event.step for event in steps] == list(range(1, 13))
    assert {event.total_steps for event in steps} == {12}
    assert all(event.loss and event.learning_rate and event.grad_norm for event in steps)
    saved = [event.step for event in told if event.kind == "checkpoint"]
    assert saved == [0, 4, 8, 12]
    assert [p.name for p in checkpoints.complete(RunFolder(Path(done[0].output)).checkpoints)] == [
        "checkpoint-8",
        "checkpoint-12",
    ]


def test_the_model_is_left_as_it_was(done: tuple[RunConfig, TrainResult, list[Event]]):
    model = done[1].model
    assert "forward" not in vars(model)
    assert model.config.use_cache
    assert not model.training
    assert "_hf_peft_config_loaded" not in vars(model)


def test_a_finished_run_is_not_trained_again(done: tuple[RunConfig, TrainResult, list[Event]]):
    config, result, _ = done
    before = adapter_hash(config.output)
    told: list[Event] = []
    again = train(changed(config, resume=True), on_event=told.append)
    assert again.model is None
    assert again.run == json.loads(json.dumps(result.run))
    assert "is already finished" in told[-1].message
    assert adapter_hash(config.output) == before
    with pytest.raises(UsageError, match=r"holds a finished run; .* --overwrite"):
        train(config)


def test_a_changed_run_is_not_resumed(done: tuple[RunConfig, TrainResult, list[Event]]):
    with pytest.raises(UsageError) as caught:
        train(changed(done[0], resume=True, epochs=3.0, hyperparameters={"rank": 8}))
    assert "'epochs' was 2.0 and is 3.0" in str(caught.value)
    assert "'hyperparameters' was {" in str(caught.value)
    assert train(changed(done[0], resume=True, keep_checkpoints=1)).model is None


def test_overwriting_gives_the_same_adapter(done: tuple[RunConfig, TrainResult, list[Event]]):
    config = done[0]
    before, lines = adapter_hash(config.output), losses_of(config.output)
    (Path(config.output) / "mine.txt").write_text("keep")
    train(changed(config, overwrite=True, evaluate=False))
    assert (adapter_hash(config.output), losses_of(config.output)) == (before, lines)
    assert (Path(config.output) / "mine.txt").read_text() == "keep"
    (Path(config.output) / "mine.txt").unlink()


@pytest.mark.parametrize("width", [4, 64])
def test_rows_longer_than_learned_positions_end_before_the_model_is_loaded(
    tmp_path: Path, width: int
):
    config = make_run(tmp_path, max_steps=1, evaluate=False)
    base = GPT2Config(vocab_size=64, n_positions=width, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(base).save_pretrained(tmp_path / "model")
    told: list[Event] = []
    if width == 64:
        assert train(config, on_event=told.append).run["finished"]
        return
    with pytest.raises(DataError, match=rf"embedding of the model that has {width}: give max_len"):
        train(config, on_event=told.append)
    assert [event.message for event in told] == ["reading the data"]


def test_changed_data_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_run(tmp_path, resume=True)
    broken_at(monkeypatch, SupervisedTrainer, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    make_data(tmp_path / "data.jsonl", rows=31)
    with pytest.raises(UsageError, match="the data has changed since the run was begun"):
        train(config)
    make_data(tmp_path / "data.jsonl")
    make_model(tmp_path / "model")
    assert train(config).run["finished"]


@pytest.mark.parametrize(
    "name", ["adapter/x", "metrics.jsonl", "checkpoints/checkpoint-4/x", "report.html"]
)
def test_a_folder_with_foreign_files_is_refused(tmp_path: Path, name: str):
    config = make_run(tmp_path)
    path = Path(config.output) / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UsageError, match="not known whose it is"):
        train(config)
    assert path.read_text() == "mine"


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    config = make_run(tmp_path)
    Path(config.output).write_text("mine")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        train(config)


def test_a_damaged_record_is_a_sentence(tmp_path: Path):
    config = make_run(tmp_path, resume=True)
    for content in ("", "[1]", '{"config": 3}', "{"):
        Path(config.output).mkdir(exist_ok=True)
        (Path(config.output) / "run.json").write_text(content)
        with pytest.raises(UsageError, match="--overwrite"):
            train(config)


def test_nothing_is_written_for_bad_data(tmp_path: Path):
    config = make_run(tmp_path, data=str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="there is no file"):
        train(config)
    assert not Path(config.output).exists()
    config = make_run(tmp_path, max_length=3)
    with pytest.raises(DataError, match="max_length"):
        train(config)
    assert not Path(config.output).exists()


def test_a_bad_hyperparameter_comes_before_the_model(tmp_path: Path):
    with pytest.raises(InlayError, match="rank must be a positive"):
        train(make_run(tmp_path, rank=-1))
    assert not (tmp_path / "out").exists()


# A run that goes wrong.


def finite(folder: Path) -> bool:
    tree = trainer.load_tree(folder / checkpoints.TRAINING_STATE)
    tensors = [t for place in tree["parameters"].values() for t in place.values()]
    return all(bool(t.isfinite().all()) for t in tensors)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_run(tmp_path, resume=True)
    broken_at(monkeypatch, SupervisedTrainer, 7, float("nan"))
    with pytest.raises(TrainingError, match="the loss became nan at step 7") as caught:
        train(config)
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-6"
    assert str(last) in str(caught.value)
    assert finite(last)
    assert (last / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "adapter").exists()
    assert "nan" in json.loads((tmp_path / "out" / "run.json").read_text())["stopped"]
    monkeypatch.undo()
    assert train(config).run["finished"]


def test_a_gradient_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clip = SFTTrainer._clip_grad_norm

    def infinite(self: SupervisedTrainer, model: torch.nn.Module) -> Any:
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
        return clip(self, model)

    monkeypatch.setattr(SFTTrainer, "_clip_grad_norm", infinite)
    with pytest.raises(TrainingError, match="gradient's norm became inf at step 3"):
        train(make_run(tmp_path))
    last = checkpoints.latest(tmp_path / "out" / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-2"
    assert finite(last)


def test_an_exploding_loss_stops_the_run_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compute = SupervisedTrainer.compute_loss

    def doubled(self: SupervisedTrainer, *args: Any, **kwargs: Any) -> Any:
        return compute(self, *args, **kwargs) * (2 if self.state.global_step >= 5 else 1)

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", doubled)
    config = make_run(tmp_path, epochs=10.0, save_every=1)
    with pytest.raises(TrainingError, match=r"the loss exploded: .* at step 15") as caught:
        train(config)
    kept = checkpoints.complete(tmp_path / "out" / "checkpoints")
    assert [folder.name for folder in kept] == ["checkpoint-4", "checkpoint-5"]
    assert str(kept[-1]) in str(caught.value)


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_run(tmp_path, targets=["v_proj"])
    silence(config.model, layer=1)
    with pytest.raises(TrainingError, match=r"no gradient reaches .*layers\.1\.self_attn\.v_proj"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_run(tmp_path, resume=True)
    save = trainer.save_tree

    def full(path: Path, tree: Any) -> None:
        save(path, tree)
        if path.parent.name == "checkpoint-8.tmp":
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "save_tree", full)
    with pytest.raises(TrainingError, match=r"checkpoint-8: the disk is full; .*checkpoint-4"):
        train(config)
    left = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert left == ["checkpoint-0", "checkpoint-4"]
    monkeypatch.undo()
    train(config)
    train(make_run(tmp_path, "whole"))
    assert adapter_hash(config.output) == adapter_hash(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 600 KB, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path):
    config = make_run(tmp_path, output=str(small_disk / "out"), save_every=1, keep_checkpoints=50)
    with pytest.raises(TrainingError, match="the disk is full"):
        train(config)
    kept = checkpoints.complete(small_disk / "out" / "checkpoints")
    assert kept
    assert all(finite(folder) for folder in kept)
    assert not list((small_disk / "out").rglob("*.tmp"))


def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = make_run(tmp_path, resume=True)
    broken_at(monkeypatch, SupervisedTrainer, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    state = tmp_path / "out/checkpoints/checkpoint-4" / checkpoints.TRAINING_STATE
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(InlayError, match="delete its checkpoint folder to resume from the one"):
        train(config)


# Storages, methods, options.


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_adapters_on_a_quantised_base_stay_in_fp32(tmp_path: Path, storage: str):
    result = train(make_run(tmp_path, storage=storage, dtype="bfloat16", evaluate=False))
    assert result.model is not None
    kinds = {p.dtype for _, ps in adapter_places(result.model, "default") for p in ps.parameters()}
    assert kinds == {torch.float32}
    measured = [line["eval_loss"] for line in losses_of(tmp_path / "out") if "eval_loss" in line]
    assert measured[-1] < measured[0]


@pytest.mark.parametrize("method", ["dora", "ia3", "bottleneck", "prompt", "p-tuning", "norms"])
def test_every_family_trains(tmp_path: Path, method: str):
    run = make_run(tmp_path, method=method, max_steps=3, evaluate=False)
    assert train(run).run["steps"] == 3


def test_a_plan_of_other_adapters_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: tuple[RunConfig, TrainResult, list[Event]],
):
    assert not [event for event in done[2] if event.message.startswith("memory is planned for")]
    planned = planning.planned_run

    def one_less(*given: Any) -> Plan:
        found = planned(*given)
        return replace(found, trained=found.trained - 1)

    monkeypatch.setattr(stages, "planned_run", one_less)
    told: list[Event] = []
    result = train(make_run(tmp_path, max_steps=1, evaluate=False), on_event=told.append)
    assert result.model is not None
    trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    (note,) = [event.message for event in told if event.message.startswith("memory is planned for")]
    assert f"{trained - 1:,} values that train, and the model has {trained:,}" in note


def test_an_adapter_on_the_output_head_trains(tmp_path: Path):
    result = train(make_run(tmp_path, targets=["lm_head"], evaluate=False))
    assert result.model is not None
    (_, params), *_ = adapter_places(result.model, "default")
    assert params.B.abs().max() > 1e-3


def test_our_loss_is_trls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(make_run(tmp_path, "ours", dropout=0.0, evaluate=False))
    monkeypatch.delattr(SupervisedTrainer, "compute_loss")
    with plain("loss"):
        train(make_run(tmp_path, "trl", dropout=0.0, evaluate=False))
    ours, theirs = ([x.get("loss", 0) for x in losses_of(tmp_path / n)] for n in ("ours", "trl"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_rows_packed_together_train_as_alone(tmp_path: Path):
    result = train(make_run(tmp_path, packing="bfd", max_length=32, evaluate=False))
    assert result.run["steps"] < 12
    measured = [line["eval_loss"] for line in losses_of(tmp_path / "out") if "eval_loss" in line]
    assert measured[-1] < measured[0]


@pytest.mark.parametrize("packing", [True, "bfd"])
def test_packing_that_would_mix_rows_is_refused(tmp_path: Path, packing: object):
    config = make_run(tmp_path, packing=packing, max_length=32, method="prefix", tokens=4)
    with pytest.raises(UsageError, match="'packing' would mix rows"):
        train(config)


def test_threads_steps_and_the_formula(tmp_path: Path):
    result = train(
        make_run(tmp_path, max_steps=1, learning_rate="auto", evaluate=False, split=[1.0, 0.0, 0.0])
    )
    assert result.run["steps"] == 1
    assert "the model is 32 wide" in result.run["learning_rate"]["reason"]
    assert result.run["comparison"] is None
    assert [line["step"] for line in losses_of(tmp_path / "out")] == [1]
