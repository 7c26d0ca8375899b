"""Build the run's model at full size with random weights, and take one real step.

    python examples/radiology-70b/step.py [--layers 80] [--rows 8] [--length 512]
                                          [--head-storage nf4] [--embedding-storage host]

Nothing is downloaded and nothing is dense for longer than one block: each block is drawn, held in
4 bits, and put in place. Then the run file's adapter is attached, what `inlay plan` chose is
applied, and one forward pass, backward pass and optimiser step are taken on random tokens. Prints
seconds and memory, planned and measured, as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from inlay.memory.devices import this_machine
from inlay.memory.policy import apply
from inlay.memory.probe import measuring
from inlay.memory.skeleton import config_of
from inlay.methods.catalog import build_method
from inlay.model.stream.host import embedding_on_host
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.train.planning import assumed_rows, planned_step

HERE = Path(__file__).parent
SPREAD = 0.02
"""Standard deviation of the random weights."""


def main() -> None:
    """Build, step, and print what was held."""
    options = parsed()
    keys = {"batch_size": options.rows, "max_length": options.length}
    keys |= {n: getattr(options, n) for n in ("head_storage", "embedding_storage")}
    run = load_config(HERE / "run.yaml", keys)
    shape, _ = config_of(str(HERE / "config.json"))
    shape.num_hidden_layers = options.layers or shape.num_hidden_layers
    machine = this_machine()
    found = planned_step(shape, run, assumed_rows(run).batch, machine).best
    device = torch.device(machine.kind)
    model = adapted(built(shape, run, device), run)
    apply(model, found.policy)
    with measuring(device) as memory:
        seconds, loss = step(model, run, device)
    print(
        json.dumps(
            {
                "device": machine.name,
                "layers": shape.num_hidden_layers,
                "rows": options.rows,
                "length": options.length,
                "trained_parameters": sum(p.numel() for p in trained(model)),
                "activations": found.policy,
                "planned_bytes": found.total,
                "measured_bytes": memory.peak,
                "planned_seconds": found.seconds,
                "seconds": seconds,
                "loss": loss,
            },
            indent=1,
        )
    )


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="blocks, where not all fit; default: all")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--head-storage", default="dense")
    parser.add_argument("--embedding-storage", default="dense")
    return parser.parse_args()


def built(shape: Any, run: RunConfig, device: torch.device) -> Any:
    """Return the model on the device, its blocks held as the run says."""
    torch.manual_seed(run.seed)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    for block in model.model.layers:
        drawn(block, device)
        inlay.quantize(block, run.storage, double_quant=run.double_quant, skip=[])
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        drawn(part, device)
    if run.head_storage != "dense":
        model.lm_head = inlay.quantize(
            model.lm_head, run.head_storage, double_quant=run.double_quant
        )
    if run.embedding_storage == "host":
        embedding_on_host(model, device)
    model.model.rotary_emb = type(model.model.rotary_emb)(shape).to(device)
    return model.requires_grad_(False)


def drawn(part: nn.Module, device: torch.device) -> None:
    """Give a part of the model random weights; norms are ones."""
    part.to_empty(device=device)
    for parameter in part.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=SPREAD)


def adapted(model: Any, run: RunConfig) -> Any:
    """Return the model with the run's adapter on it, ready to train."""
    method = build_method(run.method, run.hyperparameters)
    return inlay.attach(model, method, targets=run.targets).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains."""
    return [p for p in model.parameters() if p.requires_grad]


def step(model: Any, run: RunConfig, device: torch.device) -> tuple[float, float]:
    """Take one optimiser step on random tokens; return its seconds and its loss."""
    optimiser = torch.optim.AdamW(trained(model), lr=1e-4)
    batch = {name: x.to(device) for name, x in assumed_rows(run).batch.items()}
    batch["input_ids"] = torch.randint(model.config.vocab_size, batch["input_ids"].shape).to(device)
    batch["labels"] = batch["input_ids"]
    begun = time.perf_counter()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    value = loss.item()
    return time.perf_counter() - begun, value


if __name__ == "__main__":
    main()
