"""A fast path is compared with the plain one before its first use.

The comparison runs on a small model or module of the same class and configuration with random
weights (`inlay.model.fast.shrink`), so that the user's own model is not touched and its size does
not count. It runs in its own thread, without the caller's hooks, modes, autocast and random state.
A verdict holds for a class, its configuration and the libraries' versions, until the process ends.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from inlay.errors import first_line
from inlay.kernels import switches
from inlay.model.load.libraries import quiet_transformers
from inlay.model.process import threads
from inlay.storage.registry import layer_class

T = TypeVar("T")
EXACT = 2e-4
"""Allowed difference of values and gradients in float32, relative to the largest: rounding."""
ROUNDINGS = 4.0
"""Roundings allowed in half precision, besides three times the plain path's own error."""


@dataclass(frozen=True)
class Verdict:
    """The cases in which a fast path equals the plain one, and why not in others."""

    proven: frozenset[str]
    against: tuple[str, ...] = ()


class Differs(Exception):  # noqa: N818
    """The fast path computes something else; the message says what and by how much."""


class Untried(Exception):  # noqa: N818
    """The plain path raises on these inputs, so that they are no case to prove."""


@dataclass(frozen=True)
class Trial:
    """A comparison of the fast path with the plain one, in one case."""

    case: str
    """What is proven if it agrees; `always`: needed for every case."""
    run: Callable[[], None]
    """Raises `Differs`, or whatever the fast path raises."""


ALCASES = "always"
verdicts: dict[Any, Verdict] = {}
"""The verdicts of this process."""
warned: set[str] = set()
"""What this process has warned of."""


def verdict(key: Any, trials: Callable[[], Iterable[Trial]]) -> Verdict:
    """Return the verdict of the trials; they run once for each key."""
    whole = (key, transformers.__version__, torch.__version__)
    if whole not in verdicts:
        verdicts[whole] = in_clean_thread(lambda: judged(trials))
    return verdicts[whole]


def judged(trials: Callable[[], Iterable[Trial]]) -> Verdict:
    cases: set[str] = set()
    failed: dict[str, str] = {}
    untried = "the plain path does not run on the inputs of the trial"
    try:
        for trial in trials():
            try:
                why = None if trial.case in failed else outcome_of(trial.run)
            except Untried as error:
                untried = f"the plain path raises {described(error)}"
                continue
            cases.add(trial.case)
            if why is not None:
                failed[trial.case] = why
    except Exception as error:
        return Verdict(frozenset(), (f"it cannot be tried: {described(error)}",))
    if ALCASES in failed:
        return Verdict(frozenset(), (failed[ALCASES],))
    if not cases - {ALCASES}:
        return Verdict(frozenset(), (f"it cannot be tried: {untried}",))
    against = tuple(f"for {case} rows, {why}" for case, why in failed.items())
    return Verdict(frozenset(cases - set(failed) - {ALCASES}), against)


def outcome_of(run: Callable[[], None]) -> str | None:
    """Return why a fast path is refused, or None; let `Untried` through."""
    try:
        run()
    except Untried:
        raise
    except Differs as differs:
        return str(differs)
    except Exception as error:
        return f"it raises {described(error)}"
    return None


def described(error: BaseException) -> str:
    line = first_line(error)[:200]
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def in_clean_thread(work: Callable[[], T]) -> T:
    """Run in a new thread, without the caller's hooks, modes, autocast and random state."""
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
                stack.enter_context(threads(1))  # to share tiny tensors costs more than it saves
                found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="inlay-proof")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]


def compare(
    fast: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor] | None = None,
    spread: float = 0.0,
) -> None:
    """Raise `Differs` unless values and gradients agree to rounding.

    `exact` is the plain path in float32, where both others are in a narrower dtype: the fast path
    may then be off by what the plain path is off, a few times over.
    """
    largest: dict[str, float] = {}
    for name, expected in plain.items():
        group = name.split(" ", 1)[0]
        largest[group] = max(largest.get(group, 0.0), length(expected))
    for name, expected in plain.items():
        got = fast.get(name)
        if got is None or got.shape != expected.shape:
            shape = None if got is None else tuple(got.shape)
            raise Differs(f"{name} has shape {shape} in place of {tuple(expected.shape)}")
        scale = length(expected) + 1e-2 * largest[name.split(" ", 1)[0]] + 1e-12
        allowed, reference = EXACT, expected
        if exact is not None:
            reference = exact[name]
            off = length(expected.float() - reference.float()) / scale
            allowed = 3 * off + ROUNDINGS * torch.finfo(expected.dtype).eps + spread
        difference = length(got.float() - reference.float()) / scale
        if not difference <= allowed:
            raise Differs(f"{name} differs by {difference:.2g} of its size, {allowed:.1g} allowed")


def length(x: Tensor) -> float:
    return float(x.detach().float().norm())


def note(name: str, module: nn.Module, fast: type[Any], found: Verdict) -> str | None:
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
    if about not in warned:
        warned.add(about)
        warnings.warn(message, UserWarning, stacklevel=4)
