"""The catalogue, read from source, says what the real classes say."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import typing

import pytest

from inlay.errors import AdapterError
from inlay.methods.base import Method
from inlay.methods.catalog import MethodSpec, build_method, catalog, specs_in
from inlay.run.config import RunConfig

NAMES = sorted(catalog())


def real_class(spec: MethodSpec) -> type[Method]:
    return getattr(importlib.import_module(spec.module), spec.class_name)


def test_lora_is_there() -> None:
    assert "lora" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_is_the_dataclass(name: str) -> None:
    spec = catalog()[name]
    real = real_class(spec)
    defaults = {
        field.name: (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else ...
            if field.default is dataclasses.MISSING
            else field.default
        )
        for field in dataclasses.fields(real)
    }
    assert {field.name: field.default for field in spec.fields.values()} == defaults
    hints = typing.get_type_hints(real)
    assert {name: field.type for name, field in spec.fields.items()} == {
        name: hints[name] for name in spec.fields
    }
    assert real.name == name
    assert (spec.paper, spec.peft_type) == (real.paper, real.peft_type)
    assert spec.learning_rate_factor == real.learning_rate_factor
    assert spec.default_targets == real.default_targets
    assert spec.mergeable == real.mergeable
    assert spec.kind in [base.__name__ for base in real.__mro__]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_sentence_a_paper_and_an_equation(name: str) -> None:
    spec = catalog()[name]
    assert spec.summary.endswith(".")
    assert len(spec.summary) > 10
    assert spec.equation


@pytest.mark.parametrize("name", NAMES)
def test_no_hyperparameter_hides_a_key_of_the_run(name: str) -> None:
    assert not set(catalog()[name].fields) & set(RunConfig.model_fields)


def test_build_method_imports_and_builds() -> None:
    method = build_method("lora", {"rank": 3})
    assert dataclasses.asdict(method)["rank"] == 3


def test_an_unknown_method_is_refused_with_a_hint() -> None:
    with pytest.raises(AdapterError, match="Did you mean 'lora'"):
        build_method("lroa")


def test_an_unknown_hyperparameter_is_refused_with_a_hint() -> None:
    with pytest.raises(AdapterError, match="Did you mean 'rank'"):
        build_method("lora", {"rnk": 3})


def test_a_new_file_is_a_new_method(tmp_path) -> None:
    source = tmp_path / "scaled.py"
    source.write_text(
        '"""Scaled: W\' = c W."""\n'
        "RANK = 4\n"
        "class Scaled(WeightMethod):\n"
        '    """One number a layer. Nothing more."""\n'
        "    c: float = 1.0\n"
        "    rank: int = RANK\n"
        "    name = 'scaled'\n"
        "    paper = '0000.00000'\n"
    )
    [spec] = specs_in(source)
    assert (spec.name, spec.class_name, spec.kind) == ("scaled", "Scaled", "WeightMethod")
    assert spec.summary == "One number a layer."
    assert spec.equation == "W' = c W"
    assert {f.name: f.default for f in spec.fields.values()} == {"c": 1.0, "rank": 4}
    assert spec.default_targets == "all-linear"


def test_reading_the_catalogue_imports_no_torch() -> None:
    code = "import sys, inlay.methods.catalog as c; c.catalog(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
