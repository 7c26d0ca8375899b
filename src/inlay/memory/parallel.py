"""Communication of several devices in a step: its bytes, and its time next to the arithmetic.

Nothing here is measured: links are taken at a share of their data sheet, and every assumption is a
sentence that a plan prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2

from inlay.memory.devices import GB, REACHED, Device, listed
from inlay.memory.plan import Plan
from inlay.memory.simulate import Frozen

NVLINK = {"a100-80": 300, "a100-40": 300, "v100": 150, "h100": 450, "h200": 450, "b200": 900}
"""GB/s that a GPU sends to the others of its machine, by its data sheet; others go by PCIe."""
NETWORK = {"a100-80": 25, "a100-40": 25, "h100": 50, "h200": 50, "b200": 50}
"""GB/s of a GPU's own network card: 200 and 400 Gbit/s."""
SHARED_NETWORK = 12.5
"""GB/s of a machine whose GPUs share one card, 100 Gbit/s."""
LOOPBACK = 1.0
"""GB/s between processes of one CPU over gloo."""
START = 20e-6
"""Seconds to start a transfer, for each doubling of the devices that take part."""
MOST = 1024
GRADIENT = 4
"""Bytes of a gradient: adapters are trained in float32."""


@dataclass(frozen=True)
class Links:
    """The assumed bandwidth between devices, in bytes a second."""

    inside: float
    """Between devices of one machine."""
    between: float
    """Between devices of different machines."""
    overlaps: bool
    """Whether a block arrives while the one before is computed."""
    said: tuple[str, ...]
    """The assumptions, a sentence each."""


def links_of(device: Device, local: int) -> Links:
    if device.kind == "cpu":
        said = f"processes of one machine exchange {LOOPBACK:g} GB/s over gloo, others as much"
        return Links(LOOPBACK * GB, LOOPBACK * GB, False, (said,))
    known = listed(device.name) or device.name
    inside = None if "pcie" in device.name.lower() else NVLINK.get(known)
    between = NETWORK.get(known)
    within = REACHED * inside * GB if inside else device.link
    across = REACHED * GB * (between or SHARED_NETWORK / local)
    own = "each GPU's own card" if between else f"one card of the machine, shared by {local}"
    wire = "NVLink" if inside else "PCIe"
    said = (
        f"inside a machine {within / GB:.0f} GB/s a GPU ({wire}), between machines "
        f"{across / GB:.1f} GB/s a GPU ({own}); {REACHED:.0%} of data sheets, none measured"
    )
    return Links(within, across, True, (said,))


@dataclass(frozen=True)
class Division:
    """Processes of a run, and among how many of them the frozen weights are divided."""

    local: int
    """Processes of one machine."""
    nodes: int
    shards: int
    passes: int
    """Passes of a process to a step."""

    @property
    def size(self) -> int:
        return self.local * self.nodes


@dataclass(frozen=True)
class Step:
    """One process's step: seconds of arithmetic, seconds and bytes of what it receives."""

    compute: float
    gradients: float
    gradient_bytes: int
    gathers: float
    gathered_bytes: int
    seconds: float
    """Seconds of the whole step; gathers run during the arithmetic where the device can do both."""

    @property
    def efficiency(self) -> float:
        """The share of the step that is arithmetic."""
        return self.compute / self.seconds


def step_of(
    division: Division, trained: int, frozen: Frozen, pass_seconds: float, links: Links
) -> Step:
    """Return a process's step.

    Gradients are summed once a step: 2 (n - 1) / n of their bytes go through each process. Divided
    weights are gathered twice a pass, forward and backward, but what is outside the blocks once.

    Args:
        division: the processes.
        trained: parameters that train.
        frozen: the frozen weights, undivided.
        pass_seconds: of one forward and backward pass, arithmetic alone.
        links: how fast the processes reach each other.
    """
    n, g = division.size, division.shards
    widest = links.inside if division.nodes == 1 else links.between
    gradient_bytes = round(2 * (n - 1) / n * GRADIENT * trained)
    gradients = gradient_bytes / widest + (2 * START * ceil(log2(n)) if n > 1 else 0.0)
    inside = frozen.total - frozen.outside
    gathered_bytes = round(division.passes * (g - 1) / g * (2 * inside + frozen.outside))
    link = links.inside if g <= division.local else links.between
    starts = division.passes * (2 * frozen.blocks + 1) * (ceil(log2(g)) if g > 1 else 0)
    gathers = gathered_bytes / link + START * starts
    compute = division.passes * pass_seconds
    overlapped = max(compute, gathers) if links.overlaps else compute + gathers
    return Step(compute, gradients, gradient_bytes, gathers, gathered_bytes, overlapped + gradients)


def pass_seconds(plan: Plan, accumulation: int) -> float:
    return plan.best.seconds / accumulation


def scaling(
    division: Division, plan: Plan, seconds: float, links: Links, step_passes: int
) -> Iterator[tuple[Division, Step]]:
    """Predict the step on 1, 2, 4, ... 1,024 devices; at least one pass a device."""
    size = 1
    while size <= MOST:
        local, nodes = min(size, division.local), max(1, size // division.local)
        devices = local * nodes
        everywhere = division.shards == division.size
        shards = devices if everywhere and division.shards > 1 else min(division.shards, devices)
        one = Division(local, nodes, shards, max(1, ceil(step_passes / devices)))
        yield one, step_of(one, plan.trained, plan.frozen, seconds, links)
        size *= 2
