from __future__ import annotations

import re

from demo_data.arithmetic import generate_problems

from inlay.data.read import read_rows
from inlay.evaluate.metrics import final_number

PROBLEMS = generate_problems(2400, seed=0)


def test_problems_are_all_different() -> None:
    assert len({problem.question for problem in PROBLEMS}) == 2400
    assert len({problem.uid for problem in PROBLEMS}) == 2400


def test_the_same_seed_gives_the_same_problems_and_fewer_are_the_first_of_more() -> None:
    assert generate_problems(300, seed=0) == PROBLEMS[:300]
    assert generate_problems(300, seed=1) != PROBLEMS[:300]


def test_every_step_is_right_and_goes_on_from_the_one_before() -> None:
    for problem in PROBLEMS:
        *steps, last = problem.answer.split("\n")
        assert len(steps) == problem.steps
        before = None
        for step in steps:
            found = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)\.", step)
            assert found is not None, step
            a, b, total = int(found[1]), int(found[3]), int(found[4])
            assert total == {"+": a + b, "-": a - b, "*": a * b}[found[2]]
            assert 0 <= total <= 43
            assert before in (None, a)
            before = total
        assert last == f"#### {before}"
        assert final_number(problem.answer) == before


def test_every_number_of_the_steps_stands_in_the_question() -> None:
    for problem in PROBLEMS:
        said = re.findall(r"\d+", problem.question)
        steps = problem.answer.split("\n")[:-1]
        used = re.findall(r"\d+", re.sub(r" = \d+\.", "", steps[0]))
        used += [re.findall(r"\d+", step)[1] for step in steps[1:]]
        assert said == used


def test_one_and_two_steps_are_about_as_many_and_every_operation_occurs() -> None:
    two = sum(problem.steps == 2 for problem in PROBLEMS) / len(PROBLEMS)
    assert 0.4 < two < 0.6
    for sign in "+-*":
        assert sum(f" {sign} " in problem.answer for problem in PROBLEMS) > 300


def test_the_built_in_rows_have_gsm8ks_columns_and_a_prompt() -> None:
    rows = read_rows("arithmetic")
    first = rows[0].values
    assert len(rows) == 2400
    assert (first["question"], first["answer"]) == (PROBLEMS[0].question, PROBLEMS[0].answer)
    assert first["prompt"] == f"Question: {first['question']}\nAnswer:"
    assert first["completion"] == first["answer"]
    assert rows[0].where == "arithmetic, row 1"
