"""Conversations with images as tokens, and side by side as each family's processor has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vision_rows import MIXED, TWO_TURNS, picture, rows_of, turns
from vision_tiny import ASSISTANT, END, FAMILIES, SIDE, USER, make_vision_model

from inlay.data.image_inputs import ImageInputs
from inlay.data.image_reader import ImageReader, image_reader
from inlay.data.image_tokens import question
from inlay.data.tokens import Encoded, encode
from inlay.errors import DataError, ModelError


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageReader]:
    place = tmp_path_factory.mktemp("vision")
    return {f: image_reader(make_vision_model(place / f, f), None) for f in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistants_words_train_and_nothing_else(readers: dict[str, ImageReader], family: str):
    reader = readers[family]
    encoded = encode(rows_of(*MIXED), reader, 512)
    said = [
        reader.tokenizer.decode([t for t, on in zip(r.input_ids, r.trained, strict=True) if on])
        for r in encoded
    ]
    assert said == [f"It.{END}", f"One.{END}Two.{END}", f"None.{END}"]
    assert all(row.ends and row.prompt_kept for row in encoded)
    tokens = [len([t for t in r.input_ids if t in reader.image_tokens]) for r in encoded]
    each = {"llava": 16, "gemma3": 6}.get(family, 4)
    assert tokens == [each, 2 * each, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_side_by_side_are_the_processors_own_batch(
    readers: dict[str, ImageReader], family: str
):
    reader = readers[family]
    encoded = encode(rows_of(*MIXED[:2]), reader, 512)
    width = max(len(row.input_ids) for row in encoded)
    found = ImageInputs(reader)(encoded, width=width)
    own = reader.processor(
        text=[row.text for row in encoded],
        images=[[p.open() for p in row.pictures] for row in encoded],
        return_tensors="pt",
        padding=True,
    )
    ids, mask = own.pop("input_ids"), own.pop("attention_mask")
    assert [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)] == [
        list(row.input_ids) for row in encoded
    ]
    assert set(found) == set(own)
    if family in ("llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "idefics3"):
        for name, value in own.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_padded_on_the_left(readers: dict[str, ImageReader], family: str):
    reader = readers[family]
    encoded = encode(rows_of(*MIXED), reader, 512)
    kept = [row.trained.index(True) for row in encoded]
    found = ImageInputs(reader)(encoded, width=60, kept=kept, left=True)
    for number, row in enumerate(encoded):
        said = reader.inputs(row.text, reader.opened(row.pictures))
        for name, value in found.items():
            if name.endswith("token_type_ids"):
                whole = said[name][0, : kept[number]]
                assert torch.equal(value[number, 60 - kept[number] :], whole)
                assert not value[number, : 60 - kept[number]].any()


def test_a_cut_never_goes_through_an_image(readers: dict[str, ImageReader]):
    reader = readers["llava"]
    (row,) = encode(rows_of(TWO_TURNS), reader, 512)
    last = max(i for i, token in enumerate(row.input_ids) if token in reader.image_tokens)
    for length in (last, 20, 3):
        with pytest.raises(DataError, match=r"line 1: the row's images end at token \d+, and"):
            encode(rows_of(TWO_TURNS), reader, length)
    (cut,) = encode(rows_of(TWO_TURNS), reader, last + 1)
    assert cut.truncated
    assert cut.input_ids == row.input_ids[: last + 1]
    assert set(reader.of(cut)) == {"pixel_values"}
    (row,) = encode(rows_of(MIXED[0]), reader, 512)
    start = row.trained.index(True)
    with pytest.raises(DataError, match=f"line 1: the prompt fills all {start} tokens"):
        encode(rows_of(MIXED[0]), reader, start)


def test_large_images_are_shrunk_in_their_own_shape(readers: dict[str, ImageReader]):
    reader = ImageReader(readers["qwen2_5_vl"].processor, max_pixels=128)
    assert reader.limited(picture(0, (64, 32))).size == (16, 8)
    assert reader.limited(picture(0, (4, 4))).size == (4, 4)
    large = {"images": [picture(0, (64, 32))], "prompt": "What?", "completion": "It."}
    lengths = [
        encode(rows_of(large), each, 512)[0].length for each in (reader, readers["qwen2_5_vl"])
    ]
    assert lengths[1] - lengths[0] == (64 * 32 - 16 * 8) // 16


def test_images_are_prepared_once_a_row(
    readers: dict[str, ImageReader], monkeypatch: pytest.MonkeyPatch
):
    reader, made = readers["llava"], []
    kind = type(reader.processor.image_processor)
    own = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *a, **k: made.append(1) or own(*a, **k))
    encode(rows_of(MIXED[0], MIXED[0]), reader, 512)
    assert len(made) == 2
    assert isinstance(reader.processor.image_processor, kind)


def test_prepared_images_are_kept_while_there_is_room(
    readers: dict[str, ImageReader], monkeypatch: pytest.MonkeyPatch
):
    reader, made = readers["llava"], []
    again = {**MIXED[0], "messages": turns("And what is it?", "It.")}
    rows = encode(rows_of(MIXED[0], {**MIXED[0], "images": [picture(4)]}), reader, 512)
    same = encode(rows_of(MIXED[0], again), reader, 512)
    of = ImageReader.of
    monkeypatch.setattr(ImageReader, "of", lambda self, row: made.append(1) or of(self, row))
    ImageInputs(reader)(same, width=64)
    assert len(made) == 1
    one = 3 * SIDE * SIDE * 4
    for room, calls in ((2 * one, 2), (one, 3), (0, 4)):
        made.clear()
        inputs = ImageInputs(reader, room=room)
        first, second = inputs(rows, width=64), inputs(rows, width=64)
        assert len(made) == calls
        assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_an_image_that_changes_after_it_was_checked_is_found(
    readers: dict[str, ImageReader], tmp_path: Path
):
    reader = readers["qwen2_5_vl"]
    path = tmp_path / "a.png"
    picture(0).save(path)
    row = {"images": [str(path)], "prompt": "What?", "completion": "It."}
    (encoded,) = encode(rows_of(row), reader, 512)
    picture(0, (32, 32)).save(path)
    with pytest.raises(DataError, match="line 1: 'images' has changed since"):
        reader.of(encoded)


def test_a_file_that_breaks_off_is_said_with_its_line(
    readers: dict[str, ImageReader], tmp_path: Path
):
    path = tmp_path / "a.png"
    picture(0, (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    rows = rows_of({"image": str(path), "prompt": "What?", "completion": "It."})
    with pytest.raises(DataError, match="line 1: 'image' cannot be decoded"):
        encode(rows, readers["llava"], 512)


def test_the_models_own_word_for_an_image_in_a_text_is_refused(readers: dict[str, ImageReader]):
    row = {"images": [], "prompt": "What is <|image_pad|>?", "completion": "A word."}
    with pytest.raises(DataError, match="line 1: the model's processor refuses the row"):
        encode(rows_of(row), readers["qwen2_5_vl"], 512)


def test_templates_that_will_not_do_are_said(tmp_path: Path):
    folder = make_vision_model(tmp_path / "llava", "llava")
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises((ModelError, DataError)):
        encode(rows_of(MIXED[0]), image_reader(folder, None), 512)
    template.unlink()
    with pytest.raises(ModelError, match="no chat template"):
        encode(rows_of(MIXED[0]), image_reader(folder, None), 512)


def test_a_question_is_what_training_puts_before_an_answer(readers: dict[str, ImageReader]):
    for family, reader in readers.items():
        rows = rows_of(MIXED[0])
        (row,) = encode(rows, reader, 512)
        asked = question(reader, "What?", rows.rows[0]["images"])
        assert asked.input_ids == row.input_ids[: row.trained.index(True)], family


def test_a_row_is_shown_with_its_images_as_one(readers: dict[str, ImageReader]):
    (row,) = encode(rows_of(MIXED[0]), readers["llava"], 512)
    pieces = readers["llava"].pieces(row)
    text = "".join(piece.text for piece in pieces)
    assert text == f"{USER}<image> x 16 What?{END}{ASSISTANT}It.{END}"
    assert "".join(piece.text for piece in pieces if piece.trained) == f"It.{END}"


def test_a_model_that_sees_nothing_is_said(tmp_path: Path):
    from train_tiny import make_model

    with pytest.raises(DataError, match=r"the rows have images, and model \(llama\) is a model"):
        image_reader(make_model(tmp_path / "model"), None)
    folder = make_vision_model(tmp_path / "llava", "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="says nowhere how images are prepared"):
        image_reader(folder, None)


def test_rows_keep_tokens_and_no_pixels(readers: dict[str, ImageReader]):
    (row,) = encode(rows_of(MIXED[0]), readers["llava"], 512)
    assert isinstance(row, Encoded)
    assert not any(isinstance(value, torch.Tensor) for value in vars(row).values())
