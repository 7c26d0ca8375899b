"""A step is planned with every method, and in every dtype that a mixture of experts computes in."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig, PreTrainedConfig, Qwen2Config

from inlay.memory.devices import Device
from inlay.memory.plan import Plan
from inlay.methods.catalog import catalog
from inlay.run.config import RunConfig
from inlay.tasks import TASKS
from inlay.train.planning import planned_step

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def planned(config: PreTrainedConfig, **settings: str) -> Plan:
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    run = RunConfig(
        model="unused", data="reports", output="unused", max_length=32, batch_size=2, **settings
    )  # type: ignore[arg-type]
    device = Device("a CPU", "cpu", 1 << 36, 1e10, 1e11, 1e11)
    return planned_step(config, TASKS["sft"].run(run).assumed(), device)


@pytest.mark.parametrize("method", sorted(catalog()))
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_step_is_planned(method: str, storage: str) -> None:
    if method == "full" and storage != "dense":
        pytest.skip("packed weights do not train")
    found = planned(Qwen2Config(**SIZES), method=method, storage=storage)
    assert found.best is not None
    assert found.trained > 0


@pytest.mark.parametrize("policy", ["layer-inputs", "recompute-mlp"])
@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_a_prompts_blocks_can_be_computed_again(method: str, policy: str) -> None:
    found = planned(Qwen2Config(**SIZES), method=method, activations=policy)
    kept = planned(Qwen2Config(**SIZES), method=method, activations="keep-all")
    assert found.best is not None
    assert kept.best is not None
    assert found.best.kept < kept.best.kept or policy == "recompute-mlp"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mixture_of_experts_is_planned_in_every_dtype(dtype: str) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4)
    assert planned(config, method="lora", dtype=dtype).best is not None
