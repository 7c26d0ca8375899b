from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inlay.errors import TrainingError, UsageError
from inlay.tasks.grpo.judge import Answers, judge_of
from inlay.tasks.grpo.named_rewards import reward_problems
from inlay.tasks.grpo.rewards import BUILT_IN, final_number, json_valid, length, regex

ROWS = [{"prompt": f"p{i}", "answer": f"#### {i}"} for i in range(3)]
PLACES = [f"data.jsonl, line {i + 1}" for i in range(3)]
SAID = ["so #### 0", "it is 7", "2.0"]
ANSWERS = Answers(ROWS, PLACES, SAID, [[1, 2, 3], [4], [5, 6]])


def from_file(folder: Path, text: str, *arguments: Any) -> Any:
    path = folder / "rewards.py"
    path.write_text(text)
    return judge_of(arguments or [f"{path}:mine"])


# The built-in ones


def test_a_final_number_is_read_as_gsm8k_writes_it() -> None:
    score = final_number()
    said = ["5 + 2 = 7.\n#### 7", "7", "7, no: #### 8", "I have 1,007.0", "none", "#### 7 apples"]
    assert list(score(completions=said, answer=["...\n#### 7"] * 6)) == [1, 1, 0, 0, 0, 1]
    assert list(score(completions=["1,007.0", "7"], answer=[1007, 7.0])) == [1, 1]
    assert list(final_number(column="n")(completions=["3"], n=["#### 3"])) == [1]


def test_an_answer_to_a_conversation_is_a_list_of_one_message() -> None:
    said = [[{"role": "assistant", "content": "#### 7"}]]
    assert list(final_number()(completions=said, answer=["#### 7"])) == [1]


def test_json_is_json_and_holds_the_keys() -> None:
    said = ['{"a": 1, "b": null}', " [1, 2]\n", '{"a": NaN}', '{"a": 1} so', "", "[" * 100_000]
    assert list(json_valid()(completions=said)) == [1, 1, 0, 0, 0, 0]
    assert list(json_valid(keys=["a", "b"])(completions=said)) == [1, 0, 0, 0, 0, 0]


def test_a_pattern_is_looked_for_anywhere_unless_it_says_where() -> None:
    assert list(regex(pattern="b+")(completions=["abba", "aa"])) == [1, 0]
    assert list(regex(pattern="^b")(completions=["abba", "ba"])) == [0, 1]


def test_a_length_falls_off_on_both_sides() -> None:
    ids = [[0] * n for n in (0, 1, 2, 4, 8, 16)]
    assert list(length(most=8, least=4)(completion_ids=ids)) == [0, 0.25, 0.5, 1, 1, 0.5]
    assert list(length(most=8)(completion_ids=ids)) == [1, 1, 1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("regx", "there is no reward 'regx'; there are final_number, json, regex, length, and"),
        ("regx", "Did you mean 'regex'?"),
        ("regex", "the reward 'regex' needs the argument 'pattern'"),
        ({"name": "regex", "pattern": "("}, "'(' is no regular expression"),
        ({"name": "regex", "pattern": 3}, "'pattern' must be a regular expression, not 3"),
        ({"name": "length"}, "the reward 'length' needs the argument 'most'"),
        ({"name": "length", "most": 0}, "'most' must be a whole number of at least 1, not 0"),
        ({"name": "length", "most": True}, "'most' must be a whole number of at least 1, not True"),
        ({"name": "length", "most": 3, "least": 4}, "'least' must be a whole number from 0 to 3"),
        ({"name": "json", "keys": "a"}, "'keys' must be a list of names, not 'a'"),
        ({"name": "json", "key": ["a"]}, "has no argument 'key'; it has keys. Did you mean 'keys'"),
        ({"name": "final_number", "column": 1}, "'column' must be the name of a column, not 1"),
        ({"pattern": "a"}, "a reward needs a 'name'"),
        ({"name": "json", "weight": "2"}, "'weight' must be a number, not '2'"),
        ({"name": "json", "weight": math.inf}, "'weight' must be a number, not inf"),
        ("{name: json, keys: [", "is not YAML"),
        ("{name: json, 1: 2}", "has no argument '1'; it has keys"),
    ],
)
def test_what_is_wrong_with_an_entry_is_a_sentence(entry: Any, sentence: str) -> None:
    assert sentence in str(reward_problems([entry]))
    with pytest.raises(UsageError) as caught:
        judge_of([entry])
    assert sentence in str(caught.value)


def test_an_entry_may_be_the_text_of_a_mapping_as_on_a_command_line() -> None:
    judge = judge_of(["{name: regex, pattern: 'a+', weight: 0.5}", "json"])
    assert [(r.name, r.weight) for r in judge.rewards] == [("regex", 0.5), ("json", 1.0)]


def test_every_built_in_reward_says_what_it_gives() -> None:
    for make in BUILT_IN.values():
        assert str(make.__doc__).startswith("Return a reward of 1 where ")


# Several rewards


def test_weights_add_up_and_two_of_a_name_are_told_apart() -> None:
    judge = judge_of(
        [
            "final_number",
            {"name": "regex", "pattern": "it", "weight": 0.5},
            {"name": "regex", "pattern": "2", "weight": -2.0},
        ]
    )
    scores = judge.scores(ANSWERS, "at step 1")
    assert scores == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert judge.totals(scores) == [1, 0.5, -1]
    assert [reward.shown for reward in judge.rewards] == ["final_number", "regex", "regex_2"]
    assert judge.needed == {"answer": "final_number"}
    assert judge.sha256 is None


# A user's own


def test_a_users_function_gets_what_trl_would_give_it(tmp_path: Path) -> None:
    text = """
def mine(prompts, completions, answer, completion_ids, trainer_state, **columns):
    assert prompts == ["p0", "p1", "p2"] and set(columns) == {"log_extra", "log_metric"}
    assert trainer_state == "state" and completion_ids == [[1, 2, 3], [4], [5, 6]]
    return [len(c) + len(a) for c, a in zip(completions, answer)]
"""
    judge = from_file(tmp_path, text)
    also = {"trainer_state": "state", "log_extra": 0, "log_metric": 0}
    assert judge.scores(ANSWERS, "at step 1", also) == [[15.0, 13.0, 9.0]]
    assert judge.needed == {"answer": f"{tmp_path / 'rewards.py'}:mine"}
    assert len(judge.sha256) == 64


def test_a_function_without_kwargs_gets_only_what_it_names(tmp_path: Path) -> None:
    judge = from_file(tmp_path, "def mine(completions, extra=1):\n    return [extra] * 3\n")
    assert judge.scores(ANSWERS, "at step 1") == [[1.0, 1.0, 1.0]]
    assert judge.needed == {}


def test_a_function_may_be_given_arguments(tmp_path: Path) -> None:
    entry = {"name": f"{tmp_path / 'rewards.py'}:mine", "limit": 4, "weight": 2.0}
    text = "def mine(completions, limit):\n    return [len(c) > limit for c in completions]\n"
    judge = from_file(tmp_path, text, entry)
    assert judge.totals(judge.scores(ANSWERS, "at step 1")) == [2, 2, 0]
    with pytest.raises(UsageError, match="has no argument 'limt'"):
        from_file(tmp_path, text, {"name": entry["name"], "limt": 4})


def test_numbers_of_numpy_and_torch_are_numbers_and_none_judges_nothing(tmp_path: Path) -> None:
    text = "def mine(values, **rest):\n    return values[0]\n"
    judge = from_file(tmp_path, text)
    for values in (np.array([1.0, 2, 3], dtype=np.float32), torch.tensor([1.0, 2, 3])):
        rows = [{**row, "values": values} for row in ROWS]
        assert judge.scores(Answers(rows, PLACES, SAID, ANSWERS.ids), "") == [[1.0, 2.0, 3.0]]
    both = judge_of([judge.rewards[0].name, "json"])
    rows = [{**row, "values": [None, True, 2]} for row in ROWS]
    scores = both.scores(Answers(rows, PLACES, SAID, ANSWERS.ids), "at step 1")
    assert math.isnan(scores[0][0])
    assert both.totals(scores) == [0, 1, 3]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "return [1 / (len(c) - 7) for c in completions]",
            "raised ZeroDivisionError: float division by zero, at step 4, on the answer to "
            "data.jsonl, line 2; mend the function",
        ),
        ("return [1.0]", "returned 1 values for 3 answers at step 4, to data.jsonl, line 1; data."),
        ("return 1.0", "returned a float at step 4, on the answers to data.jsonl, line 1;"),
        ("return None", "returned a NoneType at step 4"),
        ("return 'abc'", "returned a str at step 4"),
        (
            "return [1, 'x', 2]",
            "returned 'x', a str for the answer to data.jsonl, line 2 at step 4",
        ),
        (
            "return [1, 2, float('nan')]",
            "returned nan for the answer to data.jsonl, line 3 at",
        ),
        (
            "return [float('inf'), 2, 3]",
            "returned inf for the answer to data.jsonl, line 1 at",
        ),
        (
            "import torch; return torch.ones(3, 2)",
            "returned tensor([1., 1.]), a Tensor for the answer to data.jsonl, line 1 at step 4",
        ),
        ("return [1, None, 2]", "no reward judges the answer to data.jsonl, line 2 at step 4"),
    ],
)
def test_what_a_function_does_wrong_names_it_and_the_row_and_the_step(
    body: str, sentence: str, tmp_path: Path
) -> None:
    body = body.replace("1 / (len(c) - 7)", "1.0 / (len(c) - 7)")
    judge = from_file(tmp_path, f"def mine(completions, **rest):\n    {body}\n")
    with pytest.raises(TrainingError) as caught:
        judge.scores(ANSWERS, "at step 4")
    assert sentence in str(caught.value)
    assert "rewards.py:mine'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def mine(:\n", "cannot be run: SyntaxError"),
        ("import nothing_of_this_name\n", "cannot be run: ModuleNotFoundError"),
        ("raise ValueError('no')\n", "cannot be run: ValueError: no"),
        ("def mina(): pass\n", "has no function 'mine'; it has mina. Did you mean 'mina'?"),
        ("mine = 3\n", "has no function 'mine'; it has none."),
        ("async def mine(**x): pass\n", "is async; write it as an ordinary function"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        from_file(tmp_path, text)
    assert sentence in str(caught.value)


def test_a_file_that_is_not_there_is_a_sentence() -> None:
    assert reward_problems(["nowhere/rewards.py:mine"]) is None
    with pytest.raises(UsageError, match=r"there is no file nowhere/rewards\.py"):
        judge_of(["nowhere/rewards.py:mine"])


def test_a_file_is_run_once_for_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    text = "from pathlib import Path\nwith Path(__file__).with_suffix('.log').open('a') as log:\n"
    text += "    log.write('x')\ndef mine(**rest): return [1.0] * 3\n"
    path.write_text(text)
    for _ in range(3):
        judge_of([f"{path}:mine"])
    assert path.with_suffix(".log").read_text() == "x"
    path.write_text(text.replace("1.0", "2.0"))
    assert judge_of([f"{path}:mine"]).scores(ANSWERS, "")[0] == [2.0, 2.0, 2.0]
