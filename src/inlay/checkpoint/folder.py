"""An adapter's folder: whole or not there, and read without running code or importing torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from inlay.errors import CheckpointError
from inlay.files import flush_names, is_full, put_in_place, sha256_of

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
EXTRAS = "inlay.json"
CARD = "README.md"
FORMAT = 1
"""The version of `inlay.json`; a reader refuses another one."""

PICKLES = ("adapter_model.bin", "adapter_model.pt")
"""torch's own format, of which tensors alone are read."""
WHOLE = "pytorch_model.bin"
PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
"""The first bytes of a bare pickle, and of torch.save's zip archive of one."""

UNFINISHED, COMPLETE = ".inlay-unfinished", ".inlay-complete"
"""Folders inside an adapter's folder while it is saved: files being written, files to move."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its dtype as safetensors spells it (`F32`) and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFolder:
    """The contents of an adapter's folder, without the tensors' values."""

    path: Path
    config: dict[str, Any]
    extras: dict[str, Any] | None
    """The contents of inlay.json; None in a plain HF PEFT folder."""
    tensors: dict[str, Entry]
    source: str = TENSORS
    """The file that holds the tensors."""
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    """A tensor's key here -> its key in the file, where it was converted."""

    @property
    def base_model(self) -> str | None:
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def storage(self) -> str | None:
        return self.base_word("storage")

    @property
    def head_storage(self) -> str | None:
        return self.base_word("head_storage")

    def base_word(self, key: str) -> str | None:
        found = (self.extras or {}).get("base")
        word = found.get(key) if isinstance(found, dict) else None
        return word if isinstance(word, str) else None


def read_folder(directory: str | Path) -> AdapterFolder:
    """Read an adapter's folder without torch or tensors; CheckpointError if damaged."""
    path = Path(directory)
    with reading(path):
        check_files(path)
        config = read_json(located(path, CONFIG))
        source = next(n for n in (TENSORS, *PICKLES) if located(path, n).is_file())
        tensors = (read_header if source == TENSORS else header_of_pickle)(located(path, source))
        extras = read_json(located(path, EXTRAS)) if located(path, EXTRAS).is_file() else None
        if extras is not None:
            check_extras(path, extras)
    return AdapterFolder(path, config, extras, tensors, source)


@contextmanager
def reading(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def check_files(path: Path) -> None:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}; an adapter is a folder with {CONFIG} and {TENSORS}")
    if not located(path, CONFIG).is_file():
        raise CheckpointError(f"{path} holds no {CONFIG}, so it is no adapter{below(path)}")
    if located(path, TENSORS).is_file() or any((path / name).is_file() for name in PICKLES):
        return
    if (path / WHOLE).is_file():
        raise CheckpointError(
            f"{path} holds {WHOLE}, the name of a whole model's weights, and no {TENSORS}; where "
            f"it holds an adapter's tensors, call it {PICKLES[0]}"
        )
    raise CheckpointError(f"{path} holds no {TENSORS}; its configuration alone is no adapter")


def below(path: Path) -> str:
    """Name the adapters in subfolders, where HF PEFT puts those not called default."""
    found = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
    return f"; its subfolders {', '.join(found)} are" if found else ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_such_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def no_such_number(word: str) -> float:
    raise ValueError(f"{word} is not a number in JSON")


def read_header(path: Path) -> dict[str, Entry]:
    check_no_pickle(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Entry(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt ({error}); copy it again or take an earlier checkpoint"
        ) from None


def header_of_pickle(path: Path) -> dict[str, Entry]:
    """Read the names, dtypes and shapes of the tensors in a file of torch.save."""
    from inlay.checkpoint.pickled import read_pickled
    from inlay.storage.dtypes import dtype_name

    tensors = read_pickled(path).items()
    return {name: Entry(dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors}


def check_no_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(PICKLE_STARTS) and start[8:] != b"{":
        raise CheckpointError(
            f"{path} is a pickle under another name, which can run any code when opened and is "
            "never read; save the adapter as safetensors where you trust it"
        )


def check_extras(path: Path, extras: Mapping[str, Any]) -> None:
    if extras.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / EXTRAS} has format {extras.get('format')!r}, this version of inlay reads "
            f"{FORMAT}; update inlay, or delete {EXTRAS} to read the folder as plain HF PEFT"
        )
    files = extras.get("files")
    recorded = files.get(TENSORS) if isinstance(files, dict) else None
    if recorded != sha256_of(located(path, TENSORS)):
        raise CheckpointError(
            f"{path / TENSORS} is not the file that was saved: its SHA-256 differs from the one in "
            f"{EXTRAS}; copy the folder again, or take an earlier checkpoint"
        )


def write_adapter(directory: Path, fill: Callable[[Path], None]) -> None:
    """Put the files that `fill` writes into `directory`, all at once; on failure, none of them.

    They are written into a folder of their own inside it and flushed to the disk. One rename then
    makes them the ones that `located` finds, and each is moved to its place. A process killed at
    any moment leaves either the old adapter or the new one. Other files in `directory` stay.
    """
    created = not directory.exists()
    try:
        if not created and not directory.is_dir():
            raise CheckpointError(f"{directory} is a file; name a folder to save the adapter in")
        directory.mkdir(parents=True, exist_ok=True)
        finish(directory)
        stage(directory, fill)
        finish(directory)
    except (OSError, SafetensorError) as error:
        raise not_saved(directory, error) from None
    finally:
        shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
        if created and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def stage(directory: Path, fill: Callable[[Path], None]) -> None:
    """Write the files aside, flush them, and make them count with one rename."""
    unfinished = directory / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    fill(unfinished)
    put_in_place(unfinished, directory / COMPLETE)


def finish(directory: Path) -> None:
    """Move finished files to their places, also those that an interrupted save left."""
    complete = directory / COMPLETE
    if not complete.is_dir():
        return
    for path in sorted(complete.iterdir()):
        path.replace(directory / path.name)
    flush_names(directory)
    complete.rmdir()


def located(directory: Path, name: str) -> Path:
    """Return the path of a file of the adapter, also after a save that was interrupted."""
    newer = directory / COMPLETE / name
    return newer if newer.is_file() else directory / name


def not_saved(directory: Path, error: Exception) -> CheckpointError:
    strerror = getattr(error, "strerror", None)
    reason = "the disk is full" if is_full(error) else strerror or str(error)
    return CheckpointError(
        f"the adapter could not be saved in {directory}: {reason}; what was there before is intact"
    )
