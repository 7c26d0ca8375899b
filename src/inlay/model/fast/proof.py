"""A fast path proves itself before its first use: it is tried beside what it stands for.

Tried is a small model, or module, of the same class and configuration with random weights
(`inlay.model.fast.shrink`), so that the user's own model is not touched and its size does not
count. It runs in a thread of its own, where no hook, mode or autocast of the caller's is in force,
and draws no random number of theirs. A verdict holds for a class, its configuration and the
libraries' versions, for as long as the process lives.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from inlay.kernels import switches
from inlay.model.load.libraries import quiet_transformers
from inlay.storage.registry import layer_class

T = TypeVar("T")
EXACT = 2e-4
"""How far values and gradients in float32 may be apart, as a share of the largest: rounding."""
ROUNDINGS = 4.0
"""How many roundings of a narrower dtype, beside thrice those of the plain way."""


@dataclass(frozen=True)
class Verdict:
    """In which ways a fast path computes what the plain one does, and what spoke against others."""

    proven: frozenset[str]
    against: tuple[str, ...] = ()


class Differs(Exception):  # noqa: N818
    """The fast path computes something else; the message says what, and by how much."""


class Untried(Exception):  # noqa: N818
    """The plain way raises on these inputs, so that nobody can mean to take them."""


@dataclass(frozen=True)
class Trial:
    """Something to be tried in one way."""

    way: str
    """What is proven if it agrees; `always` stands for what every way needs."""
    run: Callable[[], None]
    """Raises `Differs`, or whatever the fast path raises."""


ALWAYS = "always"
verdicts: dict[Any, Verdict] = {}
"""What was found in this process."""
told: set[str] = set()
"""What was warned of in this process."""


def verdict(key: Any, trials: Callable[[], Iterable[Trial]]) -> Verdict:
    """Return what the trials say, from memory where they were run under this key before."""
    whole = (key, transformers.__version__, torch.__version__)
    if whole not in verdicts:
        verdicts[whole] = in_clean_thread(lambda: judged(trials))
    return verdicts[whole]


def judged(trials: Callable[[], Iterable[Trial]]) -> Verdict:
    """Run trials; a way is proven when all of its trials agree and all that every way needs."""
    ways: set[str] = set()
    failed: dict[str, str] = {}
    untried = "its plain way does not run on what is tried"
    try:
        for trial in trials():
            try:
                why = None if trial.way in failed else outcome_of(trial.run)
            except Untried as error:
                untried = f"its plain way raises {said(error)}"
                continue
            ways.add(trial.way)
            if why is not None:
                failed[trial.way] = why
    except Exception as error:
        return Verdict(frozenset(), (f"it cannot be tried: {said(error)}",))
    if ALWAYS in failed:
        return Verdict(frozenset(), (failed[ALWAYS],))
    if not ways - {ALWAYS}:
        return Verdict(frozenset(), (f"it cannot be tried: {untried}",))
    against = tuple(f"for {way} rows, {why}" for way, why in failed.items())
    return Verdict(frozenset(ways - set(failed) - {ALWAYS}), against)


def outcome_of(run: Callable[[], None]) -> str | None:
    """Return what speaks against a fast path, or None; let `Untried` through."""
    try:
        run()
    except Untried:
        raise
    except Differs as differs:
        return str(differs)
    except Exception as error:
        return f"it raises {said(error)}"
    return None


def said(error: BaseException) -> str:
    """Return an error as part of a sentence."""
    line = (str(error).splitlines() or [""])[0][:200]
    return line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"


def in_clean_thread(work: Callable[[], T]) -> T:
    """Do something where nothing of the caller's is in force but the process's settings."""
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(quiet_transformers())
                stack.enter_context(torch.random.fork_rng(devices=[]))
                stack.enter_context(switches.as_the_process_began())
                stack.enter_context(one_core())
                found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="inlay-proof")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


@contextmanager
def one_core() -> Generator[None]:
    """Compute on one core, since to share tiny tensors costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    fast: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor] | None = None,
    spread: float = 0.0,
) -> None:
    """Raise unless values and gradients agree to rounding.

    Args:
        fast: what the fast path computes, by name.
        plain: what the plain way computes.
        exact: what the plain way computes in float32, where both above are in a narrower dtype:
            the fast path may then be off by what the plain way is off, a few times over.

    Raises:
        Differs: naming what, and by how much.
    """
    largest: dict[str, float] = {}
    for name, wanted in plain.items():
        group = name.split(" ", 1)[0]
        largest[group] = max(largest.get(group, 0.0), length(wanted))
    for name, wanted in plain.items():
        got = fast.get(name)
        if got is None or got.shape != wanted.shape:
            shape = None if got is None else tuple(got.shape)
            raise Differs(f"{name} has shape {shape} in place of {tuple(wanted.shape)}")
        scale = length(wanted) + 1e-2 * largest[name.split(" ", 1)[0]] + 1e-12
        allowed, reference = EXACT, wanted
        if exact is not None:
            reference = exact[name]
            off = length(wanted.float() - reference.float()) / scale
            allowed = 3 * off + ROUNDINGS * torch.finfo(wanted.dtype).eps + spread
        difference = length(got.float() - reference.float()) / scale
        if not difference <= allowed:
            raise Differs(f"{name} differs by {difference:.2g} of its size, {allowed:.1g} allowed")


def length(x: Tensor) -> float:
    """Return the Euclidean length of all the values."""
    return float(x.detach().float().norm())


def note(name: str, module: nn.Module, fast: type[Any], found: Verdict) -> str | None:
    """Return what is to be told of a path that steps aside, wholly or in part; None for nothing."""
    if not found.against:
        return None
    where = f"{name} ({layer_class(module).__name__})" if name else layer_class(module).__name__
    aside = "steps aside" if not found.proven else "is taken in part"
    return (
        f"Inlay's fast path {fast.__name__} {aside} on {where}: "
        f"{'; '.join(found.against)}. The model runs as its own library wrote it there: the same "
        "results, only slower"
    )


def tell(message: str, about: str) -> None:
    """Warn once in this process."""
    if about not in told:
        told.add(about)
        warnings.warn(message, UserWarning, stacklevel=4)
