from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inlay.errors import UsageError
from inlay.methods.catalog import catalog
from inlay.run.config import RunConfig
from inlay.run.hyperparameters import method_flags
from inlay.run.run_file import read_yaml
from inlay.run.synonyms import SYNONYMS
from inlay.tasks.config import checked_config, flags, load_config, run_keys

NEEDED = {"model": "pocket", "data": "reports", "output": "out"}


def problems(values: dict[str, object]) -> str:
    with pytest.raises(UsageError) as caught:
        checked_config({**NEEDED, **values})
    return str(caught.value)


def test_defaults_are_the_recipe():
    config = checked_config(NEEDED)
    assert config.learning_rate == "auto"
    assert config.method == "lora"
    assert config.batch_size * config.gradient_accumulation == 16
    assert (config.weight_decay, config.scheduler, config.packing) == (0.0, "linear", "auto")
    assert config.hyperparameters == {}


def test_hyperparameters_stand_beside_the_other_keys():
    config = checked_config({**NEEDED, "rank": 8, "alpha": 16, "epochs": 1})
    assert config.hyperparameters == {"rank": 8, "alpha": 16}
    assert checked_config({**NEEDED, "hyperparameters": {"rank": 8}}).hyperparameters == {"rank": 8}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lerning_rate": 1}, "there is no key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"lr": 1e-4}, "there is no key 'lr'. Did you mean 'learning_rate'?"),
        ({"r": 4}, "there is no key 'r'. Did you mean 'rank'?"),
        ({"xyzzy": 4}, "there is no key 'xyzzy'."),
        ({"rank": "four"}, "'rank' must be a whole number, not 'four'"),
        ({"rank": True}, "'rank' must be a whole number, not True"),
        ({"rslora": "no way"}, "'rslora' must be true or false, not 'no way'"),
        ({"bias_training": "some"}, "'bias_training' must be one of 'none', 'lora_only', 'all'"),
        ({"rank": 4, "hyperparameters": {"rank": 4}}, "'rank' is given twice"),
        ({"hyperparameters": 3}, "'hyperparameters' must be a mapping from names to values, not 3"),
        ({"method": "lroa"}, "there is no method 'lroa'"),
        ({"method": 3}, "'method' must be the name of a method, not 3"),
        ({"storage": "nf5"}, "'storage' must be one of 'dense', 'nf4', 'int8', not 'nf5'"),
        ({"batch_size": 0}, "'batch_size' must be a whole number above 0, not 0"),
        ({"batch_size": 2.5}, "'batch_size' must be a whole number above 0, not 2.5"),
        ({"batch_size": None}, "'batch_size' must be a whole number above 0, not None"),
        ({"epochs": float("nan")}, "'epochs' must be a number above 0, not nan"),
        ({"epochs": float("inf")}, "'epochs' must be a number above 0, not inf"),
        ({"learning_rate": "fast"}, "'learning_rate' must be 'auto' or a number above 0"),
        ({"learning_rate": -1.0}, "'learning_rate' must be 'auto' or a number above 0, not -1.0"),
        ({"seed": -1}, "'seed' must be a whole number of at least 0"),
        ({"split": [0.5, 0.5]}, "'split' must be a list of 3 numbers"),
        ({"split": [0.5, 0.5, 0.5]}, "'split' must add up to 1"),
        ({"split": [0.0, 0.5, 0.5]}, "leaves nothing to train on"),
        ({"targets": []}, "'targets'"),
        ({"targets": [3]}, "'targets' must be text or a list of one or more texts or nothing"),
        ({"model": ""}, "'model' must be text"),
        (
            {"packing": "yes please"},
            "'packing' must be one of 'auto', 'bfd' or true or false, not 'yes please'",
        ),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"text": "t", "prompt": "p"}, "'text' trains on a whole column"),
        ({"prompt": "p"}, "'prompt' needs 'completion' beside it"),
        ({"completion": "p"}, "'completion' needs 'prompt' beside it"),
        ({"format": "alpaca", "text": "p"}, "'format' and named columns exclude each other"),
    ],
)
def test_a_problem_is_a_sentence(values: dict[str, object], sentence: str):
    assert sentence in problems(values)


def test_every_problem_is_told_at_once():
    text = problems({"rank": "four", "lr": 3, "storage": "nf5"})
    assert len(text.splitlines()) == 3


def test_what_is_missing_is_told_with_its_meaning():
    with pytest.raises(UsageError, match="'model' is missing: base model"):
        load_config(None, {"data": "d", "output": "o"})


def test_a_long_value_is_shown_cut():
    assert len(problems({"batch_size": "x" * 10_000})) < 300


def test_a_file_with_its_lines(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: pocket\ndata: d\noutput: o\n\nrank: four\nlr: 3\n")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [
        f"{path}:5: 'rank' must be a whole number, not 'four'",
        f"{path}:6: there is no key 'lr'. Did you mean 'learning_rate'?",
    ]


def test_off_is_a_word_though_yaml_takes_it_for_a_truth_value(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: pocket\ndata: reports\noutput: out\nstream: off\n")
    assert load_config(path).stream == "off"


def test_overrides_win_over_the_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: pocket\ndata: d\noutput: o\nrank: 4\nlearning_rate: 1e-4\n")
    config = load_config(path, {"rank": "8", "targets": ["q_proj", "v_proj"], "epochs": None})
    assert config.hyperparameters == {"rank": 8}
    assert config.targets == ["q_proj", "v_proj"]
    assert config.learning_rate == 1e-4
    assert load_config(path, {"targets": ["all-linear"]}).targets == "all-linear"
    assert load_config(path, {"rank_pattern": ["q_proj=2"]}).hyperparameters["rank_pattern"] == {
        "q_proj": 2
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model: a\nmodel: b\n", ":2: 'model' stands twice, first in line 1"),
        (b"hyperparameters:\n  rank: 1\n  rank: 2\n", ":3: 'rank' stands twice"),
        (b"model: [a\n", "this is not YAML"),
        (b"- a\n- b\n", ":1: a run file holds 'key: value' lines"),
        (b"3: a\n", ":1: a key must be a word"),
        (b"model: \xff\xfe\n", "is not UTF-8"),
        (b"a: &x [*x]\n", "a"),
        (b"model: !!python/object:os.system {}\n", "this is not YAML"),
        (b"model: a\n---\nmodel: b\n", "this is not YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert sentence in str(caught.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(UsageError, match=r"none.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_lacks_the_needed_keys(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert read_yaml(path) == ({}, {})
    with pytest.raises(UsageError, match="'model' is missing"):
        load_config(path)


def test_yaml_comes_back_as_the_same_run(tmp_path: Path):
    config = checked_config({**NEEDED, "rank": 4, "learning_rate": 3e-05})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    assert load_config(path) == config


def test_no_hyperparameter_has_the_name_of_a_key():
    for name in catalog():
        assert not {f.key for f in method_flags(name)} & set(RunConfig.model_fields)


def test_every_flag_is_described():
    for flag in flags():
        assert flag.help
        assert flag.expected
        assert flag.option.startswith("--")
    with pytest.raises(UsageError, match="there is no method 'nothing'"):
        method_flags("nothing")


def test_synonyms_lead_somewhere():
    known = {*run_keys(), *(f.key for n in catalog() for f in method_flags(n))}
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


def test_the_definition_imports_no_torch():
    code = "import sys, inlay.run.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from([*RunConfig.model_fields, "rank", "alpha", "tokens"]) | st.text(max_size=6),
        json_values,
        max_size=4,
    )
)
def test_any_values_make_a_run_or_a_sentence(values: dict[str, object]):
    try:
        config = load_config(None, {**NEEDED, **values})
    except UsageError as error:
        told = str(error)
    else:
        told = config.model
    assert told


@given(st.binary(max_size=60))
def test_any_bytes_make_a_run_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        load_config(path)
