"""Measures the machine's rate of matrix products on a model's own shapes, when asked to.

Started by `turns.Worker`; the first request holds the products and the number of tokens.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.lib.machine import THREADS
from benchmarks.lib.shapes import Product
from benchmarks.lib.turns import Parent, serve

MOST_ROWS = 16_384
"""Rows of a weight that are measured; a larger output head is measured by this part."""
REPEATS = 3


def work(parent: Parent, spec: dict[str, Any]) -> None:
    """Measure until the parent is gone."""
    torch.set_num_threads(THREADS)
    products = [Product(*product) for product in spec["products"]]
    parent.answer(ready=True)
    while True:
        parent.wait()
        parent.answer(
            float32=rate(products, spec["tokens"], torch.float32),
            bfloat16=rate(products, spec["tokens"], torch.bfloat16),
        )


def rate(products: list[Product], tokens: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the products of one pass, the fastest of a few of each."""
    seconds = sum(seconds_of(product, tokens, dtype) for product in products)
    return sum(2.0 * tokens * product.parameters for product in products) / seconds


def seconds_of(product: Product, tokens: int, dtype: torch.dtype) -> float:
    """Return the seconds of the products of one kind; the output's memory is reused."""
    rows = min(product.rows, MOST_ROWS)
    x, w = torch.ones(tokens, product.columns, dtype=dtype), torch.ones(rows, product.columns)
    weight, out = w.to(dtype).t(), torch.empty(tokens, rows, dtype=dtype)
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(x, weight, out=out)
        times.append(time.perf_counter() - started)
    return min(times) * product.count * product.rows / rows


if __name__ == "__main__":
    serve(work)
