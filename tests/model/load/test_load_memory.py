"""Peak memory of quantising while reading: near the quantised size, well below the dense one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from inlay.model.load.folder import EMBEDDED

MEASURE = """
import json, sys, threading, time
import transformers.models.llama.modeling_llama
from inlay.model.load.pretrained import load

load("pocket", sys.argv[2])  # what the first load brings in is not the model's

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

base, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
model, _ = load(sys.argv[1], sys.argv[2])
done = True
thread.join()
held = sum(t.nbytes for t in model.state_dict().values())
print(json.dumps({"peak": max(peak, resident()) - base, "held": held}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """312 MB of fp32: 24 layers' weights of 1.5 to 6.3 MB, a small vocabulary."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(EMBEDDED["pocket"]).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_peak_is_near_the_quantised_size(folder: Path, storage: str) -> None:
    dense = (folder / "model.safetensors").stat().st_size
    run = [sys.executable, "-c", MEASURE, str(folder), storage]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    one_weight = 768 * 2048 * 4
    assert measured["held"] < 0.3 * dense
    assert measured["peak"] < 1.25 * measured["held"] + 6 * one_weight
    assert measured["peak"] < 0.45 * dense
