"""A real pre-trained encoder learns normal-or-not from real reports, then merges."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch
from real_data import REPORTS, encoder_folder, needs_encoder, needs_reports
from scipy.stats import binomtest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

import inlay
from inlay.model.adapters.report import report

pytestmark = [
    pytest.mark.slow,
    needs_reports,
    needs_encoder,
]


def rows() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (findings, normal or not) of the real reports, split by uid."""
    with REPORTS.open(newline="") as file:
        found = [r for r in csv.DictReader(file) if r["findings"].strip()]
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for row in found:
        held_out = int(hashlib.sha256(row["uid"].encode()).hexdigest(), 16) % 5 == 0
        parts[held_out].append((row["findings"], int(row["Problems"] == "normal")))
    return parts


def batch(tokenizer: object, part: list[tuple[str, int]]) -> tuple[BatchEncoding, torch.Tensor]:
    assert callable(tokenizer)
    texts, labels = zip(*part, strict=True)
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    return encoded, torch.tensor(labels)


def test_a_real_encoder_learns_normal_or_not_and_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    inlay.attach(model, inlay.LoRA(rank=8, alpha=16), layers="3-5", modules_to_save=["classifier"])
    assert report(model).percent < 3
    train, held_out = rows()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, 16 * 40, 16):
        encoded, labels = batch(tokenizer, [train[i] for i in order[start : start + 16]])
        model(**encoded, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    encoded, labels = batch(tokenizer, held_out[:256])
    with torch.no_grad():
        right = (model(**encoded).logits.argmax(-1) == labels).sum().item()
    majority = max(labels.float().mean().item(), 1 - labels.float().mean().item())
    assert binomtest(int(right), len(labels), majority, alternative="greater").pvalue < 1e-6

    with torch.no_grad():
        adapted = model(**encoded).logits
    inlay.save_adapter(model, tmp_path / "adapter")
    merged = inlay.merge(model, inputs=[dict(encoded)])
    assert merged.top1_agreement == 1.0
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(**encoded).logits, adapted, atol=1e-4, rtol=1e-4)

    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    inlay.load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(**encoded).logits, adapted, atol=1e-5, rtol=1e-5)
