"""Merge a tuned model, save it as a plain folder, and check what was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.files import share_as_usual, write_folder, write_json
from inlay.model.load.libraries import quiet_transformers
from inlay.model.merge.merge import inputs_for, merged
from inlay.model.merge.save import check_written
from inlay.train.output.saving import saving

REPORT = "merge.json"

Batches = Sequence[Mapping[str, Tensor]]


def merge_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    inputs: Batches | None,
    storage: Literal["dense", "keep"],
    about: Mapping[str, str],
    finish: Callable[[Path], None] | None = None,
    accept_loss: bool = False,
) -> dict[str, Any]:
    """Merge in place, save model, tokenizer and report, all or nothing; return the report.

    `finish` adds to the folder what a task needs there, before it is read back by transformers and
    compared with the adapted model on the inputs.
    """
    batches = inputs_for(model) if inputs is None else inputs
    said = "random" if inputs is None else "given"
    report, adapted = merged(model, batches, said, storage, accept_loss=accept_loss)
    record = {**about, "storage": storage, **asdict(report)}

    def fill(folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if finish is not None:
                finish(folder)
        for weights in folder.glob("*.safetensors"):
            share_as_usual(weights)
        record.update(asdict(check_written(model, folder, batches, adapted)))
        write_json(folder / REPORT, record)

    with saving("the merged model", output):
        write_folder(output, fill)
    return record
