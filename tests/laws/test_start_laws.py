"""Where an adapter changes nothing yet, the layer gives the bits that it gives without it.

A reference measured with the adapter off (DPO, KTO, GRPO) equals the policy then, in any dtype.
"""

from __future__ import annotations

import pytest
import torch
from law_cases import STORED, Layer, Storage, seeded
from torch import nn

import inlay
from inlay.model.adapters.attach import disabled

HELD = {name: s.name for name, s in STORED.items() if name not in ("fp32", "bf16")} | {"d": "dense"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("storage", sorted({*HELD.values()}))
def test_lora_at_its_start(storage: str, biased: bool, dtype: torch.dtype) -> None:
    for width in (40, 64, 512):
        layer = Layer("linear", width=width, bias=biased).build()
        model = Storage(storage, dtype).hold_model(nn.Sequential(layer, nn.Identity()))
        inlay.attach(model, inlay.LoRA(rank=4), targets="0")
        for rows in (1, 7, 33):
            x = torch.randn(rows, width, generator=seeded(rows)).to(dtype)
            with disabled(model):
                wanted = model(x)
            assert torch.equal(model(x), wanted)
            with torch.no_grad():
                assert torch.equal(model.train()(x), wanted)
