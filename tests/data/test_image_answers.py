"""Judged answers about images: how they may be written, what is checked, and as tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vision_tiny import ASSISTANT, END, FAMILIES, SIDE, USER, make_vision_model

from inlay.data.image_inputs import ImageInputs, kinds_beside
from inlay.data.image_reader import ImageReader, image_reader
from inlay.data.preference import normalise_pairs, side_of
from inlay.data.raw import RawRow
from inlay.data.rows import Rows
from inlay.data.split import split
from inlay.data.tokens import Encoded, encode
from inlay.errors import DataError
from inlay.tasks.dpo.pairs import encode_pairs
from inlay.tasks.kto.rows import beside, encode_labelled, normalise_labelled

PLACE = {"type": "image"}
TEXT = {"type": "text", "text": "What is it?"}
ANSWERS = {"chosen": "A box.", "rejected": "A bag."}
QUESTION = {"prompt": "What is it?", **ANSWERS}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def at(name: str) -> dict[str, str]:
    return {"type": "image", "path": name}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        Image.new("RGB", (SIDE, SIDE), (number * 40, 9, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    return tmp_path


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageReader]:
    place = tmp_path_factory.mktemp("vision")
    return {f: image_reader(make_vision_model(place / f, f), None) for f in FAMILIES}


def raw_rows(folder: Path, *rows: dict[str, Any]) -> list[RawRow]:
    return [RawRow(row, str(folder / "data.jsonl"), n) for n, row in enumerate(rows, start=1)]


def pairs_of(folder: Path, *rows: dict[str, Any], **named: Any) -> Rows:
    return normalise_pairs(raw_rows(folder, *rows), **named)


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", **QUESTION},
        {"images": ["a.png"], **QUESTION},
        {"image": "a.png", **QUESTION, "prompt": "<image>What is it?"},
        {"image": "a.png", "prompt": [user(TEXT)], "chosen": [said("A box.")],
         "rejected": [said("A bag.")]},
        {"images": ["a.png"], "prompt": [user(PLACE, TEXT)], "chosen": [said("A box.")],
         "rejected": [said("A bag.")]},
        {"prompt": [user(at("a.png"), TEXT)], "chosen": [said("A box.")],
         "rejected": [said("A bag.")]},
        {"chosen": [user(at("a.png"), TEXT), said("A box.")],
         "rejected": [user(at("a.png"), TEXT), said("A bag.")]},
        {"image": "a.png", "chosen": [user(PLACE, TEXT), said("A box.")],
         "rejected": [user(PLACE, TEXT), said("A bag.")]},
    ],
    ids=range(8),
)  # fmt: skip
def test_every_way_of_writing_a_pair_is_the_same(folder: Path, row: dict[str, Any]):
    rows = pairs_of(folder, row)
    assert (rows.kind, rows.pictured) == ("preference", True)
    (found,) = rows.rows
    assert found["prompt"] == [user(PLACE, TEXT)]
    assert (found["chosen"], found["rejected"]) == ("A box.", "A bag.")
    (picture,) = found["images"]
    assert picture.open().getpixel((0, 0)) == (0, 9, 9)
    side = side_of(rows, "rejected")
    assert side.kind == "images"
    assert side.rows[0]["messages"] == [user(PLACE, TEXT), said("A bag.")]


def test_rows_without_images_are_those_of_text(folder: Path):
    rows = pairs_of(folder, QUESTION)
    assert (rows.kind, rows.pictured) == ("preference", False)
    assert rows.rows[0]["prompt"] == "What is it?"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"image": "gone.png", **QUESTION}, r"line 2: 'image': .*gone\.png is not there"),
        ({"image": "broken.png", **QUESTION}, r"line 2: 'image': .*cannot be read as an image"),
        ({"image": None, **QUESTION}, r"line 2: 'image' is empty; name the image, write \[\]"),
        ({"image": "https://x.org/a.png", **QUESTION}, r"line 2: 'image' is an address"),
        (
            {"image": "a.png", **QUESTION, "prompt": "<image> or <image>?"},
            r"line 2: the text has 2 places for images \(<image>\), and the row has 1 images",
        ),
        (
            {"image": "a.png", **QUESTION, "rejected": "<image>"},
            r"line 2: message 2 of 'assistant' has an image",
        ),
        ({"image": "a.png", **QUESTION, "rejected": "A box."}, r"line 2: .* are the same"),
        ({"image": "a.png", **QUESTION, "more": 1}, r"line 2: the field 'more' is not one of"),
        ({"image": "a.png", "prompt": "q", "chosen": "a"}, r"line 2: no field 'rejected'"),
        (
            {
                "chosen": [user(at("a.png"), TEXT), said("A box.")],
                "rejected": [user(at("b.png"), TEXT), said("A bag.")],
            },
            r"line 2: 'chosen' and 'rejected' show different images; both must answer to the same",
        ),
        (
            {
                "image": "b.png",
                "prompt": [user(at("a.png"), TEXT)],
                "chosen": [said("A box.")],
                "rejected": [said("A bag.")],
            },
            r"line 2: images stand both in the messages and in the column 'image'",
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(folder: Path, row: dict[str, Any], sentence: str):
    good: dict[str, Any] = {"image": "a.png", **QUESTION}
    if isinstance(row.get("chosen"), list):
        good = {"image": "a.png", "prompt": [user(TEXT)], "chosen": [said("x")]}
        good |= {"rejected": [said("y")]}
    with pytest.raises(DataError, match=r"data\.jsonl, " + sentence):
        pairs_of(folder, good, row)


def test_images_that_begin_in_a_later_row_stop(folder: Path):
    with pytest.raises(DataError, match=r"line 2: the field 'image' is not one of a preference"):
        pairs_of(folder, QUESTION, {"image": "a.png", **QUESTION})
    told = [user(TEXT), said("A box.")], [user(TEXT), said("A bag.")]
    shown_later = [user(at("a.png"), TEXT), said("A box.")], [user(at("a.png"), TEXT), said("No")]
    rows = [dict(zip(("chosen", "rejected"), each, strict=True)) for each in (told, shown_later)]
    for row in rows[:1]:
        for each in row.values():
            for message in each:
                message["content"] = message["content"][0]["text"]
    with pytest.raises(DataError, match=r"line 2: 'content' of message 1 is of type list"):
        pairs_of(folder, *rows)


def test_rows_of_one_image_stay_together_and_content_is_hashed(folder: Path):
    rows = [{**QUESTION, "image": f"{n}.png", "prompt": str(i)} for i in range(9) for n in "abc"]
    found = pairs_of(folder, *rows)
    for part in split(found, [1 / 3, 1 / 3, 1 / 3]):
        assert len({p.sha256 for row in part.rows for p in row["images"]}) == 1
    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(folder / "a.png")
    assert pairs_of(folder, *rows).sha256 != found.sha256
    blind = pairs_of(folder, {**QUESTION, "image": []}, {**QUESTION, "image": []})
    assert blind.groups is not None
    assert blind.groups[0] == blind.groups[1]
    patients = [{**QUESTION, "image": f"{name}.png", "who": "1"} for name in "ab"]
    assert pairs_of(folder, *patients, group="who").groups == ["1", "1"]


def test_rows_with_an_empty_image_are_left_out_when_asked(folder: Path):
    rows = pairs_of(
        folder, {"image": "a.png", **QUESTION}, {"image": None, **QUESTION}, skip_empty=True
    )
    assert (len(rows), rows.skipped) == (1, [2])


# Tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_answers_count_and_the_prompt_is_one(
    readers: dict[str, ImageReader], folder: Path, family: str
):
    reader = readers[family]
    rows = pairs_of(folder, {"images": ["a.png", "b.png"], **QUESTION})
    (pair,) = encode_pairs(rows, reader, 512)
    for side, answer in ((pair.chosen, "A box."), (pair.rejected, "A bag.")):
        assert isinstance(side, Encoded)
        assert reader.tokenizer.decode(side.input_ids[side.trained.index(True) :]) == answer + END
        assert side.input_ids[: pair.start] == pair.chosen.input_ids[: pair.start]
        assert side.ends
        seen = [token in reader.image_tokens for token in side.input_ids]
        assert any(seen)
        assert not any(seen[pair.start :])
    (plain,) = encode(side_of(rows, "chosen"), reader, 512)
    assert pair.chosen.input_ids == plain.input_ids
    text = "".join(piece.text for piece in reader.pieces(pair.rejected))
    assert text.startswith(USER)
    assert text.endswith(f"What is it?{END}{ASSISTANT}A bag.{END}")


def test_the_answer_is_as_trl_has_it_behind_the_words_of_a_longer_conversation(
    readers: dict[str, ImageReader], folder: Path
):
    before = [user(PLACE, TEXT), said("A box."), user({"type": "text", "text": "And in it?"})]
    row = {"image": "a.png", "prompt": before, "chosen": [said("Air")], "rejected": [said("Gold")]}
    (pair,) = encode_pairs(pairs_of(folder, row), readers["llava"], 512)
    decode = readers["llava"].tokenizer.decode
    assert decode(pair.chosen.input_ids[pair.start :]) == f"Air{END}"
    assert sum(pair.rejected.trained) == len(pair.rejected.input_ids) - pair.start


def test_a_cut_never_goes_through_an_image(readers: dict[str, ImageReader], folder: Path):
    rows = pairs_of(folder, {"image": "a.png", **QUESTION})
    (whole,) = encode_pairs(rows, readers["llava"], 512)
    with pytest.raises(DataError, match=r"line 1: the row's images end at token \d+, and"):
        encode_pairs(rows, readers["llava"], 12)
    with pytest.raises(DataError, match=f"line 1: the prompt fills all {whole.start} tokens"):
        encode_pairs(rows, readers["llava"], whole.start)
    with pytest.raises(DataError, match="are the same; they differ from max_length"):
        encode_pairs(rows, readers["llava"], whole.start + 1)
    (cut,) = encode_pairs(rows, readers["llava"], whole.start + 4)
    assert cut.chosen.truncated
    assert not cut.chosen.ends


def test_images_are_prepared_once_for_both_answers(
    readers: dict[str, ImageReader], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    reader, made = readers["llava"], []
    kind = type(reader.processor.image_processor)
    own = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *a, **k: made.append(1) or own(*a, **k))
    (pair,) = encode_pairs(pairs_of(folder, {"image": "a.png", **QUESTION}), reader, 512)
    assert len(made) == 1
    made.clear()
    inputs = ImageInputs(reader)([pair.chosen, pair.rejected], width=64)  # pyright: ignore
    assert len(made) == 1
    assert inputs["pixel_values"].shape[0] == 2
    assert (inputs["pixel_values"][0] == inputs["pixel_values"][1]).all()


# Labelled


LABELLED = {"image": "a.png", "prompt": "What is it?", "completion": "A box.", "label": True}


def labelled_of(folder: Path, *rows: dict[str, Any]) -> Rows:
    return normalise_labelled(raw_rows(folder, *rows))


def test_the_same_answer_to_another_image_may_have_another_label(
    readers: dict[str, ImageReader], folder: Path
):
    other = {**LABELLED, "image": "b.png", "label": False}
    third = {**LABELLED, "image": "c.png", "completion": "A bag.", "label": True}
    rows = labelled_of(folder, LABELLED, other, third)
    assert (rows.kind, rows.pictured) == ("labelled", True)
    found = encode_labelled(rows, readers["llava"], 512)
    assert [row.desirable for row in found] == [True, False, True]
    assert found[0].answer.input_ids == found[1].answer.input_ids
    with pytest.raises(DataError, match=r"line 2: the same prompt and completion as in line 1"):
        labelled_of(folder, LABELLED, {**LABELLED, "label": False}, third)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_keeps_its_image_before_another_rows_answer(
    readers: dict[str, ImageReader], folder: Path, family: str
):
    reader = readers[family]
    other = {**LABELLED, "image": "b.png", "completion": "Not this one.", "label": False}
    row, answer = encode_labelled(labelled_of(folder, LABELLED, other), reader, 512)
    mixed = beside(row, answer, 512)
    assert isinstance(mixed, Encoded)
    assert isinstance(row.answer, Encoded)
    asked = {**LABELLED, "completion": "Not this one.", "label": False}
    wanted = encode_labelled(labelled_of(folder, LABELLED, asked), reader, 512)[1].answer
    assert isinstance(wanted, Encoded)
    assert (mixed.input_ids, mixed.trained) == (wanted.input_ids, wanted.trained)
    assert mixed.images == row.answer.images
    width = len(mixed.input_ids)
    kinds = [kinds_beside([each], width) for each in (mixed, wanted)]
    assert kinds[0].keys() == kinds[1].keys()
    assert all(kinds[0][name].equal(kinds[1][name]) for name in kinds[0])
    assert replace(mixed, text="").pictures == row.answer.pictures
