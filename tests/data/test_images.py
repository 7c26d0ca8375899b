from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inlay.data.image_columns import hold_images
from inlay.data.images import normalise_images, normalise_shown
from inlay.data.raw import RawRow
from inlay.data.read import first_row, read_rows
from inlay.data.rows import Rows
from inlay.data.split import split
from inlay.errors import DataError

TEXT = {"type": "text", "text": "What is it?"}
PLACE = {"type": "image"}


def content(colour: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    held = io.BytesIO()
    Image.new("L", size, colour).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(content(ord(name)))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes(content(size=(64, 64))[:60])
    return tmp_path


def rows_of(folder: Path, *rows: dict[str, Any], **named: Any) -> Rows:
    raw = [RawRow(row, str(folder / "data.jsonl"), n) for n, row in enumerate(rows, start=1)]
    return normalise_images(raw, **named)


def asked(*parts: Any, answer: str = "A box.") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": list(parts)},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


QUESTION = {"prompt": "What is it?", "completion": "A box."}
IN_BASE64 = base64.b64encode(content(97)).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", **QUESTION},
        {"images": ["a.png"], **QUESTION},
        {"image": {"path": "a.png", "bytes": None}, **QUESTION},
        {"image": {"bytes": content(97), "path": None}, **QUESTION},
        {"image": {"bytes": IN_BASE64}, **QUESTION},
        {"image": f"data:image/png;base64,{IN_BASE64}", **QUESTION},
        {"image": content(97), **QUESTION},
        {"image": "a.png", "prompt": "<image>What is it?", "completion": "A box."},
        {"images": ["a.png"], "messages": asked(PLACE, TEXT)},
        {"messages": asked({"type": "image", "image": "a.png"}, TEXT)},
        {"messages": asked({"type": "image", "path": "a.png"}, TEXT)},
        {"messages": asked({"type": "image", "base64": IN_BASE64}, TEXT)},
        {
            "messages": asked(
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/png;base64,{IN_BASE64}"},
                },
                TEXT,
            )
        },
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>What is it?"},
                {"from": "gpt", "value": "A box."},
            ],
        },
        {"image": "a.png", "instruction": "What is it?", "output": "A box.", "only": "alpaca"},
    ],
    ids=range(15),
)
def test_every_way_of_writing_a_row_is_the_same_conversation(folder: Path, row: dict[str, Any]):
    assert hold_images(RawRow(row, "data.jsonl", 1))
    rows = rows_of(folder, row)
    assert rows.kind == "images"
    (found,) = rows.rows
    if "only" not in row:
        assert found["messages"] == asked(PLACE, TEXT)
    else:
        assert found["messages"][0]["content"][0] == PLACE
    assert found["completion"] == "A box."
    (picture,) = found["images"]
    assert picture.open().mode == "RGB"
    assert picture.open().getpixel((0, 0)) == (97, 97, 97)


def test_an_image_of_pil_is_taken(folder: Path):
    rows = rows_of(folder, {"image": Image.new("L", (2, 2), 5), **QUESTION})
    assert rows.rows[0]["images"][0].open().getpixel((0, 0)) == (5, 5, 5)


def test_several_images_stand_where_the_text_says(folder: Path):
    row = {"images": ["a.png", "b.png"], "prompt": "Is <image> like <image>?", "completion": "No"}
    (found,) = rows_of(folder, row).rows
    kinds = [part["type"] for part in found["messages"][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert [p.open().getpixel((0, 0))[0] for p in found["images"]] == [97, 98]


def test_named_columns_and_rows_without_an_image(folder: Path):
    rows = rows_of(
        folder,
        {"image": "a.png", "q": "What?", "a": "This."},
        {"image": [], "q": "What else?", "a": "That."},
        prompt="q",
        completion="a",
    )
    assert [len(row["images"]) for row in rows.rows] == [1, 0]
    assert rows.rows[1]["messages"][0]["content"] == [{"type": "text", "text": "What else?"}]


def test_rows_of_one_image_stay_together_and_content_is_hashed(folder: Path):
    asked_often = [
        {**QUESTION, "image": f"{n}.png", "prompt": str(i)} for i in range(9) for n in "abc"
    ]
    rows = rows_of(folder, *asked_often)
    for part in split(rows, [1 / 3, 1 / 3, 1 / 3]):
        assert len({p.sha256 for row in part.rows for p in row["images"]}) == 1
    before = rows.sha256
    (folder / "a.png").write_bytes(content(3))
    assert rows_of(folder, *asked_often).sha256 != before


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"image": "gone.png", **QUESTION},
            r"line 2: 'image': .*gone\.png is not there",
        ),
        ({"image": ".", **QUESTION}, r"line 2: 'image': .* is a folder"),
        ({"image": "broken.png", **QUESTION}, r"line 2: 'image': .*broken\.png cannot be read"),
        ({"image": 7, **QUESTION}, r"line 2: 'image' is of type int; expected a path"),
        ({"image": None, **QUESTION}, r"line 2: 'image' is empty; name the image, write \[\]"),
        ({"images": [None], **QUESTION}, r"line 2: 'images' is empty; name the image"),
        ({"image": {"bytes": "?"}, **QUESTION}, r"line 2: 'image' is not base64"),
        ({"image": {"x": 1}, **QUESTION}, r"line 2: 'image' has neither bytes nor a path"),
        (
            {"image": "https://x.org/a.png", **QUESTION},
            r"line 2: 'image' is an address .*allow_urls",
        ),
        ({"image": "a.png", "images": ["a.png"], **QUESTION}, r"line 2: 'image' and 'images' are"),
        (
            {"image": "a.png", "prompt": "<image> or <image>?", "completion": "b"},
            r"line 2: the text has 2 places for images \(<image>\), and the row has 1 images",
        ),
        ({"image": "a.png", "prompt": "p", "completion": ""}, r"line 2: 'completion' is blank"),
        (
            {"image": "a.png", "prompt": "p", "completion": "<image>"},
            r"line 2: message 2 of 'assistant' has an image",
        ),
        ({"image": "a.png", "text": "t"}, r"line 2: a row of the format 'text'"),
        (
            {"messages": asked({"type": "video", "video": "x"}, TEXT)},
            r"line 2: message 1 has a part of type 'video'",
        ),
        (
            {"image": "a.png", "messages": asked({"type": "image", "image": "b.png"}, TEXT)},
            r"line 2: images stand both in the messages and in the column 'image'",
        ),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(folder: Path, row: dict[str, Any], sentence: str):
    good = {"image": "a.png", **QUESTION}
    if "messages" in row:
        good = {"image": "a.png", "messages": asked(TEXT)}
    with pytest.raises(DataError, match=r"data\.jsonl, " + sentence):
        rows_of(folder, good, row)


def test_messages_end_with_the_assistant(folder: Path):
    messages = [*asked(PLACE, TEXT), {"role": "user", "content": [TEXT]}]
    with pytest.raises(DataError, match="line 1: the last message must be of 'assistant'"):
        rows_of(folder, {"image": "a.png", "messages": messages})


def test_a_whole_column_has_no_place_for_an_image(folder: Path):
    with pytest.raises(DataError, match="'text' trains on a whole column"):
        rows_of(folder, {"image": "a.png", "x": "y"}, text="x")
    with pytest.raises(DataError, match="line 1: a row with images needs a prompt"):
        rows_of(folder, {"image": "a.png", "text": "y"})


def test_a_cut_file_is_found_when_it_is_decoded(folder: Path):
    (picture,) = rows_of(folder, {"image": "cut.png", **QUESTION}).rows[0]["images"]
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: 'image' cannot be decoded"):
        picture.open()


def test_an_image_that_would_fill_the_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (picture,) = rows_of(folder, {"image": "a.png", **QUESTION}).rows[0]["images"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="line 1: 'image' is too large to be opened safely"):
        picture.open()


def test_an_address_is_fetched_where_that_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked_for = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        del timeout
        asked_for.append(address)
        return io.BytesIO(content(9))

    monkeypatch.setattr("urllib.request.urlopen", answer)
    row = {"image": "https://x.org/a.png", **QUESTION}
    (found,) = rows_of(folder, row, allow_urls=True).rows
    assert found["images"][0].open().getpixel((0, 0)) == (9, 9, 9)
    assert asked_for == ["https://x.org/a.png"]


def test_rows_with_an_empty_image_are_left_out_when_asked(folder: Path):
    rows = rows_of(
        folder, {"image": "a.png", **QUESTION}, {"image": None, **QUESTION}, skip_empty=True
    )
    assert (len(rows), rows.skipped) == (1, [2])


def test_parquet_holds_images_as_files_do(folder: Path):
    import datasets

    held = datasets.Dataset.from_dict(
        {"image": [str(folder / "a.png")], "prompt": ["q"], "completion": ["a"]}
    ).cast_column("image", datasets.Image())
    held.to_parquet(folder / "data.parquet")
    raw = read_rows(folder / "data.parquet")
    assert hold_images(raw[0])
    assert normalise_images(raw).rows[0]["images"][0].open().getpixel((0, 0)) == (97, 97, 97)


def test_a_data_sets_images_are_not_decoded_as_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    names = [str(folder / "a.png"), str(folder / "b.png")]
    held = datasets.Dataset.from_dict(
        {"images": [names, names[:1]], "prompt": ["p", "q"], "completion": ["a", "b"]}
    ).cast_column("images", datasets.List(datasets.Image()))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: held)
    raw = read_rows("someone/scans")
    assert isinstance(raw[0].values["images"][0], dict)
    rows = normalise_images(raw)
    assert [len(row["images"]) for row in rows.rows] == [2, 1]
    assert rows.rows[0]["images"][1].open().getpixel((0, 0)) == (98, 98, 98)
    assert rows.where(1) == "someone/scans:train, row 2"


def test_the_first_row_is_read_alone(folder: Path):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png"}) + "\nnot json\n")
    assert first_row(path).values == {"image": "a.png"}
    assert not hold_images(RawRow({"prompt": "p", "completion": "c"}, "x", 1))
    assert not hold_images(RawRow({"messages": [{"role": "user", "content": "t"}]}, "x", 1))


@pytest.mark.parametrize("words", ["Xray Chest PA and Lateral", "", "a\0b", "x" * 5000])
def test_words_about_an_image_are_no_image(words: str, tmp_path: Path) -> None:
    row = RawRow({"prompt": "a", "completion": "b", "image": words}, str(tmp_path / "d.csv"), 2)
    assert not hold_images(row)
    for name in ("missing.PNG", "scans/0001", "0001"):
        assert hold_images(replace(row, values={**row.values, "image": name}))
    assert hold_images(replace(row, values={**row.values, "images": ["https://x.y/z"]}))


def test_a_path_without_a_suffix_that_is_not_there_is_not_taken_for_words(folder: Path) -> None:
    raw = [RawRow({**QUESTION, "image": "scans/0001"}, str(folder / "data.jsonl"), 1)]
    with pytest.raises(
        DataError, match=r"line 1: 'image': .*scans/0001 is not there.*another name"
    ):
        normalise_shown(raw)
    for columns in ({"prompt": "A {image}:"}, {"prompt": "image"}, {"group": "image"}):
        columns = {"prompt": "prompt", "completion": "completion", **columns}
        rows = normalise_shown(raw, **columns)
        assert (rows.kind, rows.notes) == ("prompt_completion", [])


def test_a_column_of_words_about_images_is_told(folder: Path) -> None:
    row = RawRow({**QUESTION, "image": "Chest PA and lateral, " * 3}, str(folder / "d.csv"), 2)
    rows = normalise_shown([row])
    assert rows.kind == "prompt_completion"
    (note,) = rows.notes
    assert note.startswith("the column 'image' holds words and no images, and is not read: 'Chest")
    assert note.endswith("...' in " + row.where)
    for value in (None, "", []):
        plain = replace(row, values={**QUESTION, "images": value})
        assert normalise_shown([replace(row, values=QUESTION), plain]).notes == []


@pytest.mark.parametrize("first", [{}, {"image": "A photo of a cat"}, {"image": ""}], ids=str)
def test_images_that_begin_in_a_later_row_stop(folder: Path, first: dict[str, str]) -> None:
    values = ({**QUESTION, **first}, {**QUESTION, "image": "a.png"})
    raw = [RawRow(row, str(folder / "data.jsonl"), n) for n, row in enumerate(values, start=1)]
    sentence = r"line 2: 'image' is an image, and the first row, .*line 1, has none"
    with pytest.raises(DataError, match=sentence):
        normalise_shown(raw)
