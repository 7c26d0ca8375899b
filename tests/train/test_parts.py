from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inlay import files
from inlay.errors import CheckpointError, TrainingError
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach
from inlay.model.adapters.registry import adapter_places
from inlay.tasks.config import checked_config
from inlay.train.arguments import warmup_steps
from inlay.train.guard import Guard, check_changed, check_gradients, fingerprints
from inlay.train.order import order
from inlay.train.output import checkpoints
from inlay.train.output.events import Event
from inlay.train.output.recorder import Recorder, read_metrics
from inlay.train.output.saving import saving
from inlay.train.output.state import load_tree, random_state, restore_random_state, save_tree
from inlay.train.recipe import learning_rate

NEEDED = {"model": "pocket", "data": "reports", "output": "out"}


# The recipe.


@pytest.mark.parametrize(
    ("hidden", "family", "rate"),
    [
        (2048, "llama", 4.9e-4),
        (4096, "llama", 2.9e-4),
        (8192, "llama", 1.7e-4),
        (4096, "qwen3", 4.7e-4),
    ],
)
def test_the_formula_gives_the_published_rates(hidden: int, family: str, rate: float):
    found = learning_rate(checked_config(NEEDED), hidden, family, 1.0).value
    assert found == pytest.approx(rate, rel=0.03)


def test_the_method_has_its_own_factor():
    config = checked_config(NEEDED)
    lora, full = (learning_rate(config, 4096, "llama", f) for f in (1.0, 0.1))
    assert full.value == pytest.approx(lora.value / 10)
    assert "0.1" in full.reason


def test_a_narrow_model_is_not_extrapolated_to():
    config = checked_config(NEEDED)
    assert learning_rate(config, 64, "llama", 1.0).value == pytest.approx(
        learning_rate(config, 256, "llama", 1.0).value
    )


def test_the_users_rate_is_taken_as_it_is():
    given_rate = learning_rate(checked_config({**NEEDED, "learning_rate": 1e-5}), 64, "x", 0.1)
    assert given_rate.value == 1e-5


@pytest.mark.parametrize(
    ("warmup", "total", "steps"), [(0.03, 20, 0), (0.03, 100, 3), (5, 100, 5), (0, 9, 0), (1, 9, 1)]
)
def test_a_short_run_has_no_warmup(warmup: float, total: int, steps: int):
    assert warmup_steps(warmup, total) == steps


# The order of the rows.


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=200),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
    st.integers(0, 5),
)
def test_every_row_once_an_epoch(lengths: list[int], batch: int, seed: int, epoch: int):
    found = order(lengths, batch, seed, epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert found == order(lengths, batch, seed, epoch)


def test_the_order_changes_with_the_epoch_and_batches_have_similar_lengths():
    lengths = [(i * 37) % 100 + 1 for i in range(640)]
    first = order(lengths, 8, 0, 0)
    assert first != order(lengths, 8, 0, 1)
    batches = [[lengths[i] for i in first[n : n + 8]] for n in range(0, 640, 8)]
    assert max(max(b) - min(b) for b in batches) < 20
    means = [sum(b) for b in batches]
    assert means != sorted(means)


# States on disk.


def test_a_tree_comes_back_bit_for_bit(tmp_path: Path):
    tree = {
        "optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4)}},
        "groups": [{"betas": (0.9, 0.999), "lr": 0.1 + 0.2, "foreach": None, "amsgrad": False}],
        "bf16": torch.randn(5).bfloat16(),
        "empty": torch.empty(0),
        "text": "né",
    }
    save_tree(tmp_path / "t", tree)
    back = load_tree(tmp_path / "t")
    assert back["groups"] == tree["groups"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert torch.equal(back["optimizer"][0]["exp_avg"], tree["optimizer"][0]["exp_avg"])
    assert torch.equal(back["bf16"], tree["bf16"])
    assert back["text"] == "né"


def test_an_adamw_state_comes_back(tmp_path: Path):
    p = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.sum().backward()
    optimizer.step()
    save_tree(tmp_path / "t", optimizer.state_dict())
    other = torch.optim.AdamW([nn.Parameter(p.detach().clone())], lr=0.5)
    other.load_state_dict(load_tree(tmp_path / "t"))
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(
        other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_what_a_tree_cannot_hold_is_refused(tmp_path: Path):
    with pytest.raises(TypeError):
        save_tree(tmp_path / "t", {"a": object()})


@pytest.mark.parametrize("keep", [0, 5, 60, -8])
def test_a_cut_off_state_is_a_sentence(tmp_path: Path, keep: int):
    path = tmp_path / "t"
    save_tree(path, {"a": torch.randn(50)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="delete its checkpoint folder"):
        load_tree(path)


def test_random_generators_go_on_where_they_were(tmp_path: Path):
    save_tree(tmp_path / "t", random_state())
    drawn = (random.random(), float(np.random.random()), torch.rand(3))
    restore_random_state(load_tree(tmp_path / "t"))
    again = (random.random(), float(np.random.random()), torch.rand(3))
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])


def test_a_state_of_more_gpus_than_there_are_now_is_restored(monkeypatch: pytest.MonkeyPatch):
    state = {**random_state(), "cuda": [torch.tensor([1]), torch.tensor([2])]}
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    restore_random_state(state)
    assert restored == [torch.tensor([1])]


# Files and checkpoints.


def checkpoint(parent: Path, step: int) -> Path:
    folder = checkpoints.folder_of(parent, step)
    checkpoints.write(folder, fill)
    return folder


def fill(folder: Path) -> None:
    for name in checkpoints.NEEDED:
        (folder / name).write_text("x")


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-300.tmp").mkdir()
    (tmp_path / "checkpoint-400").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-100"
    checkpoints.remove_leftovers(tmp_path)
    assert not (tmp_path / "checkpoint-300.tmp").exists()
    assert checkpoints.latest(tmp_path / "none") is None


def test_rotation_keeps_the_newest(tmp_path: Path):
    for step in (1, 2, 10):
        checkpoint(tmp_path, step)
    checkpoints.rotate(tmp_path, 2)
    assert [p.name for p in checkpoints.complete(tmp_path)] == ["checkpoint-2", "checkpoint-10"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, code: int):
    before = checkpoint(tmp_path, 1)

    def half(folder: Path) -> None:
        (folder / "training.safetensors").write_text("half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(TrainingError, match=r"could not be saved .* intact"):
        checkpoints.write(checkpoints.folder_of(tmp_path, 2), half)
    assert [p.name for p in tmp_path.iterdir()] == [before.name]
    assert checkpoints.latest(tmp_path) == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TrainingError, match="the disk is full"), saving("run.json", path):
        files.write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


# The guard.


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRA(rank=2), targets=["0", "1"])


def test_a_gradient_at_every_layer():
    model = adapted()
    model(torch.randn(3, 4)).square().sum().backward()
    check_gradients(model, "default")


def test_a_layer_without_gradient_stops_the_run():
    model = adapted()
    model[0](torch.randn(3, 4)).square().sum().backward()
    with pytest.raises(TrainingError, match="no gradient reaches the adapter at '1'"):
        check_gradients(model, "default")


def test_an_unchanged_adapter_is_told():
    model = adapted()
    before = fingerprints(model, "default")
    with pytest.raises(TrainingError, match="unchanged at '0', '1'"):
        check_changed(before, model, "default")
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            params.B[0, 0] = 1e-30
    check_changed(before, model, "default")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss: float):
    with pytest.raises(TrainingError, match="at step 7, expected a finite number"):
        Guard().check_loss(loss, 7)
    with pytest.raises(TrainingError, match="gradient's norm became"):
        Guard().check_gradient(loss, 7)


def test_an_exploding_loss_stops_the_run():
    guard = Guard(reference=4.0)
    for step in range(100):
        guard.observe(3.0, step)
    assert not guard.suspicious
    guard.observe(6.5, 100)
    assert guard.suspicious
    for step in range(101, 109):
        guard.observe(6.5, step)
    with pytest.raises(TrainingError, match=r"exploded: 6.5 at step 109, against 4"):
        guard.observe(6.5, 109)


def test_one_absurd_loss_is_enough():
    with pytest.raises(TrainingError, match="exploded"):
        Guard(reference=4.0).observe(50.0, 3)


def test_rows_that_are_harder_than_the_held_out_ones_do_not_stop_the_run():
    guard = Guard(reference=0.1)
    for step in range(1, 50):
        guard.observe(2.0, step)
        assert not guard.suspicious
    with pytest.raises(TrainingError, match="against 2 before training"):
        guard.observe(21.0, 50)


def test_a_noisy_but_sane_loss_does_not_stop_the_run():
    guard = Guard()
    for step in range(200):
        guard.observe(2.0 + 1.9 * (step % 7 == 0), step)


def test_the_guard_goes_on_after_a_resume():
    guard, other = Guard(), Guard()
    for step in range(4):
        guard.observe(1.0, step)
    other.restore(guard.state())
    for each in (guard, other):
        each.observe(6.0, 4)
    assert other.reference == guard.reference == 2.0


# metrics.jsonl.


def test_metrics_are_averaged_and_cut_back_on_resume(tmp_path: Path):
    told: list[Event] = []
    path = tmp_path / "metrics.jsonl"
    recorder = Recorder(path, 2, told.append)
    recorder.total_steps = 5
    for step in (1, 2, 3):
        recorder.step(step, step / 5, float(step), 1e-3, 1.0, 10)
    state = recorder.state()
    recorder.step(4, 0.8, 9.0, 1e-3, 1.0, 10)
    recorder.evaluation(4, 0.8, 2.0)
    assert [line["loss"] for line in read_metrics(path) if "loss" in line] == [1.0, 2.0, 6.0]

    resumed = Recorder(path, 2, told.append)
    resumed.total_steps = 5
    resumed.restore(state)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    for step in (4, 5):
        resumed.step(step, step / 5, float(step), 1e-3, 1.0, 10)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)][2:] == [(4, 3.5), (5, 5.0)]
    assert [line["tokens"] for line in read_metrics(path)] == [10, 20, 40, 50]
    steps = [event for event in told if event.kind == "step"]
    assert steps[-1].seconds_left == 0
    assert all(event.memory_bytes for event in steps)


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []
