"""`inlay generate`: complete a prompt, or the rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show
from inlay.cli.options import Parser, checked, same
from inlay.errors import UsageError
from inlay.run.config import Text
from inlay.run.flags import flags_of
from inlay.storage.table import StorageName
from inlay.train.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inlay.cli.tuned import Tuned
    from inlay.data.rows import Rows
    from inlay.evaluate.generation import Fill

ABOUT = "Generate the most likely continuation of a prompt, or of the prompts in a file."
USAGE = """inlay generate --adapter DIR --prompt TEXT [flags]
       inlay generate --model M --data D [flags]"""
EXAMPLES = """examples:
  inlay generate --adapter run --prompt "The heart is"
  inlay generate --adapter run --prompt "Which digit is this?" --image digit.png
  inlay generate --adapter run --data test.jsonl --max-rows 5 --base"""


class GenerateOptions(BaseModel):
    """The flags of `inlay generate`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    adapter: Text | None = Field(None, description="folder of a run, or of an adapter")
    model: Text | None = Field(None, description="a model without adapter, instead of --adapter")
    storage: StorageName | None = Field(
        None, description="storage format of the frozen weights; default: the run's"
    )
    prompt: Text | None = Field(
        None, description="text to continue, taken literally; with --image, a question"
    )
    image: list[Text] | None = Field(None, description="image files that the prompt asks about")
    data: Text | None = Field(None, description="file whose prompts to continue")
    max_rows: PositiveInt = Field(3, description="maximum rows of the file to continue")
    generate_tokens: PositiveInt = same("generate_tokens")
    base: bool = Field(False, description="also show the answers of the base")
    threads: PositiveInt | None = same("threads")


def parser(argv: Sequence[str]) -> Parser:
    """Return the verb's flags."""
    del argv
    found = Parser("generate", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(GenerateOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    """Write what the model says."""
    from inlay.cli.tuned import exactly_one, find_tuned, set_threads

    as_json = given.pop("json", False)
    options = checked(GenerateOptions, given)
    exactly_one({"adapter": options.adapter, "model": options.model})
    exactly_one({"prompt": options.prompt, "data": options.data})
    if options.image and options.prompt is None:
        raise UsageError("--image needs --prompt: what to ask about it")
    if options.base and options.adapter is None:
        raise UsageError("--base compares with the model under an adapter; give --adapter")
    tuned = find_tuned(options.adapter) if options.adapter else None
    if tuned is not None and tuned.head is not None:
        raise UsageError(
            f"{options.adapter} was trained for the task {tuned.task!r}, and a model with such a "
            "head writes no text; measure it with inlay eval"
        )
    rows = rows_to_continue(options, tuned)
    set_threads(options.threads)
    model, tokenizer = loaded(options, tuned)
    found = continued(options, model, tokenizer, rows, tuned)
    if as_json:
        show.as_json(found)
        return 0
    for number, row in enumerate(found):
        if number:
            print()
        if len(found) == 1 and list(row) == ["prompt", "text"]:
            print(row["text"].strip())
        else:
            show.facts(row.items())
    return 0


def rows_to_continue(options: GenerateOptions, tuned: Tuned | None) -> Rows | None:
    """Return the rows of the file, or None when the prompt is given as text.

    Labelled ones are all read: the first of them may have one label, or be the undesirable ones.
    """
    if options.data is None:
        return None
    from inlay.cli.rows import answers, at_most, keys_for, rows_of

    given = options.model_dump(exclude_unset=True, exclude={"prompt", "image", "max_rows"})
    keys = keys_for(tuned.run if tuned else {}, given)
    if tuned is None or TASKS[tuned.task].rows != "labelled":
        keys["max_rows"] = options.max_rows
    return at_most(answers(rows_of(options.data, keys)), options.max_rows)


def loaded(
    options: GenerateOptions, tuned: Tuned | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the tuned model, or the plain one."""
    from inlay.cli.tuned import load_tuned
    from inlay.model.load.pretrained import load
    from inlay.model.load.vision import tokenizer_in

    if tuned is not None:
        return load_tuned(tuned, options.storage)
    assert options.model is not None
    model, reader = load(options.model, options.storage or "dense")
    return model, tokenizer_in(reader)


def continued(
    options: GenerateOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows | None,
    tuned: Tuned | None,
) -> list[dict[str, str]]:
    """Return each prompt with its continuation, the base's too when asked for."""
    from inlay.evaluate.generation import generate
    from inlay.model.adapters.attach import disabled

    prompts, shown, fill = prompts_of(options, model, tokenizer, rows, tuned)

    def texts() -> list[str]:
        return generate(model, tokenizer, prompts, options.generate_tokens, fill=fill)

    found = [{**row, "text": text} for row, text in zip(shown, texts(), strict=True)]
    if options.base:
        with disabled(model):
            found = [{**row, "base": text} for row, text in zip(found, texts(), strict=True)]
    return found


def prompts_of(
    options: GenerateOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows | None,
    tuned: Tuned | None,
) -> tuple[list[Any], list[dict[str, str]], Fill | None]:
    """Return the prompts, rows' as tokens just as in training, what to show, and their images."""
    run = tuned.run if tuned else {}
    base = tuned.base if tuned else options.model
    assert base is not None
    if rows is None:
        assert options.prompt is not None
        shown = [{"prompt": options.prompt}]
        if not options.image:
            return [options.prompt], shown, None
        ids, fill = asked(options.prompt, options.image, model, run, base)
        return [ids], shown, fill
    from inlay.cli.reading import read
    from inlay.evaluate.run import choose_samples

    keys = {"max_length": same("max_length").default, **run}
    found = read(rows, model, tokenizer, keys, base, run.get("revision"))
    encoded = found.encoded
    if rows.kind == "prompt":
        prompts = [row.input_ids for row in encoded]
        texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        lines = zip(rows.lines, texts, strict=True)
        shown = [{"line": str(line), "prompt": text.strip()} for line, text in lines]
        return prompts, shown, None
    samples = choose_samples(rows, encoded, len(rows))
    if not samples:
        raise UsageError("the rows are plain text without a prompt; give --prompt instead")
    decoded = tokenizer.batch_decode([list(s.prompt) for s in samples], skip_special_tokens=True)
    shown = [
        {"line": str(sample.line), "prompt": text.strip(), "expected": sample.reference}
        for sample, text in zip(samples, decoded, strict=True)
    ]
    fill = None if found.seeing is None else found.seeing.filling(encoded, samples)
    return [sample.prompt for sample in samples], shown, fill


def asked(
    prompt: str, files: Sequence[str], model: PreTrainedModel, run: Mapping[str, Any], base: str
) -> tuple[list[int], Fill]:
    """Return a question about images as tokens, and what gives the images."""
    from inlay.cli.reading import seen_by
    from inlay.data.picture import picture_at
    from inlay.data.processor import image_reader
    from inlay.data.vision import question
    from inlay.evaluate.run import Sample
    from inlay.model.load.folder import located

    pictures = [picture_at(file, f"--image {file}", Path.cwd()) for file in files]
    reader = image_reader(located(base, run.get("revision")), run.get("max_pixels"))
    row = question(reader, prompt, pictures)
    sample = Sample(0, 1, tuple(row.input_ids), "")
    return row.input_ids, seen_by(model, reader).filling([row], [sample])
