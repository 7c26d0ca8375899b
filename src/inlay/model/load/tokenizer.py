"""Read the tokenizer of a model, or the processor of one that sees images."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from inlay.errors import ModelError
from inlay.model.load.libraries import failures_as_sentences
from inlay.model.load.vision import has_processor, read_processor, sees_images

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}; save it there "
            "with the tokenizer's save_pretrained"
        )
    with failures_as_sentences(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def read_reader(
    folder: Path, config: PreTrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Read the processor of a model that sees images and has one, else the tokenizer."""
    if not (sees_images(config) and has_processor(folder)):
        return read_tokenizer(folder, trust_remote_code)
    with failures_as_sentences(folder, "processor"):
        return read_processor(folder, config, trust_remote_code)
