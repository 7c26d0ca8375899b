"""Metrics of labels against scikit-learn and by hand; the test that swaps predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from inlay.data.inputs import InputRow
from inlay.evaluate.record import compared_statistic
from inlay.tasks.classify.compare import baseline_of, class_records, compare_labels
from inlay.tasks.classify.entities import entities
from inlay.tasks.classify.metrics import Labels, metrics

sklearn_metrics: Any = pytest.importorskip("sklearn.metrics")


def values(kind: Any, classes: tuple[str, ...], given: Any, expected: Any) -> dict[str, float]:
    found = metrics([torch.tensor(row).float() for row in given], expected, Labels(kind, classes))
    return {metric.name: metric.value for metric in found}


def drawn(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape)


def test_one_class_a_row_is_measured_as_scikit_learn_does():
    logits = drawn(0, 50, 4)
    expected = np.random.default_rng(1).integers(3, size=50).tolist()
    found = values("single", ("a", "b", "c", "d"), logits, expected)
    chosen = logits.argmax(1)
    probabilities = torch.tensor(logits).float().double().softmax(-1).numpy()
    assert found["accuracy"] == sklearn_metrics.accuracy_score(expected, chosen)
    assert found["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(expected, chosen, average="macro")
    )
    loss = sklearn_metrics.log_loss(expected, probabilities, labels=range(4))
    assert found["loss"] == pytest.approx(loss)


def test_several_classes_a_row_are_measured_as_scikit_learn_does():
    logits = drawn(2, 40, 3)
    expected = (drawn(3, 40, 3) > 0).astype(float)
    found = values("multi", ("a", "b", "c"), logits, expected.tolist())
    chosen = logits > 0
    for average in ("micro", "macro"):
        score = sklearn_metrics.f1_score(expected, chosen, average=average)
        assert found[f"{average}_f1"] == pytest.approx(score)
    assert found["exact_labels"] == sklearn_metrics.accuracy_score(expected, chosen)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_numbers_are_measured_as_scikit_learn_and_scipy_do(scale: float):
    given, expected = drawn(4, 30, 1) * scale, drawn(5, 30) * scale
    found = values("regression", (), given, expected.tolist())
    flat = given[:, 0]
    assert found["rmse"] == pytest.approx(
        sklearn_metrics.root_mean_squared_error(expected, flat), rel=1e-6
    )
    assert found["mae"] == pytest.approx(
        sklearn_metrics.mean_absolute_error(expected, flat), rel=1e-6
    )
    assert found["pearson"] == pytest.approx(stats.pearsonr(expected, flat).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(expected, flat).statistic, abs=1e-6)


def test_a_constant_has_no_correlation():
    assert set(values("regression", (), [[1.0], [1.0]], [0.0, 2.0])) == {"rmse", "mae"}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-a I-a B-a", [("a", 0, 2), ("a", 2, 3)]),
        ("I-a I-a O I-b", [("a", 0, 2), ("b", 3, 4)]),
        ("B-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("O B-a", [("a", 1, 2)]),
    ],
)
def test_entities_are_those_of_conll(tags: str, found: list[tuple[str, int, int]]):
    assert list(entities(tags.split())) == found


def test_tags_are_measured_word_by_word_and_as_whole_entities():
    classes = ("O", "B-a", "I-a")
    expected = [[-100, 1, 2, 0, -100], [1, 0]]
    chosen = [[0, 1, 2, 1, 0], [0, 0]]
    given = [torch.eye(3)[torch.tensor(row)] * 5 for row in chosen]
    found = {m.name: m.value for m in metrics(given, expected, Labels("tokens", classes))}
    assert found["tag_accuracy"] == pytest.approx(3 / 5)
    assert found["entity_f1"] == pytest.approx(2 * 1 / (2 + 2))
    plain = metrics(given, expected, Labels("tokens", ("N", "V", "A")))
    assert [metric.name for metric in plain] == ["loss", "tag_accuracy"]
    rows = class_records(given, expected, Labels("tokens", classes))
    assert [(row["label"], row["rows"]) for row in rows] == [("O", 2), ("B-a", 2), ("I-a", 1)]
    assert rows[1]["precision"] == 0.5


def test_baselines_are_shares_and_means():
    assert baseline_of([0, 0, 1], "single", 3).exp().tolist() == pytest.approx(
        [3 / 6, 2 / 6, 1 / 6]
    )
    assert baseline_of([1.0, 4.0], "regression", 1).tolist() == [2.5]
    multi = baseline_of([[1.0, 0.0], [1.0, 0.0]], "multi", 2).sigmoid()
    assert multi.tolist() == pytest.approx([3 / 4, 1 / 4])
    tags = baseline_of([[-100, 0, 0], [1]], "tokens", 2).exp()
    assert tags.tolist() == pytest.approx([3 / 5, 2 / 5])


class Reads(torch.nn.Module):
    """A model whose logits are its ids: it is always right about the first class of two."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.scale.weight)
        self.config = type("C", (), {"get_text_config": lambda s: s, "pad_token_id": 0})()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        del attention_mask
        first = self.scale(input_ids[:, :1].float()).squeeze(1)
        return torch.stack([first, -first], dim=1)


def test_the_baseline_and_the_note_stand_beside_base_and_tuned():
    import inlay
    from inlay.methods.full import Full

    model = inlay.attach(Reads(), Full(), targets="all")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(3.0)
    rows = [InputRow([1], 1, 0) for _ in range(9)] + [InputRow([1], 1, 1)]
    labels = Labels("single", ("a", "b"))
    constant = baseline_of([0, 1, 1], "single", 2)
    found = compare_labels(model, rows, labels, constant)
    by_name = {m["name"]: m for m in found["metrics"]}
    assert by_name["accuracy"]["base"]["value"] == by_name["accuracy"]["tuned"]["value"] == 0.9
    assert by_name["loss"]["difference"]["value"] != 0
    assert "untrained" in found["note"]
    baseline = {m["name"]: m["base"]["value"] for m in found["baseline"]["metrics"]}
    assert baseline["accuracy"] == pytest.approx(0.1)
    assert found["baseline"]["about"] == "the training rows' most frequent class, 'b'"
    assert found["confusion"] == [[9, 0], [1, 0]]
    assert "baseline" not in compare_labels(model, rows, labels, None)


def test_a_mean_has_the_p_value_of_the_sign_flip_test():
    base, tuned = drawn(6, 40), drawn(7, 40) + 0.5
    found = compared_statistic(
        "mean", "higher", lambda rows: rows[..., 0].mean(-1), base[:, None].tolist(),
        tuned[:, None].tolist(),
    )  # fmt: skip
    from inlay.evaluate.statistics import paired_test

    plain = paired_test(base.tolist(), tuned.tolist())
    assert found["p_value"] == pytest.approx(plain.p_value, abs=0.01)
    assert found["difference"]["value"] == pytest.approx(plain.mean_difference)
    assert plain.interval is not None
    assert found["difference"]["low"] == pytest.approx(plain.interval[0], abs=0.05)


def test_p_is_uniform_where_nothing_differs():
    def p_value(sides: np.ndarray[Any, Any], seed: int) -> float | None:
        base, tuned = sides.tolist()
        mean = compared_statistic("mean", "higher", lambda x: x[..., 0].mean(-1), base, tuned, seed)
        return mean["p_value"]

    found = [p_value(drawn(100 + seed, 2, 20, 1), seed) for seed in range(40)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert p_value(np.repeat(drawn(8, 1, 10, 1), 2, axis=0), 0) == 1.0
