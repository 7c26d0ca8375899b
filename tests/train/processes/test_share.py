"""A step's rows among processes: the same rows, the same weights, equally many passes each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from inlay.errors import TrainingError, UsageError
from inlay.evaluate.generation import Sampling
from inlay.tasks.grpo.shared_answers import SharedDraws
from inlay.train.guard import check_same
from inlay.train.order import order
from inlay.train.processes.share import Share, SharedOrder, share_of
from inlay.train.processes.world import World, place_in

PLACE = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
}  # fmt: skip


def shares(rows: int, accumulation: int, size: int) -> list[Share]:
    return [share_of(rows, accumulation, World(rank=rank, size=size)) for rank in range(size)]


divisible = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8)).filter(
    lambda t: t[0] * t[1] % t[2] == 0
)


@settings(max_examples=200)
@given(divisible, st.integers(1, 60))
def test_every_row_counts_as_it_does_in_one_process(shape: tuple[int, int, int], count: int):
    rows, accumulation, size = shape
    lengths = [1 + i * 7 % 13 for i in range(count)]
    whole = order(lengths, rows, 3, 0)
    expected: dict[tuple[int, int], float] = {}
    for first in range(0, count, rows * accumulation):
        step = whole[first : first + rows * accumulation]
        passes = [step[i : i + rows] for i in range(0, len(step), rows)]
        for p in passes:
            for row in p:
                expected[first, row] = 1 / len(p) / len(passes)
    found: dict[tuple[int, int], float] = {}
    ends = set()
    for share in shares(rows, accumulation, size):
        mine = list(SharedOrder(lengths, share, 3))
        assert len(mine) == len(SharedOrder(lengths, share, 3))
        taken = iter(mine)
        for step in range(-(-count // share.step_rows)):
            parts = share.parts_of_step(count, step)
            ends.add((step, len(parts)))
            assert len(parts) <= share.passes
            for part in parts:
                numbers = next(taken)
                assert len(numbers) <= share.pass_rows
                for row in numbers if part.weight else []:
                    key = (step * share.step_rows, row)
                    assert key not in found
                    found[key] = part.weight / len(numbers)
        assert next(taken, None) is None
    assert len(ends) == -(-count // (rows * accumulation)), "every process has as many passes"
    assert found == pytest.approx(expected)


def test_seeds_of_passes_do_not_depend_on_the_number_of_processes():
    def seeds(size: int) -> set[int]:
        every = shares(4, 4, size)
        return {s.seed_of(0, step, n) for s in every for step in range(3) for n in range(s.passes)}

    assert seeds(2) == seeds(4) == set(range(12))


@settings(max_examples=100)
@given(divisible, st.integers(1, 60))
def test_the_parts_of_a_pass_are_run_at_once_by_companions(shape: tuple[int, int, int], count: int):
    rows, accumulation, size = shape
    every = shares(rows, accumulation, size)
    for step in range(-(-count // every[0].step_rows)):
        parts = [share.parts_of_step(count, step) for share in every]
        for number in range(len(parts[0])):
            for share, own in zip(every, parts, strict=True):
                if not own[number].weight:
                    continue
                together = [parts[rank][number] for rank in share.companions]
                together = [part for part in together if part.weight]
                assert {(p.first, p.last) for p in together} == {
                    (own[number].first, own[number].last)
                }
                rows_run = [row for p in together for row in range(p.start, p.stop)]
                assert rows_run == list(range(own[number].first, own[number].last))
                whole = sum(p.weight for p in together)
                assert own[number].pass_weight == pytest.approx(whole)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_tokens_drawn_by_several_are_those_that_one_process_draws(temperature: float, top_p: float):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    warped = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped  # type: ignore[arg-type]
    torch.manual_seed(1)
    one = [torch.multinomial(warped.softmax(dim=-1), 1)[:, 0] for _ in range(5)]
    for rank in range(3):
        torch.manual_seed(1)
        own = logits[2 * rank : 2 * rank + 2]
        draws = SharedDraws(Sampling(temperature, top_p), World(rank=rank, size=3))
        for expected in one:
            found = draws(torch.empty(0), own).argmax(dim=-1)
            assert torch.equal(found, expected[2 * rank : 2 * rank + 2])


def test_a_step_that_cannot_be_divided_is_refused():
    with pytest.raises(
        UsageError, match=r"a step of 4 rows .* cannot be divided among 3 processes"
    ):
        share_of(2, 2, World(size=3))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": None}, "WORLD_SIZE is 2 and RANK not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "give 'parallel: fsdp' in the run file instead"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "the run's own 'dtype'"),
    ],
)
def test_a_launcher_that_says_half_is_a_sentence(change: dict[str, str | None], sentence: str):
    said = {k: v for k, v in {**PLACE, **change}.items() if v is not None}
    with pytest.raises(UsageError, match=sentence):
        place_in(said)


def test_a_place_is_read_and_one_process_needs_none():
    assert place_in({**PLACE, "ACCELERATE_MIXED_PRECISION": "no"}) == (1, 2, 1, 2)
    assert place_in({**PLACE, "WORLD_SIZE": "1"}) is None
    assert place_in({}) is None


def test_adapters_that_differ_stop_the_run():
    check_same([{"a": "1", "b": "2"}, {"a": "1", "b": "2"}], 4)
    with pytest.raises(TrainingError, match=r"after step 4 process 1 holds another adapter .* 'b'"):
        check_same([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}], 4)
