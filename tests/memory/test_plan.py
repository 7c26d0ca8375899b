"""Plans: the step on fake tensors, the allocator followed, devices, what fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import inlay
from inlay.errors import ModelError, UsageError
from inlay.memory import devices
from inlay.memory.devices import Device, available_memory, bytes_from, device_named
from inlay.memory.heap import Heap
from inlay.memory.optimisers import adamw, adamw_8bit
from inlay.memory.plan import ROOM, Plan, Task, plan
from inlay.memory.policy import POLICIES
from inlay.memory.simulate import Simulation, simulate
from inlay.memory.skeleton import config_of, skeleton
from inlay.storage.registry import storage_class

WIDTH, INNER, VOCABULARY, LAYERS, LENGTH = 64, 256, 512, 3, 128
ROOMY = Device("cpu", "cpu", 1 << 50, 1e10, 1e11, 1e11)


def shape() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype="float32",
    )


def build(storage: str = "dense", method: Any = None) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = skeleton(shape(), storage, double_quant=True, dtype="auto")
        return inlay.attach(model, method or inlay.LoRA(rank=4)).train()

    return made


def batch() -> dict[str, Tensor]:
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).loss


def test_a_skeleton_leaves_its_configuration_as_it_was_and_the_next_one_is_the_same():
    config = shape()
    config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    before = config.to_dict()
    kinds = []
    for _ in range(2):
        model = skeleton(config, double_quant=True, dtype="auto")
        inlay.attach(model, inlay.LoRA(rank=4))
        kinds.append([(name, type(m).__mro__) for name, m in model.named_modules()])
        assert config.to_dict() == before
    assert kinds[0] == kinds[1]


def simulated(storage: str = "dense", method: Any = None, **options: Any) -> Simulation:
    options.setdefault("optimiser", adamw)
    return simulate(build(storage, method), batch(), loss, **options)


def test_a_step_of_two_layers_is_counted_block_by_block() -> None:
    def made() -> nn.Module:
        first, last = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
        first.requires_grad_(False)
        return nn.Sequential(first, nn.ReLU(), last)

    def total(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs["x"].float()).sum()

    inputs = {"x": torch.ones(32, 8, dtype=torch.long)}
    found = simulate(made, inputs, total, optimiser=adamw)
    assert found.resting["weights"] == 8 * 16 * 4
    assert found.resting["adapter"] == 16 * 4 * 4
    assert found.trained == 16 * 4
    assert found.resting["optimiser"] == 2 * 16 * 4 * 4 + 4
    # Autograd keeps the ReLU's output for the last layer; the inputs and the sum are small.
    assert 32 * 16 * 4 <= found.kept <= 32 * 16 * 4 + 32 * 4 * 4 + 4
    assert found.flops == 2 * 32 * (8 * 16 + 16 * 4) + 2 * 32 * 16 * 4


class Stack(nn.Module):
    """A trained shift below three frozen blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(64))
        blocks = (nn.Linear(64, 64, bias=False).requires_grad_(False) for _ in range(3))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("kind", "gathered"), [("cpu", 3.25), ("cuda", 2)])
def test_divided_weights_arrive_block_by_block(kind: Any, gathered: float) -> None:
    def total(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs["x"].float()).sum()

    inputs = {"x": torch.ones(1, 64, dtype=torch.long)}
    found = simulate(Stack, inputs, total, optimiser=adamw, kind=kind, shards=4)
    block = 64 * 64 * 4
    assert found.resting["weights"] == 3 * block // 4
    assert found.at_peak["weights"] == 3 * block // 4 + gathered * block
    assert found.frozen.total == 3 * block


def test_less_is_held_from_policy_to_policy() -> None:
    found = [simulated(policy=policy) for policy in POLICIES]
    kept = [simulation.kept for simulation in found]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    assert found[-1].host == LAYERS * LENGTH * WIDTH * 4
    assert found[0].flops < found[3].flops


def test_gradients_live_through_the_passes_of_a_step() -> None:
    one, several = simulated(), simulated(accumulation=4)
    assert one.resting["gradients"] == 0
    assert several.resting["gradients"] == several.resting["adapter"]


def test_eight_bit_states_are_a_quarter() -> None:
    large = torch.empty(64, 64)
    packed = sum(part.nbytes for part in adamw_8bit([large])())
    assert 0.24 < packed / (2 * large.nbytes) < 0.28


def test_small_states_stay_in_32_bits() -> None:
    full = inlay.Full()
    plain = simulated(method=full).resting["optimiser"]
    packed = simulated(method=full, optimiser=adamw_8bit).resting["optimiser"]
    assert 0.28 < packed / plain < 1


def test_what_depends_on_unknown_values_is_refused() -> None:
    def chosen(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        out = model(inputs["x"].float())
        return out[out > 0].sum()

    def listed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        out = model(inputs["x"].float()).detach()
        return torch.tensor([out.sum(), out.max()]).sum()

    for loss in (chosen, listed):
        with pytest.raises(ModelError, match="cannot be planned"):
            simulate(
                lambda: nn.Linear(4, 4), {"x": torch.ones(2, 4, dtype=torch.long)}, loss,
                optimiser=adamw,
            )  # fmt: skip


def test_labelled_rows_are_followed_by_their_values() -> None:
    labelled = batch()
    few = {**labelled, "labels": labelled["labels"].masked_fill(torch.arange(LENGTH) < 100, -100)}
    whole = simulate(build(), labelled, loss, optimiser=adamw)
    part = simulate(build(), few, loss, optimiser=adamw)
    assert part.flops < whole.flops


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_an_unfilled_layer_is_as_large_as_a_filled_one(storage: str, double_quant: bool) -> None:
    w = torch.randn(48, 96)
    filled = storage_class(storage).quantized(w, None, double_quant=double_quant)
    unfilled = storage_class(storage).unfilled(
        (48, 96), torch.float32, None, double_quant=double_quant
    )
    sizes = [(n, t.shape, t.dtype) for n, t in unfilled.held().items()]
    assert sizes == [(n, t.shape, t.dtype) for n, t in filled.held().items()]


def test_nothing_of_a_plan_is_left_for_real_tensors() -> None:
    simulated("nf4", inlay.DoRA(rank=2))
    layer = storage_class("nf4").quantized(torch.randn(64, 64), None)
    assert type(layer.dequantize()) is Tensor


def test_a_heap_that_keeps_its_memory_holds_its_greatest_extent() -> None:
    heap = Heap(keeps=True)
    heap.replay([(1, 10_240), (2, 20_480), (1, 0), (3, 8_192)])
    assert heap.peak == 30_720
    heap.replay([(4, 25_600)])
    assert heap.held == 30_720


def test_a_heap_maps_large_blocks_by_themselves() -> None:
    heap = Heap(keeps=False)
    heap.allocate(1, 1 << 20)
    assert (heap.mapped, heap.touched) == (1 << 20, 0)
    heap.free(1)
    assert heap.held == 0
    heap.allocate(2, 1 << 19)
    assert heap.touched == 1 << 19


def planned(memory: int) -> Plan:
    return planned_on(Device("toy", "cuda", memory, 1e10, 1e11, 1e11))


def planned_on(device: Device) -> Plan:
    task = Task(build(), batch(), loss, adamw, 1, torch.float32)
    return plan(task, device, runtime=lambda products: 0)


def test_the_policy_that_keeps_the_most_and_fits_is_chosen() -> None:
    roomy = planned(1 << 40)
    assert roomy.best.policy == "keep-all"
    totals = {p: o.total for p, o in zip(POLICIES, planned(1).options, strict=False)}
    assert set(totals) <= set(POLICIES)
    just = planned(int((roomy.best.total - 1) / 0.95))
    assert just.chosen is None or just.chosen.policy != "keep-all"
    assert planned(1).chosen is None


def test_sizes_and_devices_are_read() -> None:
    assert bytes_from("24GB") == 24 * 10**9
    assert bytes_from("1.5 GiB") == 3 * 2**29
    with pytest.raises(UsageError, match="such as 24GB"):
        bytes_from("much")
    assert device_named("2xrtx4090").memory == 48 * 10**9
    assert device_named("H100", 10**9).memory == 10**9
    assert device_named("cpu", 10**10).memory == 10**10
    assert planned_on(device_named("cpu", 10**10)).limit == int(ROOM * 10**10)
    with pytest.raises(UsageError, match=r"no device 'h1000'.*Did you mean 'h100'"):
        device_named("h1000")
    assert available_memory() > 0


def cgroup(folder: Path, limit: int | str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache - 1}\nactive_file 1\n")


def test_a_cgroups_room_is_without_its_file_cache_and_of_the_tightest_around_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUPS", tmp_path / "cgroup")
    assert devices.cgroup_rooms() == []
    cgroup(tmp_path, 1000, 900, cache=600)  # as a container sees its own
    assert devices.cgroup_rooms() == [700]
    cgroup(tmp_path / "slurm" / "job_1", 500, 100, cache=0)
    cgroup(tmp_path / "slurm" / "job_1" / "step_0", "max", 100, cache=0)
    cgroup(tmp_path / "slurm" / "job_2", 10, 10, cache=0)
    (tmp_path / "cgroup").write_text("1:cpu:/slurm/job_2\n0::/slurm/job_1/step_0\n")
    assert sorted(devices.cgroup_rooms()) == [400, 700]
    assert available_memory() == 400


def test_the_first_version_of_cgroups_is_read_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUPS", tmp_path / "cgroup")
    folder = tmp_path / "memory" / "job"
    folder.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/job\n")
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("900\n")
    stat = "active_file 0\ninactive_file 0\ntotal_active_file 50\ntotal_inactive_file 50\n"
    (folder / "memory.stat").write_text(stat)
    assert devices.cgroup_rooms() == [200]


def test_a_configuration_is_enough(tmp_path: Any) -> None:
    shape().save_pretrained(tmp_path)
    alone = tmp_path / "other.json"
    (tmp_path / "config.json").rename(alone)
    assert config_of(str(alone))[0].hidden_size == WIDTH
    with pytest.raises(ModelError, match=r"has no config\.json"):
        config_of(str(tmp_path))
    with pytest.raises(ModelError, match="no folder or file"):
        config_of(str(tmp_path / "gone"))
