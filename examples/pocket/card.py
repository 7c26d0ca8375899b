"""Write the pocket model's card from ``result.json``.

python examples/pocket/card.py --model src/inlay/model/pocket
"""

import argparse
import json
from pathlib import Path

CARD = """\
# Pocket

A small English causal language model that Inlay embeds, so that tuning can be tried and tested
without downloading anything. It is a real model, trained on real text, but a very small one:
use it for trying things out, not for its answers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("src/inlay/model/pocket")
tokenizer = AutoTokenizer.from_pretrained("src/inlay/model/pocket")
```

## Architecture

`LlamaForCausalLM`: 6 layers, width 256, 4 query heads and 2 key-value heads of 64, SwiGLU of 704,
rotary positions up to 1024, tied embeddings. {parameters:,} parameters, stored in bf16 in
{megabytes:.1f} MB.

The tokenizer is a byte-level BPE of 4096 entries; every digit is a token. `<|end|>` closes a
document and an assistant's turn (it is the end-of-sequence token), `<|pad|>` pads, and
`<|system|>`, `<|user|>` and `<|assistant|>` open the turns of the chat template, which marks what
the assistant says for loss masks. Nothing is put before a text. `<|system|>` does not occur in
the training text, and its embedding is untrained.

## What it read

{tokens:,} tokens in {steps:,} steps, which is {epochs:.2f} of a pass over the {corpus:,} tokens of
the training split, in random order of the documents; windows of 512 tokens, in the last 7% of the
time windows of 1024. Seed {seed}, {threads} CPU cores
(AMD EPYC with AVX-512 bf16) shared with other work, {minutes:.0f} minutes, {speed:,.0f} tokens per
second on average. The other work slowed the end of the run, so that windows of 1024 make up only
about a dozen of its steps.

| source (Debian package) | licence | MB | tokens to train on | tokens read |
| --- | --- | ---: | ---: | ---: |
{sources}

`gsm8k` is the training file of GSM8K; `r-cran-janeaustenr` is Jane Austen's novels. Half
of GSM8K and a part of WordNet's definitions were
written as chats. Bytes are those left after cleaning, the held-out documents included. No
radiology report was read: no source holds clinical text, paragraphs with a report's section
headings were dropped, and the medical words it knows come mostly from dictionaries.
The scripts are in
`examples/pocket/`.

## How good it is

On {documents} documents ({bytes:,} bytes) held out before training, with no paragraph in common
with the training text:

| model | bits per byte |
| --- | ---: |
| **pocket** | **{model}** |
| pocket, in windows of 512 tokens | {model_windows_of_512} |
| unigram over the tokens (training frequencies) | {unigram_tokens} |
| uniform over the tokens | {uniform_tokens} |
| uniform over bytes | {uniform_bytes} |

By source, where at least 5 kB were held out: {by_source}.

Documents written as chats are not in this measure. Each document was read in separate windows of
1024 tokens after an end token; the end of a document counts as a token to predict.

## Samples

Not selected; {settings}.

{samples}

## Limits

It writes recognisable English of the kinds it read -- documentation, dictionary entries, older
prose, scripture -- and loses the thread within a sentence or two. It does not know facts, cannot
calculate, and follows no instructions beyond imitating the form of an answer. Much of its text is
religious or old, and it repeats the views of that text. It knows English only, and no more than
1024 tokens at a time; positions beyond 512 were trained only briefly. It
must not be used for anything clinical.
"""


def source_row(row: dict) -> str:
    """One line of the table of sources."""
    size, tokens, read = row["bytes"] / 1e6, row["train_tokens"], row["read_tokens"]
    return f"| {row['source']} | {row['licence']} | {size:.2f} | {tokens:,} | {read:,} |"


def sample_text(sample: dict[str, str]) -> str:
    """A sample, the prompt first."""
    return f"```text\n{sample['prompt']}[...]{sample['text']}\n```"


def card(result: dict) -> str:
    """The whole card."""
    training, held = result["training"], result["held_out"]
    large = {s: b for s, b in held["by_source"].items() if held["bytes_by_source"][s] >= 5000}
    return CARD.format(
        parameters=result["parameters"],
        megabytes=result["file_bytes"] / 1e6,
        tokens=training["tokens"],
        steps=training["steps"],
        epochs=training["tokens"] / training["corpus_tokens"],
        corpus=training["corpus_tokens"],
        speed=training["tokens"] / training["seconds"],
        seed=training["seed"],
        threads=training["threads"],
        minutes=training["seconds"] / 60,
        sources="\n".join(map(source_row, result["sources"])),
        documents=held["documents"],
        bytes=held["bytes"],
        **held["bits_per_byte"],
        by_source=", ".join(f"{name} {bits:.2f}" for name, bits in large.items()),
        settings=", ".join(f"{k} {v}" for k, v in result["sample_settings"].items()),
        samples="\n\n".join(map(sample_text, result["samples"])),
    )


def main() -> None:
    """Write the card beside the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    result = json.loads(Path(__file__).with_name("result.json").read_text())
    (args.model / "README.md").write_text(card(result))


if __name__ == "__main__":
    main()
