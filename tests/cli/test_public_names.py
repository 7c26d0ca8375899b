"""The library's public names: pinned, lazy, and all there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import inlay
from inlay.methods.catalog import catalog

VERBS = {
    "attach", "detach", "disabled", "load", "load_adapter", "merge", "quantize", "report",
    "save_adapter", "use", "compute_in_8_bits", "plain", "stream", "Head",
}  # fmt: skip
ERRORS = {
    "AdapterError", "CheckpointError", "DataError", "InlayError", "MergeError", "ModelError",
    "StorageError", "TargetError", "TrainingError", "UsageError",
}  # fmt: skip


def test_all_is_the_verbs_the_methods_and_the_errors() -> None:
    methods = {spec.class_name for spec in catalog().values()}
    assert set(inlay.__all__) == VERBS | ERRORS | methods


@pytest.mark.parametrize("name", sorted(inlay.__all__))
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(inlay, name).__name__ == name
    assert name in dir(inlay)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lora'"):
        _ = inlay.Lora  # type: ignore[attr-defined]


def test_importing_inlay_imports_no_torch() -> None:
    code = "import sys, inlay; dir(inlay); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
