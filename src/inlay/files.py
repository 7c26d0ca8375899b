"""Files that are whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

FULL = ("No space left", "the disk is full")
"""How libraries that hide the error's number say that the disk is full."""


def write_text(path: Path, content: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(content, encoding="utf-8")
        put_in_place(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder and all that `fill` writes into it at once; an older folder is removed."""
    aside = folder.with_name(folder.name + ".tmp")
    remove(aside)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        flush(aside)
    except BaseException:
        remove(aside)
        raise
    remove_whole(folder)
    aside.rename(folder)
    flush_names(folder.parent)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush a finished file or folder to the disk, and give it its name by one rename."""
    flush(aside)
    aside.replace(path)
    flush_names(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder with every file in it, to the disk."""
    for each in [path, *path.rglob("*")]:
        if each.is_dir():
            flush_names(each)
        else:
            with each.open("rb") as file:
                os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_whole(folder: Path) -> None:
    """Remove a folder so that it is never seen with only a part of its files."""
    if folder.exists():
        leaving = folder.with_name(folder.name + ".old.tmp")
        remove(leaving)
        folder.rename(leaving)
        remove(leaving)


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def share_as_usual(path: Path) -> None:
    """Give a file the permissions any new file has here; safetensors lets only its owner read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def is_full(error: Exception) -> bool:
    """Return whether an error means that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(w in str(error) for w in FULL)


def size_of(*paths: Path) -> int:
    """Return the bytes that files take; of a folder, all files below it."""
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*"))]
    return sum(f.stat().st_size for f in files if f.is_file())


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of files' contents, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
