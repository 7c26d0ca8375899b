"""Train the pocket model's tokenizer: byte-level BPE of 4096 entries with a chat template.

python examples/pocket/tokenizer.py --work /tmp/pocket --out src/inlay/model/pocket
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)


def plain_texts(path: Path) -> Iterator[str]:
    """The documents of a split without the chat marks."""
    with path.open() as lines:
        for line in lines:
            text = json.loads(line)["text"]
            for mark in SPECIAL:
                text = text.replace(mark, "")
            yield text


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-pair merges over the texts; every digit stays a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        extra_special_tokens=SPECIAL[2:],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def main() -> None:
    """Train on the training split and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train_tokenizer(plain_texts(args.work / "train.jsonl")).save_pretrained(args.out)


if __name__ == "__main__":
    main()
