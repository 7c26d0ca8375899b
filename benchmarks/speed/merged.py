"""Speed of a merged model against its base, measured alternately in one process.

    python -m benchmarks.speed.merged

Each alternation times the base, the merged model and the base again on the same batch; base
against base is the null ratio, so that the machine's noise stands beside the figure.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

import inlay
from benchmarks.lib.machine import THREADS, spread, write
from inlay.model.adapters.registry import adapter_places

ALTERNATIONS = 40
REPEATS = 5


def main() -> None:
    """Measure, print and write the ratios."""
    torch.set_num_threads(THREADS)
    base, _ = inlay.load("pocket", dtype="float32")
    merged, _ = inlay.load("pocket", dtype="float32")
    inlay.attach(merged, inlay.LoRA(rank=16))
    adapted, _ = inlay.load("pocket", dtype="float32")
    inlay.attach(adapted, inlay.LoRA(rank=16))
    for model in (merged, adapted):
        randomise(model)
    report = inlay.merge(merged)
    ids = torch.randint(4096, (4, 256), generator=torch.Generator().manual_seed(0))
    rows = [alternation(base, merged, adapted, ids) for _ in range(ALTERNATIONS + 2)][2:]
    result = {
        "merged_over_base": spread([m / b for b, m, _, _ in rows]),
        "base_over_base": spread([b2 / b for b, _, _, b2 in rows]),
        "adapted_over_base": spread([a / b for b, _, a, _ in rows]),
        "max_logit_difference": report.max_logit_difference,
        "alternations": ALTERNATIONS,
        "threads": THREADS,
        "tokens": ids.numel(),
    }
    print(result)
    print(write("merged_speed", result))


def randomise(model: PreTrainedModel) -> None:
    """Give the adapter values as if trained."""
    torch.manual_seed(0)
    for _, params in adapter_places(model, "default"):
        for tensor in params.parameters():
            torch.nn.init.normal_(tensor, std=0.02)


def alternation(
    base: PreTrainedModel, merged: PreTrainedModel, adapted: PreTrainedModel, ids: Tensor
) -> tuple[float, float, float, float]:
    """Time base, merged, adapted and base again."""
    return seconds(base, ids), seconds(merged, ids), seconds(adapted, ids), seconds(base, ids)


@torch.inference_mode()
def seconds(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the fastest of a few forward passes."""
    times: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
