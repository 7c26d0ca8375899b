"""`inlay merge`: an adapter into its base, checked, as a plain model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show, summary
from inlay.cli.options import Parser, checked, same
from inlay.data.rows import Format
from inlay.errors import DataError, UsageError
from inlay.run.config import Text
from inlay.run.flags import flags_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from inlay.cli.rows import Measured
    from inlay.cli.tuned import Tuned
    from inlay.train.task_run import TaskRun

ABOUT = "Merge an adapter into its base, check the result on real rows, and save a plain model."
USAGE = "inlay merge --adapter DIR --output DIR [flags]"
EXAMPLES = """examples:
  inlay merge --adapter run --output merged
  inlay merge --adapter run --output merged --data test.jsonl --json"""


READERS = {
    "sequence": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
"""What a head is for -> the class that reads such a model."""
OWN = {
    "adapter", "output", "storage", "dtype", "accept_loss", "data", "rows", "overwrite", "threads",
}  # fmt: skip
"""The flags that do not say how rows are read."""


class MergeOptions(BaseModel):
    """The flags of `inlay merge`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    adapter: Text = Field(description="folder of a run, or of an adapter")
    output: Text = Field(description="new folder for the merged model")
    storage: Literal["dense", "keep"] = Field(
        "dense",
        description="dense: merge into dense weights; keep: stay quantised if that loses little",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype to merge and save in; default: the run's"
    )
    accept_loss: bool = Field(
        False, description="merge even where rounding takes most of the adapter's effect"
    )
    data: Text | None = Field(
        None, description="rows to check on; default: the run's held-out rows, else random tokens"
    )
    format: Format = same("format")
    prompt: Text | None = same("prompt")
    completion: Text | None = same("completion")
    text: Text | None = same("text")
    rows: PositiveInt = Field(16, description="rows to check on, at most")
    overwrite: bool = Field(False, description="replace an existing folder")
    threads: PositiveInt | None = same("threads")


def parser(argv: Sequence[str]) -> Parser:
    del argv
    found = Parser("merge", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(MergeOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    from inlay.cli.measuring import task_run_for
    from inlay.cli.tuned import find_tuned, load_tuned, set_threads
    from inlay.train.rows import sample

    as_json = given.pop("json", False)
    options = checked(MergeOptions, given)
    output = Path(options.output)
    check_free(output, options.overwrite)
    tuned = find_tuned(options.adapter)
    found = rows_to_check(options, tuned)
    set_threads(options.threads)
    model, tokenizer = load_tuned(tuned, dtype=None if options.dtype == "auto" else options.dtype)

    from inlay.cli.merged_folder import merge_and_save
    from inlay.files import size_of

    task = None if found is None else task_run_for(tuned, model, found)
    inputs = None
    if task is not None and found is not None:
        rows = sample(task.answers(found.rows), options.rows)
        calls = task.merge_inputs(model, rows)
        inputs = [{name: x.to(model.device) for name, x in call.items()} for call in calls]
    about = {"base": tuned.base, "adapter": str(tuned.adapter)}
    finish = finishing(model, tuned, task)
    record = merge_and_save(
        model, tokenizer, output, inputs, options.storage, about, finish, options.accept_loss
    )
    if as_json:
        show.as_json({**record, "output": str(output), "bytes": size_of(output)})
        return 0
    summary.merged(record)
    print(f"\nSaved in {output} ({show.size(size_of(output))}).")
    print(f"Load it with {reader(model, tuned)}({str(output)!r}).")
    for sentence in tuned.task.merged_readers(str(output)):
        print(sentence)
    return 0


def finishing(
    model: PreTrainedModel, tuned: Tuned, task: TaskRun[Any, Any] | None
) -> Callable[[Path], None] | None:
    from inlay.cli.measuring import own_task_run
    from inlay.model.load.folder import located
    from inlay.model.load.vision import copy_processor, sees_images

    if sees_images(model.config):
        base = located(tuned.base, tuned.run.get("revision"))
        return lambda folder: copy_processor(base, folder)
    if not tuned.task.has_head:
        return None
    run = task if task is not None else own_task_run(tuned)
    return lambda folder: run.finish_merged(model, folder)


def reader(model: PreTrainedModel, tuned: Tuned) -> str:
    from inlay.model.load.vision import sees_images

    if sees_images(model.config) and tuned.head is None:
        return "AutoModelForImageTextToText.from_pretrained"
    purpose = str((tuned.head or {}).get("purpose"))
    return f"{READERS.get(purpose, 'AutoModelForCausalLM')}.from_pretrained"


def check_free(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UsageError(f"{output} is not empty; name a new folder, or give --overwrite")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name a new folder")


def rows_to_check(options: MergeOptions, tuned: Tuned) -> Measured | None:
    """Return the rows named, else those the run held out; None where there are none."""
    if options.data is None and not tuned.run:
        return None
    from inlay.cli.rows import rows_named

    given = options.model_dump(exclude_unset=True, exclude=OWN)
    try:
        found = rows_named(tuned, options.data, given)
    except DataError as error:
        if options.data is not None:
            raise
        raise DataError(
            f"the rows that the run held out cannot be read, to check the merge on them: {error} "
            "Bring them back, or name others with --data"
        ) from None
    return found if len(found.rows) else None
