"""Planned against measured memory: each case in a process of its own, on this CPU.

    python -m benchmarks.memory.plan_table [images | name ...]

A case is a method, a storage, a length and an activation policy, on a model of four layers of the
0.5B shape; `images` are models with such a language part and two images in a row, whose results
are plan_images.json. The plan is made from the configuration alone, in one process, as `inlay plan`
makes it. In another the model is loaded, adapted and trained for three steps; what is compared is
the most that process held while it trained (VmHWM, set back once the model was loaded), everything
included: Python, the libraries, the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import write
from benchmarks.memory.plan_images import image_batch, image_shape

LAYERS, STEPS = 4, 3
CASES: list[dict[str, Any]] = (
    [
        {"method": m, "storage": s, "dtype": d, "length": n, "policy": p}
        for m, s, d, n, p in (
            ("lora", "dense", "bfloat16", 128, "keep-all"),
            ("lora", "dense", "bfloat16", 512, "keep-all"),
            ("lora", "dense", "bfloat16", 512, "keep-products"),
            ("lora", "dense", "bfloat16", 512, "recompute-mlp"),
            ("lora", "dense", "bfloat16", 512, "layer-inputs"),
            ("lora", "dense", "bfloat16", 2048, "keep-all"),
            ("lora", "dense", "bfloat16", 2048, "layer-inputs"),
            ("lora", "dense", "float32", 128, "keep-all"),
            ("lora", "dense", "float32", 512, "keep-all"),
            ("lora", "dense", "float32", 1024, "recompute-mlp"),
            ("lora", "dense", "float32", 2048, "keep-products"),
            ("lora", "nf4", "bfloat16", 128, "keep-all"),
            ("lora", "nf4", "bfloat16", 512, "keep-all"),
            ("lora", "nf4", "bfloat16", 1024, "keep-products"),
            ("lora", "nf4", "bfloat16", 2048, "recompute-mlp"),
            ("lora", "nf4", "float32", 512, "layer-inputs"),
            ("lora", "int8", "bfloat16", 512, "keep-all"),
            ("lora", "int8", "bfloat16", 2048, "layer-inputs"),
            ("dora", "dense", "bfloat16", 512, "keep-all"),
            ("dora", "nf4", "bfloat16", 1024, "recompute-mlp"),
            ("ia3", "dense", "bfloat16", 512, "keep-all"),
            ("ia3", "nf4", "bfloat16", 1024, "layer-inputs"),
            ("bottleneck", "dense", "float32", 512, "keep-all"),
            ("bottleneck", "nf4", "bfloat16", 1024, "keep-products"),
            ("full", "dense", "float32", 128, "keep-all"),
            ("full", "dense", "bfloat16", 512, "layer-inputs"),
            ("bitfit", "dense", "bfloat16", 1024, "keep-all"),
            ("prefix", "dense", "bfloat16", 512, "keep-all"),
        )
    ]
    + [
        {
            "method": "lora",
            "storage": s,
            "dtype": "bfloat16",
            "length": n,
            "policy": p,
            "eight_bits": 1,
        }
        for s, n, p in (("dense", 512, "keep-all"), ("nf4", 1024, "keep-products"))
    ]
    + [
        {
            "method": "lora",
            "storage": s,
            "dtype": "bfloat16",
            "length": 512,
            "policy": p,
            "stream": "disk",
        }
        for s, p in (("dense", "layer-inputs"), ("nf4", "keep-all"))
    ]
)
IMAGE_CASES: list[dict[str, Any]] = [
    {"family": f, "method": "lora", "storage": s, "dtype": d, "targets": t, "policy": p}
    for f, s, d, t, p in (
        ("llava", "dense", "bfloat16", "language", "keep-all"),
        ("llava", "nf4", "float32", "language", "keep-products"),
        ("llava", "dense", "bfloat16", "all-linear", "keep-all"),
        ("llava", "dense", "float32", "all-linear", "layer-inputs"),
        ("qwen2_5_vl", "dense", "bfloat16", "language", "keep-all"),
        ("qwen2_5_vl", "nf4", "bfloat16", "language", "layer-inputs"),
        ("qwen2_5_vl", "dense", "bfloat16", "all-linear", "keep-all"),
        ("qwen2_5_vl", "dense", "float32", "all-linear", "keep-products"),
    )
]


def shape(case: dict[str, Any]) -> Any:
    """Return the configuration of a case's model; text models have biases, which BitFit needs."""
    from transformers import Qwen2Config

    dtype = case["dtype"]
    if "family" in case:
        return image_shape(case["family"], dtype)
    return Qwen2Config(
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=dtype,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def make_model(folder: Path, case: dict[str, Any]) -> str:
    """Save random weights of a case's shape, unless they exist; no tokenizer is needed."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    dtype = case["dtype"]
    path = folder / f"{case.get('family', 'text')}-{dtype}"
    if path.is_dir():
        return str(path)
    made_as = AutoModelForImageTextToText if "family" in case else AutoModelForCausalLM
    made_as.from_config(shape(case)).to(getattr(torch, dtype)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(path)
    return str(path)


def batch(case: dict[str, Any]) -> dict[str, Any]:
    """Return one row whose first quarter is masked, or the row with images."""
    import torch

    if "family" in case:
        return image_batch(case["family"], case["dtype"])
    length = case["length"]
    ids = torch.arange(length)[None] % 1000
    labels = ids.clone()
    labels[:, : length // 4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """Plan a case from its configuration, as `inlay plan` does."""
    from inlay.memory.devices import Device
    from inlay.tasks.config import load_config
    from inlay.train.planning import PlannedRows, model_loss, planned_step

    run = load_config(
        None,
        {
            "model": "pocket",
            "data": "reports",
            "output": "unused",
            "method": case["method"],
            "targets": case.get("targets"),
            "storage": case["storage"],
            "dtype": case["dtype"],
            "activations": case["policy"],
            "gradient_accumulation": 1,
            "eight_bits": "eight_bits" in case,
            "stream": case.get("stream", "off"),
        },
    )
    device = Device("cpu", "cpu", 1 << 40, 1e10, 3e11, 3e11)
    found = planned_step(
        shape(case), PlannedRows(run, batch(case), model_loss, 0, 0, 0), device
    ).best
    return {"total": found.total, "bytes": found.bytes}


def measured(case: dict[str, Any], model_folder: str) -> dict[str, Any]:
    """Load, attach, and train a few steps; return the most memory held while training."""
    import torch

    from inlay.memory.policy import apply
    from inlay.memory.probe import measuring, resident
    from inlay.methods.catalog import build_method
    from inlay.model.adapters.attach import attach
    from inlay.model.load.eight_bits import compute_in_8_bits
    from inlay.model.load.pretrained import load
    from inlay.tasks.sft import run
    from inlay.train.planning import model_loss

    del run
    before = resident()
    model, _ = load(model_folder, case["storage"], device="cpu", stream=case.get("stream", "off"))
    attach(model, build_method(case["method"], {}), targets=case.get("targets"))
    if "eight_bits" in case:
        compute_in_8_bits(model)
    model.train()
    apply(model, case["policy"])
    loaded = resident()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    inputs = batch(case)
    with measuring(torch.device("cpu")) as found:
        for _ in range(STEPS):
            model_loss(model, dict(inputs)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return {"measured": found.peak, "before": before, "loaded": loaded, "after": resident()}


def results(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure and plan every case in processes of its own, two cases at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folders = [make_model(Path(folder), case) for case in cases]
        return list(pool.map(result, cases, folders))


def result(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Measure and plan one case."""
    found = in_a_process("measure", case, folder)
    plan = in_a_process("plan", case)
    error = plan["total"] / found["measured"] - 1
    sizes = f"{plan['total'] / 1e6:8.0f}{found['measured'] / 1e6:8.0f}"
    print(f"{name_of(case):<48}{sizes}{error:+8.1%}", flush=True)
    return {**case, "planned": plan, **found, "error": error}


def in_a_process(kind: str, case: dict[str, Any], *rest: str) -> Any:
    """Run a part of the table in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.memory.plan_table", kind, json.dumps(case), *rest]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    """Measure and plan every case on text, every case on images, or the named cases."""
    images = names == ["images"]
    asked = [c for c in (*CASES, *IMAGE_CASES) if name_of(c) in names]
    rows = results(asked or (IMAGE_CASES if images else CASES))
    within = sum(abs(row["error"]) <= 0.05 for row in rows)
    print(f"{within} of {len(rows)} within 5%")
    if images or not names:
        kind = "plan_images" if images else "plan_table"
        write(kind, {"layers": LAYERS, "steps": STEPS, "rows": rows})


def name_of(case: dict[str, Any]) -> str:
    """Return a case's name."""
    return "-".join("8bit" if key == "eight_bits" else str(v) for key, v in case.items())


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.argv[1:2] == ["plan"]:
        print(json.dumps(planned(json.loads(sys.argv[2]))))
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measured(json.loads(sys.argv[2]), sys.argv[3])))
    else:
        main(sys.argv[1:])
