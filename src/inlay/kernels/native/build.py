"""Compile the C kernels once for each user, and load them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from inlay.errors import UsageError
from inlay.kernels.switches import is_on

SOURCES = ("inlay_native.c", "kernels.h")
FLAGS = (
    "-O3", "-shared", "-fPIC", "-std=gnu11", "-fopenmp-simd", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
LEVELS = ("generic", "avx2", "avx512")
SWITCH = "INLAY_NATIVE"
"""Environment variable: 0 or off for none of this, or the widest instruction set to use."""
SECONDS = 300


@dataclass
class Loaded:
    """The library, or why there is none; `level` is the instruction set in use, or off."""

    library: ctypes.CDLL | None
    level: str
    text: str


@cache
def loaded() -> Loaded:
    """Build and load the library at the first call; never raises for lack of a compiler."""
    asked = os.environ.get(SWITCH, "").lower()
    if asked in ("0", "off"):
        return Loaded(None, "off", f"switched off by {SWITCH}={asked}")
    try:
        path = built()
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Loaded(None, "off", str(error))
    threads = hand_over_threads(library)
    best = LEVELS[library.inlay_best_level()]
    level = best
    if asked in LEVELS:
        level = min(asked, best, key=LEVELS.index)
    elif asked not in ("", "1", "on"):
        raise UsageError(f"{SWITCH}={asked} is none of 0, 1, {', '.join(LEVELS)}")
    library.inlay_set_level(LEVELS.index(level))
    return Loaded(library, level, f"{path}, threads {threads}")


def status() -> str:
    """Say which instruction set is in use and from which file, or why there is none."""
    state = loaded()
    return f"{state.level}: {state.text}"


def library() -> ctypes.CDLL | None:
    """Return the library, or None where it is absent or off."""
    state = loaded()
    return state.library if state.level != "off" and is_on("native") else None


@contextlib.contextmanager
def use(level: str) -> Generator[None]:
    """Run with this instruction set (generic, avx2, avx512), or without the library (off).

    Raises:
        UsageError: this machine cannot.
    """
    state = loaded()
    before = state.level
    able = () if state.library is None else LEVELS[: state.library.inlay_best_level() + 1]
    if level not in ("off", *able):
        raise UsageError(f"native level {level!r} is none of {', '.join(('off', *able))} here")
    set_level(state, level)
    try:
        yield
    finally:
        set_level(state, before)


def set_level(state: Loaded, level: str) -> None:
    """Make this the level in use."""
    state.level = level
    if state.library is not None and level != "off":
        state.library.inlay_set_level(LEVELS.index(level))


def built() -> Path:
    """Return the shared object for these sources, flags and compiler; compile it if need be."""
    compiler = found_compiler()
    folder = cache_folder()
    path = folder / f"inlay_native_{fingerprint(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build_") as work:
        made = Path(work) / path.name
        source = Path(__file__).parent / SOURCES[0]
        command = [*compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)
    return path


def found_compiler() -> list[str]:
    """Return the C compiler's command: $CC, or the first of cc, gcc and clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise RuntimeError("no C compiler: none of $CC, cc, gcc and clang is on the PATH")


def cache_folder() -> Path:
    """Return where compiled kernels are kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "inlay" / "native"


def fingerprint(compiler: list[str]) -> str:
    """Return a hash of all that the shared object depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=SECONDS, check=True
    ).stdout
    text = [*compiler, *FLAGS, platform.machine(), platform.system()]
    digest = hashlib.sha256("\0".join(text).encode() + version)
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def hand_over_threads(library: ctypes.CDLL) -> str:
    """Give the library torch's own OpenMP runtime; say where it comes from."""
    for name, runtime in openmp_runtimes():
        with contextlib.suppress(AttributeError):
            library.inlay_set_runtime(ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p))
            return f"of {name}"
    return "none: torch's OpenMP runtime was not found"


def openmp_runtimes() -> Iterator[tuple[str, ctypes.CDLL]]:
    """Yield the libraries that torch loaded in which GOMP_parallel may be."""
    folder = Path(torch.__file__).parent
    for stem in ("libgomp", "libiomp5", "libomp"):
        for path in (
            *folder.glob(f"lib/{stem}[.-]*"),
            *folder.parent.glob(f"torch.libs/{stem}[.-]*"),
        ):
            with contextlib.suppress(OSError):
                yield path.name, ctypes.CDLL(str(path))
    yield "the process", ctypes.CDLL(None)
