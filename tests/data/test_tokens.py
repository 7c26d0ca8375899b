from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from inlay.data.raw import RawRow
from inlay.data.read import read_rows
from inlay.data.rows import Rows, normalise
from inlay.data.summary import Lengths, pieces, summarise
from inlay.data.text_reader import TextReader
from inlay.data.tokens import Encoded, encode
from inlay.errors import DataError, ModelError

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KEEPS_LAST = "{% for m in messages %}{{ m['role'] }}{% if loop.last %}!{% endif %}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is the heart big?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Are the lungs clear?"},
    {"role": "assistant", "content": "Yes, both lungs."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((r.values["prompt"] for r in read_rows("reports")[:200]), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
    )
    made.chat_template = MARKED
    return made


def rows_of(*values: dict[str, Any]) -> Rows:
    return normalise([RawRow(v, "d.jsonl", n) for n, v in enumerate(values, start=1)])


TEXT = rows_of({"text": "The heart is big."}, {"text": "Ends itself.<|end|>"})
PAIRS = rows_of(
    {"prompt": "Findings: clear lungs.\nImpression:", "completion": "Normal."},
    {"prompt": "Ask: ", "completion": "Ümläut 心"},
    {"prompt": "Line\n", "completion": "next\n\nline"},
)
MESSAGES = rows_of({"messages": CHAT}, {"messages": CHAT[1:3]})


def as_trl_prepares(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, max_length: int, folder: Path
) -> list[tuple[list[int], list[bool]]]:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    args = SFTConfig(
        output_dir=str(folder),
        max_length=max_length,
        assistant_only_loss=rows.kind == "messages",
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list(rows.rows),
        processing_class=tokenizer,
    )
    prepared = [dict(row) for row in trainer.train_dataset]
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in prepared]


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [512, 24])
@pytest.mark.parametrize("rows", [TEXT, PAIRS, MESSAGES], ids=lambda rows: rows.kind)
def test_what_is_shown_is_what_trl_trains_on(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, max_length: int, tmp_path: Path
) -> None:
    if max_length == 24 and rows is MESSAGES:
        max_length = 60
    ours = [(e.input_ids, e.trained) for e in encode(rows, TextReader(tokenizer), max_length)]
    assert ours == as_trl_prepares(rows, tokenizer, max_length, tmp_path)


def trained_text(row: Encoded, tokenizer: PreTrainedTokenizerFast) -> str:
    return "".join(piece.text for piece in pieces(row, tokenizer) if piece.trained)


def test_a_completion_and_its_end_train_and_the_prompt_does_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encoded = encode(PAIRS, TextReader(tokenizer), 512)
    assert [trained_text(row, tokenizer) for row in encoded] == [
        " Normal.<|end|>",
        " Ümläut 心<|end|>",
        "next\n\nline<|end|>",
    ]
    assert all(row.ends and row.prompt_kept and not row.truncated for row in encoded)


def test_a_text_trains_from_start_to_one_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(TEXT, TextReader(tokenizer), 512)
    assert all(all(row.trained) for row in encoded)
    assert [row.input_ids.count(tokenizer.eos_token_id) for row in encoded] == [1, 1]


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["marked", "plain"])
def test_only_the_assistants_turns_train(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    encoded = encode(MESSAGES, TextReader(tokenizer, lambda _: template), 512)
    assert trained_text(encoded[0], tokenizer) == "No.<|end|>Yes, both lungs.<|end|>"
    assert all(row.ends for row in encoded)
    assert encoded == encode(MESSAGES, TextReader(tokenizer), 512)


def test_the_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(PAIRS, TextReader(tokenizer), 512)[1]
    shown = pieces(row, tokenizer)
    assert "".join(piece.text for piece in shown) == "Ask: Ümläut 心<|end|>"
    assert all("\ufffd" not in piece.text for piece in shown)


def test_the_summary_counts_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(PAIRS, TextReader(tokenizer), 512)
    counts = sorted(row.length for row in whole)
    found = summarise(whole, PAIRS)
    assert (found.rows, found.tokens) == (3, sum(counts))
    assert found.lengths == Lengths(counts[0], counts[1], counts[2], counts[2])
    assert found.trained_tokens == sum(sum(row.trained) for row in whole)
    assert (found.truncated, found.unended, found.ends_trained) == ([], [], 3)
    cut = encode(PAIRS, TextReader(tokenizer), counts[-1] - 1)
    longest = [
        line for line, row in zip(PAIRS.lines, whole, strict=True) if row.length == counts[2]
    ]
    assert summarise(cut, PAIRS).truncated == longest
    assert summarise(cut, PAIRS).lengths == found.lengths
    assert summarise(cut, PAIRS).ends_trained == 3 - len(longest)


def test_an_end_that_is_not_trained_is_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    late = MARKED.replace("+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|end|>")
    encoded = encode(MESSAGES, TextReader(tokenizer, lambda _: late), 512)
    assert summarise(encoded, MESSAGES).unended == [1, 2]


def test_a_prompt_that_merges_with_its_completion_is_listed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    merged = Rows("prompt_completion", [{"prompt": "the hea", "completion": "rt"}], [7], "d", "")
    assert summarise(encode(merged, TextReader(tokenizer), 99), merged).unlike_prompt == [7]


def test_rows_with_nothing_to_train_on_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    needed = max(row.length for row in encode(PAIRS, TextReader(tokenizer), 512)[:1])
    message = rf"^d\.jsonl, line 1: the prompt fills all 6 tokens.*max_length {needed} keeps"
    with pytest.raises(DataError, match=message):
        encode(PAIRS.take([0, 1]), TextReader(tokenizer), 6)
    with pytest.raises(DataError, match=r"line 1 and 2 more \(2, 3\): the prompt fills all 1 "):
        encode(PAIRS, TextReader(tokenizer), 1)
    nothing = MARKED.replace("+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}").replace(
        "{{ m['content'] }}", ""
    )
    nothing = nothing.replace("{% generation %}{{ m['content'] }}", "{% generation %}")
    with pytest.raises(DataError, match="no token is trained on"):
        encode(MESSAGES, TextReader(tokenizer, lambda _: nothing), 512)


def test_a_tokenizer_that_cannot_do_it_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="no end token"):
        encode(TEXT, TextReader(bare), 512)
    with pytest.raises(ModelError, match="no chat template"):
        encode(MESSAGES, TextReader(bare), 512)
    with pytest.raises(ModelError, match="otherwise once more turns follow"):
        encode(MESSAGES, TextReader(tokenizer, lambda _: KEEPS_LAST), 512)
    refusing = "{{ raise_exception('no system') }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: .*refuses the messages: no system"):
        encode(MESSAGES, TextReader(tokenizer, lambda _: refusing), 512)
