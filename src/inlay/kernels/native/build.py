"""Compile the C kernels, and the C++ of the allocator, once for each user, and load them."""

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
from inlay.files import put_in_place
from inlay.kernels.switches import is_on

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Recipe:
    """The sources, compilers and flags of one shared object."""

    name: str
    sources: tuple[str, ...]
    """The first is compiled, the others are read by it."""
    compilers: tuple[str, ...]
    """An environment variable that names a compiler, then those that are looked for."""
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    depends: str = ""
    """A version on which the shared object also depends."""


KERNELS = Recipe(
    name="inlay_native",
    sources=("inlay_native.c", "kernels.h", "product.h", "halves.h"),
    compilers=("CC", "cc", "gcc", "clang"),
    flags=(
        "-O3", "-shared", "-fPIC", "-std=gnu11", "-fopenmp-simd", "-ffp-contract=off",
        "-fno-math-errno", "-fno-trapping-math",
    ),
    libraries=("-lm",),
)  # fmt: skip
MEMORY = Recipe(
    name="tensor_memory",
    sources=("tensor_memory.cpp",),
    compilers=("CXX", "c++", "g++", "clang++"),
    flags=("-O2", "-shared", "-fPIC", "-std=c++20", "-isystem", str(TORCH / "include")),
    libraries=(f"-L{TORCH / 'lib'}", "-lc10"),
    depends=torch.__version__,
)
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
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
        path = built(KERNELS)
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
    state = loaded()
    return f"{state.level}: {state.text}"


def library() -> ctypes.CDLL | None:
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
    state.level = level
    if state.library is not None and level != "off":
        state.library.inlay_set_level(LEVELS.index(level))


def built(recipe: Recipe) -> Path:
    compiler = found_compiler(recipe)
    folder = cache_folder()
    path = folder / f"{recipe.name}_{fingerprint(recipe, compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build_") as work:
        made = Path(work) / path.name
        source = Path(__file__).parent / recipe.sources[0]
        command = [*compiler, *recipe.flags, str(source), "-o", str(made), *recipe.libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
        put_in_place(made, path)
    return path


def found_compiler(recipe: Recipe) -> list[str]:
    variable, *names = recipe.compilers
    for name in (os.environ.get(variable, ""), *names):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    language = "C++" if variable == "CXX" else "C"
    known = f"{', '.join(names[:-1])} and {names[-1]}"
    raise RuntimeError(f"no {language} compiler: none of ${variable}, {known} is on the PATH")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "inlay" / "native"


def fingerprint(recipe: Recipe, compiler: list[str]) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, timeout=SECONDS, check=True
    ).stdout
    about = (platform.machine(), platform.system(), recipe.depends)
    digest = hashlib.sha256("\0".join([*compiler, *recipe.flags, *about]).encode() + version)
    for name in recipe.sources:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def hand_over_threads(library: ctypes.CDLL) -> str:
    for name, runtime in openmp_runtimes():
        with contextlib.suppress(AttributeError):
            library.inlay_set_runtime(ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p))
            return f"of {name}"
    return "none: torch's OpenMP runtime was not found"


def openmp_runtimes() -> Iterator[tuple[str, ctypes.CDLL]]:
    for stem in ("libgomp", "libiomp5", "libomp"):
        for path in (
            *TORCH.glob(f"lib/{stem}[.-]*"),
            *TORCH.parent.glob(f"torch.libs/{stem}[.-]*"),
        ):
            with contextlib.suppress(OSError):
                yield path.name, ctypes.CDLL(str(path))
    yield "the process", ctypes.CDLL(None)
