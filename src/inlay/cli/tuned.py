"""A tuned model from its folder alone: the adapter, its base and the run it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.checkpoint.folder import CONFIG, read_folder
from inlay.errors import CheckpointError, UsageError
from inlay.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tuned:
    """Where an adapter lies, and how it was trained if its run says so."""

    adapter: Path
    base: str
    storage: str
    head_storage: str
    run: Mapping[str, Any]
    """The configuration of the run; empty for an adapter that no run lies beside."""
    trained_on: str = ""
    """The hash of the rows the run trained on; empty when no run says so."""
    head: Mapping[str, Any] | None = None
    """What the adapter's folder says of a head in place of the language model's."""
    record: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """All that run.json says; empty for an adapter that no run lies beside."""

    @property
    def task(self) -> Task:
        said = self.run.get("task")
        if said is not None:
            return TASKS[said] if said in TASKS else TASKS["sft"]
        head = self.head
        if head is None:
            return TASKS["sft"]
        return next(task for task in TASKS.values() if task.trained(head))


def find_tuned(directory: str) -> Tuned:
    """Import no torch; CheckpointError if no adapter, damaged, or without a base."""
    folder = Path(directory)
    within = (folder / "adapter" / CONFIG).is_file() and not (folder / CONFIG).is_file()
    adapter = folder / "adapter" if within else folder
    found = read_folder(adapter)
    record = run_record(folder if within else folder.parent)
    run = record.get("config", {})
    base = run.get("model") or found.base_model
    if not base:
        raise CheckpointError(
            f"{adapter} does not say which base model it was trained on; write it into "
            f"{CONFIG} as base_model_name_or_path"
        )
    storage = run.get("storage") or found.storage or "dense"
    data = str(record.get("data_sha256", "")).split("+")[0]
    head = (found.extras or {}).get("head")
    head_storage = run.get("head_storage") or found.head_storage or "dense"
    return Tuned(adapter, base, storage, head_storage, run, data, head, record)


def run_record(folder: Path) -> Mapping[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config = found["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); delete it") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: its config is not an object; delete it")
    return found


def load_tuned(
    tuned: Tuned, storage: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from inlay.checkpoint.adapter import load_adapter
    from inlay.model.load.heads import head_from
    from inlay.model.load.pretrained import load
    from inlay.model.load.vision import tokenizer_in

    model, reader = load(
        tuned.base,
        storage or tuned.storage,
        double_quant=tuned.run.get("double_quant", True),
        head_storage=tuned.head_storage,
        embedding_storage=tuned.run.get("embedding_storage", "dense"),
        dtype=dtype or tuned.run.get("dtype", "auto"),
        stream=tuned.run.get("stream", "off"),
        revision=tuned.run.get("revision"),
        head=None if tuned.head is None else head_from(tuned.head, str(tuned.adapter)),
    )
    load_adapter(model, tuned.adapter)
    return model, tokenizer_in(reader)


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def exactly_one(given: Mapping[str, object | None]) -> None:
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if len(named) != 1:
        wanted = " or ".join(f"--{name}" for name in given)
        raise UsageError(f"give {wanted}, {'not both' if named else 'one of them'}")
