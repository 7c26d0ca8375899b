"""Files that are whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from inlay.checkpoint.folder import flush_names
from inlay.errors import CheckpointError, TrainingError

FULL = ("No space left", "the disk is full")
"""How libraries that hide the error's number say that the disk is full."""


@contextmanager
def saving(what: str, path: Path) -> Generator[None]:
    """Turn the disk's errors into a sentence that says what could not be saved and where."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or any(
            word in str(error) for word in FULL
        )
        reason = "the disk is full" if full else str(error)
        raise TrainingError(
            f"{what} could not be saved in {path}: {reason}; what was saved before is intact. "
            "Free some space or mend the folder, then run the same command with --resume"
        ) from None


def write_atomically(path: Path, content: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder and all that `fill` writes into it at once; an older one gives way."""
    beside = folder.with_name(folder.name + ".tmp")
    remove(beside)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        flush(beside)
    except BaseException:
        remove(beside)
        raise
    remove_whole(folder)
    beside.rename(folder)
    flush_names(folder.parent)


def flush(folder: Path) -> None:
    """Have every file of a folder on the disk before anything refers to it."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush_names(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_whole(folder: Path) -> None:
    """Remove a folder so that it is never seen with only a part of its files."""
    if folder.exists():
        leaving = folder.with_name(folder.name + ".old.tmp")
        remove(leaving)
        folder.rename(leaving)
        remove(leaving)


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def size_of(paths: Iterable[Path]) -> int:
    """Return the bytes that files take; of a folder, all files below it."""
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*"))]
    return sum(f.stat().st_size for f in files if f.is_file())


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' contents, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
