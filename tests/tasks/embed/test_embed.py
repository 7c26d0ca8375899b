from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from heads_tiny import make_embed, make_encoder, make_similar, write
from train_tiny import losses_of

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.read import read_rows
from inlay.data.rows import Rows
from inlay.errors import DataError, ModelError, TrainingError, UsageError
from inlay.model.load.heads import Head
from inlay.model.load.pretrained import load
from inlay.tasks.embed.compare import Candidates, compared_retrieval, compared_scores, ranks
from inlay.tasks.embed.embedder import embedder, modules_in
from inlay.tasks.embed.rows import normalise_similar
from inlay.tasks.embed.run import SimilarityLoss
from inlay.tasks.embed.texts import PadSimilar, SimilarRow, same_texts
from inlay.tasks.embed.trainer import columns
from inlay.train.collate import items_of
from inlay.train.run import TrainResult, train

pytest.importorskip("sentence_transformers")

KINDS = ("pairs", "triplets", "scored_pairs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """A run to the end for every kind of rows."""
    folder = tmp_path_factory.mktemp("embed")
    return {
        kind: train(make_embed(folder, kind, kind=kind, epochs=6.0, learning_rate=3e-3))
        for kind in KINDS
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_rows_is_learned(runs: dict[str, TrainResult], kind: str):
    run = runs[kind].run
    lines = losses_of(runs[kind].folder.path)
    held = [line for line in lines if "eval_loss" in line]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    names = [metric["name"] for metric in run["comparison"]["metrics"]]
    expected = {
        "pairs": ["recall_at_1", "recall_at_5", "recall_at_10", "mrr"],
        "triplets": ["recall_at_1", "recall_at_5", "recall_at_10", "mrr", "triplet_accuracy"],
        "scored_pairs": ["spearman", "pearson"],
    }
    assert names == expected[kind]
    assert "note" not in run["comparison"]
    assert run["memory"]["planned_bytes"] > 0
    measured = "eval_spearman" if kind == "scored_pairs" else "eval_recall_at_1"
    assert measured in held[-1]


def test_an_adapter_without_gradient_stops_the_run(tmp_path: Path):
    config = make_embed(tmp_path, targets=["value"])
    model, tokenizer = load(config.model, head=Head("embedding"))
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight.zero_()
    model.save_pretrained(config.model)
    tokenizer.save_pretrained(config.model)
    with pytest.raises(TrainingError, match=r"no gradient .*layer\.1\.attention\.self\.value"):
        train(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"storage": "nf4"},
        {"base": "causal", "storage": "int8", "pooling": "lasttoken"},
        {"base": "causal", "kind": "triplets", "activations": "layer-inputs"},
        {"pooling": "cls"},
        {"method": "dora"},
        {"method": "bitfit"},
    ],
    ids=str,
)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_embed(tmp_path, epochs=6.0, learning_rate=3e-3, evaluate=False, **changes))
    steps = [x["loss"] for x in losses_of(tmp_path / "out") if "loss" in x]
    assert sum(steps[-4:]) < sum(steps[:4])


# The loss


def similarity(tmp_path: Path, scored: bool) -> tuple[SimilarityLoss, Any]:
    model, tokenizer = load(str(make_encoder(tmp_path / "m")), head=Head("embedding"))
    whole = embedder(model, str(tmp_path / "m"), None, "auto")
    return SimilarityLoss(whole, scored), tokenizer


def rows_of(tokenizer: Any, *rows: tuple[str, ...], score: float | None = None) -> list[SimilarRow]:
    return [SimilarRow(tuple(encode_texts(row, tokenizer, 64)), score) for row in rows]


def padded(rows: list[SimilarRow]) -> dict[str, torch.Tensor]:
    return PadSimilar(0, 1)(items_of(columns(rows)))


def test_the_loss_is_sentence_transformers_own_where_no_text_comes_twice(tmp_path: Path):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss, tokenizer = similarity(tmp_path, scored=False)
    rows = rows_of(tokenizer, ("heart", "lungs", "no"), ("clear", "normal", "left"))
    batch = padded(rows)
    assert not bool(batch["same"].any())
    plain: Any = MultipleNegativesRankingLoss(loss.loss.model)
    from inlay.tasks.embed.texts import columns_in

    with torch.no_grad():
        assert float(loss(batch)) == pytest.approx(float(plain(columns_in(batch), None)))


def test_a_text_that_is_no_negative_is_left_out(tmp_path: Path):
    loss, tokenizer = similarity(tmp_path, scored=False)
    twice = PadSimilar(0, 1)(
        items_of(columns(rows_of(tokenizer, ("heart", "no"), ("lungs", "no"))))
    )
    assert twice["same"].tolist() == [[False, True], [True, False]]
    equal = PadSimilar(0, 1)(
        items_of(columns(rows_of(tokenizer, ("heart", "no"), ("heart", "left"))))
    )
    assert equal["same"].tolist() == [[False, True], [True, False]]
    with torch.no_grad():
        assert float(loss(twice)) == pytest.approx(0.0)
        apart = PadSimilar(0, 1)(
            items_of(columns(rows_of(tokenizer, ("heart", "no"), ("lungs", "left"))))
        )
        assert float(loss(apart)) > 0.01


def test_a_negative_that_is_anothers_positive_counts_for_the_others_only():
    row = {"a": [1], "b": [2], "c": [3], "d": [4]}
    texts = [[InputRow(row[x], 1) for x in column] for column in ("ab", "cd", "dc")]
    # Row 0: positives c (own), d; negatives d (own), c (of row 1, the same text as its positive).
    assert same_texts(texts).tolist() == [
        [False, False, False, True], [False, False, True, False],
    ]  # fmt: skip


def test_columns_are_padded_by_themselves(tmp_path: Path):
    _, tokenizer = similarity(tmp_path, scored=False)
    batch = padded(rows_of(tokenizer, ("heart", "no lungs seen left")))
    assert batch["0_input_ids"].shape == (1, 3)
    assert batch["1_input_ids"].shape == (1, 6)
    scored = padded(rows_of(tokenizer, ("heart", "no"), score=0.5))
    assert scored["score"].tolist() == [0.5]
    assert "same" not in scored


# Pooling


def test_a_folders_own_modules_are_kept_and_foreign_ones_refused(tmp_path: Path):
    folder = make_encoder(tmp_path / "m")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 32, "pooling_mode": "cls"})
    )
    named = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(named))
    found = modules_in(folder)
    assert [type(module).__name__ for module in found] == ["Pooling", "Normalize"]
    model, tokenizer = load(str(folder), head=Head("embedding"))
    whole = embedder(model, str(folder), None, "auto")
    vectors = whole.embed(encode_texts(["heart", "no lungs"], tokenizer, 64), 2)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    with torch.no_grad():
        hidden = model(**tokenizer("heart", return_tensors="pt")).last_hidden_state[0, 0]
    assert torch.allclose(vectors[0], hidden / hidden.norm(), atol=1e-5)
    assert not any(p.requires_grad for p in whole.parameters())
    named[1]["type"] = "custom.Pooling"
    (folder / "modules.json").write_text(json.dumps(named))
    with pytest.raises(ModelError, match="code of its own; name a pooling"):
        modules_in(folder)
    assert [type(m).__name__ for m in embedder(model, str(folder), None, "mean").behind] == [
        "Pooling"
    ]
    (folder / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        modules_in(folder)


# Retrieval


def test_ranks_are_among_different_positives():
    found = Candidates.of(["a", "b", "c", "a"], ["x", "y", "x", "z"])
    assert found.first == [0, 1, 3]
    assert found.relevant == [{0, 2}, {1}, {0}, {0, 2}]
    anchors = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[1.0, 0.0], [0.6, 0.8], [9.0, 9.0], [0.0, 1.0]])
    assert ranks(anchors, positives, found) == [1, 2, 1, 1]
    metrics = {
        m["name"]: m
        for m in compared_retrieval([anchors, positives], [positives, positives], found)
    }
    assert metrics["recall_at_1"]["base"]["value"] == 0.75
    assert metrics["mrr"]["base"]["value"] == pytest.approx(3.5 / 4)
    assert set(metrics) == {"recall_at_1", "mrr"}


def test_scores_are_held_against_cosines():
    angles = [0.1, 0.9, 1.4, 0.5]
    first = torch.tensor([[1.0, 0.0]] * 4)
    second = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
    scores = [-a for a in angles]
    found = compared_scores([first, second.flip(0)], [first, second], scores)
    assert found[0]["tuned"]["value"] == pytest.approx(1.0)
    assert found[0]["base"]["value"] < 1


# Rows


def read(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Rows:
    return normalise_similar(read_rows(write(folder / "rows.jsonl", rows)), **keys)


def test_rows_are_recognised_by_their_columns(tmp_path: Path):
    assert [read(tmp_path, make_similar(kind, 8)).kind for kind in KINDS] == list(KINDS)
    rows = [{"q": "a", "d": "b", "n": 1}, {"q": "c", "d": "d", "n": 1}]
    named = read(tmp_path, rows, anchor="q: {q}", positive="d")
    assert named.rows[0] == {"anchor": "q: a", "positive": "b"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"anchor": "a"}, "line 2: no field 'positive'"),
        ({"anchor": "", "positive": "b"}, "line 2: 'anchor' is blank"),
        ({"anchor": "a", "positive": 3}, "line 2: 'positive' is of type int; expected text"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path: Path, row: dict[str, Any], sentence: str):
    with pytest.raises(DataError) as caught:
        read(tmp_path, [{"anchor": "x", "positive": "y"}, row])
    assert sentence in str(caught.value)


def test_wrong_triplets_and_scores_are_named(tmp_path: Path):
    row = {"anchor": "x", "positive": "y", "negative": "z"}
    with pytest.raises(DataError, match="line 2: 'negative' is the same text as 'positive'"):
        read(tmp_path, [row, {**row, "negative": "y"}])
    with pytest.raises(DataError, match="both a negative and a score"):
        read(tmp_path, [{**row, "score": 1}])
    scored = {"sentence1": "x", "sentence2": "y", "score": 0.5}
    with pytest.raises(DataError, match="line 2: 'score' is nan"):
        read(tmp_path, [scored, {**scored, "score": float("nan")}])
    with pytest.raises(DataError, match=r"the same score, 0\.5"):
        read(tmp_path, [scored, scored])
    with pytest.raises(DataError, match="no field 'anchor'"):
        read(tmp_path, [{"a": "x"}])
    pair = {"anchor": "x", "positive": "y"}
    with pytest.raises(DataError, match="all 2 rows have the same positive"):
        read(tmp_path, [pair, {**pair, "anchor": "z"}])


def test_a_batch_of_one_teaches_nothing_and_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="'batch_size' 1 leaves a row nothing to be told from"):
        train(make_embed(tmp_path, batch_size=1))
    assert not (tmp_path / "out").exists()
