from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from heads_tiny import make_encoder, write
from transformers import AutoTokenizer

from inlay.data.inputs import encode_texts, longest_input
from inlay.data.read import read_rows
from inlay.data.rows import Rows
from inlay.errors import DataError
from inlay.kernels.loss import IGNORED
from inlay.tasks.classify.rows import (
    check_known,
    classes_of,
    contradicting,
    loose_tags,
    normalise_labels,
)
from inlay.tasks.classify.tokens import encode_labels


def read(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Rows:
    return normalise_labels(read_rows(write(folder / "rows.jsonl", rows)), **keys)


def read_csv(folder: Path, text: str, **keys: Any) -> Rows:
    (folder / "rows.csv").write_text(text)
    return normalise_labels(read_rows(folder / "rows.csv"), **keys)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_encoder(tmp_path_factory.mktemp("t") / "encoder"))


@pytest.mark.parametrize(
    ("label", "kind"),
    [("yes", "class"), (3, "class"), (True, "class"), (2.0, "class"), (0.5, "number"),
     (["a", "b"], "classes"), ([], "classes")],
)  # fmt: skip
def test_the_kind_is_recognised_from_the_labels(tmp_path: Path, label: Any, kind: str):
    assert read(tmp_path, [{"text": "heart", "label": label}]).kind == kind


def test_a_table_has_its_numbers_as_text(tmp_path: Path):
    found = read_csv(tmp_path, "text,label\nheart,1\nlungs,2.5\n")
    assert (found.kind, [row["label"] for row in found.rows]) == ("number", [1.0, 2.5])
    found = read_csv(tmp_path, "text,label\nheart,1\nlungs,0\n")
    assert (found.kind, classes_of(found)) == ("class", ("0", "1"))
    assert read_csv(tmp_path, "text,label\nheart,1\n", kind="regression").rows[0]["label"] == 1.0


def test_words_and_tags_are_recognised(tmp_path: Path):
    found = read(tmp_path, [{"tokens": ["heart", "large"], "tags": ["B-x", "O"]}])
    assert (found.kind, found.rows[0]["tags"]) == ("tags", ["B-x", "O"])


def test_columns_and_templates_are_named(tmp_path: Path):
    row = {"q": "heart", "a": "clear", "stars": 4, "other": 1}
    found = read(tmp_path, [row], text="{q} large", text_pair="a", label="stars")
    assert found.rows == [{"text": "heart large", "text_pair": "clear", "label": "4"}]


def test_rows_of_one_text_stay_together(tmp_path: Path):
    rows = [{"text": "heart", "label": "a"}, {"text": "heart", "label": "b"}]
    found = read(tmp_path, rows)
    assert found.groups is not None
    assert found.groups[0] == found.groups[1]
    assert contradicting(found) == [2]
    apart = [{**row, "uid": i} for i, row in enumerate(rows)]
    assert read(tmp_path, apart, group="uid").groups == ["0", "1"]


@pytest.mark.parametrize(
    ("row", "keys", "sentence"),
    [
        ({"text": "heart"}, {}, "line 2: no field 'label'"),
        ({"text": "", "label": "a"}, {}, "line 2: 'text' is blank"),
        ({"text": "heart", "label": None}, {}, "line 2: 'label' is null"),
        ({"text": "heart", "label": ""}, {}, "line 2: 'label' is blank"),
        ({"text": "heart", "label": {"a": 1}}, {}, "line 2: 'label' is of type dict"),
        ({"text": "heart", "label": "x"}, {"kind": "regression"}, "line 2: 'label' is 'x'; kind"),
        ({"text": "h", "label": "nan"}, {"kind": "regression"}, "line 2: 'label' is nan; expected"),
        ({"text": "h", "label": "inf"}, {"kind": "regression"}, "line 2: 'label' is inf"),
        ({"text": "h", "label": None}, {"kind": "regression"}, "line 2: 'label' is empty"),
        ({"text": "h", "label": 1.5}, {"kind": "single"}, "line 2: 'label' is 1.5, which names no"),
        ({"text": "h", "label": "a"}, {"kind": "multi", "label": "label"}, "must be a list of"),
        ({"text": "h", "label": ["a", "a"]}, {"kind": "multi"}, "line 2: 'label' names 'a' twice"),
        ({"text": "h", "label": [None]}, {"kind": "multi"}, "line 2: an entry of 'label' is null"),
    ],
)
def test_a_wrong_row_is_named(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], sentence: str
):
    good = {"single": "a", "multi": ["a"], "regression": 1.5}.get(keys.get("kind", "single"))
    with pytest.raises(DataError) as caught:
        read(tmp_path, [{"text": "lungs", "label": good}, row], **keys)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "'tokens' holds 2 words and 'tags' 1 tags"),
        ({"tokens": [], "tags": []}, "'tokens' is empty"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "word 2 of 'tokens' is blank"),
        ({"tokens": ["a"], "tags": [None]}, "tag 1 of 'tags' is null"),
        ({"tokens": "a b", "tags": ["O"]}, "'tokens' is of type str; expected a list"),
        ({"tags": ["O"]}, "no field 'tokens'"),
    ],
)
def test_wrong_words_and_tags_are_named(tmp_path: Path, row: dict[str, Any], sentence: str):
    with pytest.raises(DataError) as caught:
        read(tmp_path, [{"tokens": ["a"], "tags": ["O"]}, row])
    assert f"rows.jsonl, line 2: {sentence}" in str(caught.value)


def test_empty_rows_are_left_out_if_asked_for(tmp_path: Path):
    rows = [{"text": "heart", "label": "a"}, {"text": " ", "label": "b"}]
    assert read(tmp_path, rows, skip_empty=True).skipped == [2]


def test_no_column_of_labels_at_all(tmp_path: Path):
    with pytest.raises(DataError, match=r"no field 'label', 'labels' or 'tags'.*'labl'.*Did you"):
        read(tmp_path, [{"text": "heart", "labl": "a"}])


def test_classes_are_ordered_as_numbers_or_words(tmp_path: Path):
    numbers = read(tmp_path, [{"text": f"t{i}", "label": i} for i in (10, 9, 2)])
    assert classes_of(numbers) == ("2", "9", "10")
    signs = read(tmp_path, [{"text": label, "label": label} for label in ("--1", "-1")])
    assert classes_of(signs) == ("--1", "-1")
    tags = read(tmp_path, [{"tokens": ["a", "b", "c"], "tags": ["I-x", "O", "B-x"]}])
    assert classes_of(tags) == ("O", "B-x", "I-x")
    with pytest.raises(DataError, match="only the class 'a', so that there is nothing to tell"):
        classes_of(read(tmp_path, [{"text": "heart", "label": "a"}]))
    with pytest.raises(DataError, match="no class at all"):
        classes_of(read(tmp_path, [{"text": "heart", "label": []}]))


def test_a_label_without_a_training_row_is_named(tmp_path: Path):
    held_out = read(tmp_path, [{"text": "heart", "label": "yes"}, {"text": "a", "label": "noo"}])
    with pytest.raises(DataError, match=r"line 2: the label 'noo' is of no training row.*'no'\?"):
        check_known(held_out, ("no", "yes"))


def test_tags_that_begin_nothing_are_found(tmp_path: Path):
    rows = [
        {"tokens": ["a", "b"], "tags": ["B-x", "I-x"]},
        {"tokens": ["a", "b"], "tags": ["O", "I-x"]},
        {"tokens": ["a", "b"], "tags": ["B-y", "I-x"]},
    ]
    assert loose_tags(read(tmp_path, rows)) == [2, 3]


# Tokens


def test_a_second_text_has_types_of_its_own(tmp_path: Path, tokenizer: Any):
    rows = read(tmp_path, [{"text": "heart", "text_pair": "lungs clear", "label": "a"},
                           {"text": "no", "text_pair": "no", "label": "b"}])  # fmt: skip
    found = encode_labels(rows, tokenizer, 64, ("a", "b"))
    assert tokenizer.decode(found[0].input_ids) == "[CLS] heart [SEP] lungs clear [SEP]"
    assert found[0].types == [0, 0, 0, 1, 1, 1]
    assert [row.label for row in found] == [0, 1]


def test_rows_are_cut_within_the_special_tokens(tokenizer: Any):
    (found,) = encode_texts(["heart lungs clear normal"], tokenizer, 4)
    assert tokenizer.decode(found.input_ids) == "[CLS] heart lungs [SEP]"
    assert (found.truncated, found.length) == (True, 6)
    assert longest_input(tokenizer, 1024, 48) == 48
    assert longest_input(tokenizer, 1024, None) == 64
    assert longest_input(tokenizer, 16, 48) == 16


def test_several_classes_are_a_row_of_numbers(tmp_path: Path, tokenizer: Any):
    rows = read(tmp_path, [{"text": "heart", "label": ["b"]}, {"text": "no", "label": []}])
    found = encode_labels(rows, tokenizer, 64, ("a", "b"))
    assert [row.label for row in found] == [[0.0, 1.0], [0.0, 0.0]]


def pieces_tokenizer(folder: Path) -> Any:
    """A tokenizer that splits words into pieces and keeps the space before a word, as BPE does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["lun gs"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="!", pad_token="!")


def test_the_first_piece_of_a_word_carries_its_tag(tmp_path: Path):
    tokenizer = pieces_tokenizer(tmp_path)
    rows = read(tmp_path, [{"tokens": ["abc", "lungs", "x"], "tags": ["B-p", "O", "I-p"]}])
    (found,) = encode_labels(rows, tokenizer, 64, ("O", "B-p", "I-p"))
    pieces = [tokenizer.decode([token]) for token in found.input_ids]
    assert "".join(pieces) == "abc lungs x"
    marked = [
        (piece, label) for piece, label in zip(pieces, found.label, strict=True) if label != IGNORED
    ]
    assert [label for _, label in marked] == [1, 0, 2]
    assert [piece.strip()[:1] for piece, _ in marked] == ["a", "l", "x"]
    assert len(pieces) > 3


def test_cut_words_lose_their_tags_and_the_others_keep_theirs(tmp_path: Path, tokenizer: Any):
    rows = read(tmp_path, [{"tokens": ["heart", "lungs", "no"], "tags": ["B-p", "I-p", "O"]}])
    (found,) = encode_labels(rows, tokenizer, 4, ("O", "B-p", "I-p"))
    assert found.label == [IGNORED, 1, 2, IGNORED]
    assert found.truncated


def test_a_word_without_a_token_is_named(tmp_path: Path):
    from real_data import encoder_folder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    rows = read(tmp_path, [{"tokens": ["heart", "\u00ad"], "tags": ["O", "O"]}])
    with pytest.raises(DataError, match=r"line 1: word 2, .* has no token of its own"):
        encode_labels(rows, tokenizer, 64, ("O",))
