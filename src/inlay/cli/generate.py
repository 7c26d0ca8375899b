"""`inlay generate`: complete a prompt, or the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from inlay.cli import show
from inlay.cli.options import Parser, checked, same
from inlay.errors import UsageError
from inlay.run.config import Text
from inlay.run.flags import flags_of
from inlay.storage.table import StorageName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from inlay.cli.rows import Measured
    from inlay.cli.tuned import Tuned
    from inlay.train.language_run import Prompts

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
    del argv
    found = Parser("generate", USAGE, ABOUT, EXAMPLES)
    found.add_flags("flags", flags_of(GenerateOptions))
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
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
            f"{options.adapter} was trained for the task {tuned.task.name!r}, and a model with "
            "such a head writes no text; measure it with inlay eval"
        )
    found = rows_to_continue(options, tuned)
    set_threads(options.threads)
    model, tokenizer = loaded(options, tuned)
    found = continued(options, model, tokenizer, found, tuned)
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


def rows_to_continue(options: GenerateOptions, tuned: Tuned | None) -> Measured | None:
    """None when the prompt is given as text; all rows where only some have an answer."""
    if options.data is None:
        return None
    from inlay.cli.rows import keys_for, rows_of

    given = options.model_dump(exclude_unset=True, exclude={"prompt", "image", "max_rows"})
    keys = keys_for(tuned.run if tuned else {}, given)
    if tuned is None or tuned.task.answers_all_rows:
        keys["max_rows"] = options.max_rows
    return rows_of(options.data, tuned, {**keys, "model": options.model} if options.model else keys)


def loaded(
    options: GenerateOptions, tuned: Tuned | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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
    found: Measured | None,
    tuned: Tuned | None,
) -> list[dict[str, str]]:
    from inlay.evaluate.generation import generate
    from inlay.model.adapters.attach import disabled

    if found is None:
        prompts = prompt_given(options, model, tuned)
    else:
        prompts = prompts_of(options, model, found, tuned)

    def texts() -> list[str]:
        given, limit = prompts.tokens, options.generate_tokens
        return generate(model, tokenizer, given, limit, fill=prompts.fill)

    rows = [{**row, "text": text} for row, text in zip(prompts.shown, texts(), strict=True)]
    if options.base:
        with disabled(model):
            rows = [{**row, "base": text} for row, text in zip(rows, texts(), strict=True)]
    return rows


def prompts_of(
    options: GenerateOptions, model: PreTrainedModel, found: Measured, tuned: Tuned | None
) -> Prompts:
    """Encode the prompts just as in training; UsageError where the rows have none."""
    from inlay.cli.measuring import reading
    from inlay.cli.rows import at_most

    revision = tuned.run.get("revision") if tuned else None
    run = reading(found, base_of(options, tuned), revision)
    if run.images is not None:
        run.images.prepare_again(model)
    prompts = run.prompts(at_most(run.answers(found.rows), options.max_rows))
    if not prompts.tokens:
        raise UsageError("the rows are plain text without a prompt; give --prompt instead")
    return prompts


def prompt_given(options: GenerateOptions, model: PreTrainedModel, tuned: Tuned | None) -> Prompts:
    from inlay.data.image_inputs import ImageInputs
    from inlay.data.image_reader import image_reader
    from inlay.data.image_tokens import question
    from inlay.data.picture import picture_at
    from inlay.evaluate.images import Seeing
    from inlay.evaluate.samples import Sample
    from inlay.model.load.folder import located
    from inlay.train.language_run import Prompts

    assert options.prompt is not None
    shown = [{"prompt": options.prompt}]
    if not options.image:
        return Prompts([options.prompt], shown)
    run = tuned.run if tuned else {}
    pictures = [picture_at(file, f"--image {file}", Path.cwd()) for file in options.image]
    folder = located(base_of(options, tuned), run.get("revision"))
    reader = image_reader(folder, run.get("max_pixels"))
    row = question(reader, options.prompt, pictures)
    sample = Sample(0, 1, tuple(row.input_ids), "")
    seeing = Seeing(ImageInputs(reader, model.dtype))
    return Prompts([row.input_ids], shown, seeing.filling([row], [sample]))


def base_of(options: GenerateOptions, tuned: Tuned | None) -> str:
    base = tuned.base if tuned else options.model
    assert base is not None
    return base
