"""The first import says which libraries are of releases that were not tested."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from inlay import versions

INSTALLED = {name: metadata.version(name) for name in versions.CHECKED}


def test_the_installed_releases_are_tested_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of_untested()


@pytest.mark.parametrize("name", versions.CHECKED)
def test_a_release_outside_the_range_is_named_with_the_range(name: str) -> None:
    public = INSTALLED[name].partition("+")[0]
    required = [f"{name}<{public}; extra == 'x'", "packaging<1", "no-such-library<1"]
    assert versions.untested(required) == [f"{name} {INSTALLED[name]} (tested: <{public})"]


def test_the_first_import_says_so_once() -> None:
    code = (
        "import importlib.metadata as m, warnings, importlib\n"
        "m.requires = lambda name: ['transformers<5', 'torch>=2']\n"
        "warnings.simplefilter('always')\n"
        "import inlay, inlay\n"
        "inlay.InlayError, importlib.import_module('inlay.errors')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("UntestedVersion: inlay was not tested with transformers") == 1
    assert f"{INSTALLED['transformers']} (tested: <5)" in run.stderr
    assert "torch" not in re.sub(r"transformers", "", run.stderr)


@pytest.mark.parametrize("name", versions.CHECKED)
def test_every_checked_library_has_an_upper_and_a_lower_bound(name: str) -> None:
    ranges = [r.specifier for r in map(Requirement, versions.requirements()) if r.name == name]
    assert ranges
    assert all(
        {">="} < {clause.operator for clause in SpecifierSet(str(range_))} for range_ in ranges
    )
