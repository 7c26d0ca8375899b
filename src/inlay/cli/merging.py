"""Merge a tuned model, save it as a plain folder, and check what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.checkpoint.folder import share_as_usual
from inlay.data.rows import Rows
from inlay.errors import MergeError
from inlay.model.load import load, quiet_transformers
from inlay.model.merge import merge
from inlay.train.files import saving, write_folder, write_json
from inlay.train.rows import encode_rows

REPORT = "merge.json"

Batches = Sequence[Mapping[str, Tensor]]


def encoded_batches(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """Return each row as a batch of its own, cut as training cuts it."""
    encoded = encode_rows(rows, tokenizer, max_length)
    ids = [torch.tensor([row.input_ids], device=device) for row in encoded]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def merge_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    inputs: Batches | None,
    storage: Literal["dense", "keep"],
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Merge in place, save model, tokenizer and report, all or nothing; return the report.

    Raises:
        MergeError: a method cannot merge, the update would be lost, or what was saved differs.
        TrainingError: the disk is full or the place cannot be written.
    """
    report = asdict(merge(model, inputs=inputs, storage=storage))
    record = {**about, "storage": storage, **report}

    def fill(folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            share_as_usual(weights)
        record["reloaded_logit_difference"] = check_saved(model, folder)
        write_json(folder / REPORT, record)

    with saving("the merged model", output):
        write_folder(output, fill)
    return record


@torch.no_grad()
def check_saved(model: PreTrainedModel, folder: Path) -> float:
    """Load what was saved and return how far its logits are from the model's; raise if at all."""
    again, _ = load(str(folder), device=model.device)
    seed = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (2, 32), generator=seed).to(model.device)
    model.eval()
    difference = float((again(ids).logits - model(ids).logits).abs().max())
    if difference != 0:
        raise MergeError(
            f"the merged model, saved and loaded again, differs by {difference:.3g} in its logits; "
            "expected none, so nothing was saved"
        )
    return difference
