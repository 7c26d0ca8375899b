"""Files are whole or not there, and only one module of the library makes them so."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from inlay import files

SOURCE = Path(files.__file__).parent


def test_no_other_module_flushes_or_renames() -> None:
    """But the recorder, which appends to the metrics line by line."""
    keepers = {SOURCE / "files.py", SOURCE / "train" / "output" / "recorder.py"}
    others = [path for path in SOURCE.rglob("*.py") if path not in keepers]
    found = [p for p in others if re.search(r"fsync|os\.replace|\.rename\(", p.read_text())]
    assert found == []


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    flush = os.fsync

    def fsync(handle: int) -> None:
        found.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_text_is_flushed_before_it_has_its_name(tmp_path: Path, flushed: list[str]) -> None:
    files.write_text(tmp_path / "run.json", "new")
    assert flushed == ["run.json.tmp", tmp_path.name]
    assert (tmp_path / "run.json").read_text() == "new"


def test_a_folder_is_flushed_before_it_has_its_name(tmp_path: Path, flushed: list[str]) -> None:
    def fill(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text("a")

    files.write_folder(tmp_path / "out", fill)
    assert flushed == ["out.tmp", "below", "a", tmp_path.name]
    assert (tmp_path / "out" / "below" / "a").read_text() == "a"


def test_a_new_folder_replaces_the_older_one_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        files.write_folder(tmp_path / "out", lambda folder, name=name: (folder / name).touch())
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("kind", ["folder", "text"])
def test_a_failure_leaves_what_was_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_folder(tmp_path / "out", lambda folder: files.write_text(folder / "a", "old"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = {
        "folder": lambda: files.write_folder(tmp_path / "out", lambda path: (path / "b").touch()),
        "text": lambda: files.write_text(tmp_path / "out" / "a", "new"),
    }[kind]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert files.is_full(caught.value)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "a"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_hash_and_a_size_are_of_all_files(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, text in zip(paths, ("one", "two"), strict=True):
        path.write_text(text)
    whole = tmp_path / "both"
    whole.write_text("onetwo")
    assert files.sha256_of(*paths) == files.sha256_of(whole)
    assert files.size_of(*paths) == files.size_of(whole) == 6
    assert files.size_of(tmp_path) == 12
