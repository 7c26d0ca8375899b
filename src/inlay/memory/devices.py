"""Memory and speed of devices: from vendors' data sheets, or measured on this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from inlay.errors import UsageError, did_you_mean
from inlay.memory.probe import resident

GB = 10**9
TERA = 10**12
REACHED = 0.75
"""The share of a data sheet's arithmetic and bandwidth that large products reach in practice."""
CUDA_RUNTIME = int(0.7 * GB)
"""About the bytes that CUDA's context and libraries hold on a device without any tensor."""
HOST_LINK = {"pcie3": 12 * GB, "pcie4": 25 * GB, "pcie5": 50 * GB}
"""Bytes a second from pinned host memory, as they are reached."""


@dataclass(frozen=True)
class Device:
    """The figures of a device that a plan needs."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    """Bytes, all of it."""
    bandwidth: float
    """Bytes a second."""
    half: float
    """Dense operations a second on bfloat16 (float16 on a T4 or V100), summed in float32."""
    single: float
    """The same on float32."""
    link: float = HOST_LINK["pcie4"]
    """Bytes a second from the host's memory."""
    measured: bool = False
    """Whether the rates were measured on this machine, not read from a data sheet."""

    def rate(self, dtype: torch.dtype) -> float:
        peak = self.single if dtype in (torch.float32, torch.float64) else self.half
        return peak if self.measured else REACHED * peak

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth if self.measured else REACHED * self.bandwidth


def gpu(
    name: str, memory: float, bandwidth: float, half: float, single: float, link: str = "pcie4"
) -> Device:
    """Return a GPU from its data sheet: GB, GB/s, TFLOP/s, TFLOP/s."""
    return Device(
        name,
        "cuda",
        int(memory * GB),
        bandwidth * GB,
        half * TERA,
        single * TERA,
        HOST_LINK[link],
    )


DEVICES = {
    device.name: device
    for device in (
        gpu("b200", 180, 8000, 2250, 75, "pcie5"),
        gpu("h200", 141, 4800, 989, 67, "pcie5"),
        gpu("h100", 80, 3350, 989, 67, "pcie5"),
        gpu("a100-80", 80, 2039, 312, 19.5),
        gpu("a100-40", 40, 1555, 312, 19.5),
        gpu("a10", 24, 600, 125, 31.2),
        gpu("l40s", 48, 864, 362, 91.6),
        gpu("l4", 24, 300, 121, 30.3),
        gpu("t4", 16, 320, 65, 8.1, "pcie3"),
        gpu("v100", 32, 900, 125, 15.7, "pcie3"),
        gpu("rtx6000-ada", 48, 960, 182, 91.1),
        gpu("a6000", 48, 768, 155, 38.7),
        gpu("rtx5090", 32, 1792, 209.5, 104.8, "pcie5"),
        gpu("rtx4090", 24, 1008, 165.2, 82.6),
        gpu("rtx3090", 24, 936, 71, 35.6),
    )
}
"""GPUs by the name that users type; rates without sparsity, half precision summed in float32."""
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090"}


def device_named(name: str | None, memory: int | None = None) -> Device:
    """None is this machine; `2xrtx4090` several GPUs; UsageError for an unknown name."""
    found = known_device(name)
    return found if memory is None else replace(found, memory=memory)


def known_device(name: str | None) -> Device:
    if name is None and torch.cuda.is_available():
        return this_gpu()
    if name is None or name == "cpu":
        return this_cpu()
    several = re.fullmatch(r"(\d+)x(.+)", name.lower())
    count, single = several.groups() if several else ("1", name.lower())
    single = ALIASES.get(single, single)
    if single not in DEVICES:
        known = ("cpu", *DEVICES)
        raise UsageError(
            f"there is no device {name!r} in the table; there are {', '.join(known)}, and several "
            f"as '2xrtx4090'.{did_you_mean(single, known)}"
        )
    device = DEVICES[single]
    return device if count == "1" else replace(device, name=name, memory=int(count) * device.memory)


def listed(name: str) -> str | None:
    """Return the table's name of a GPU that calls itself by another; None where it is not there.

    >>> listed("NVIDIA H100 80GB HBM3")
    'h100'
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    near = (n for n in DEVICES if n.split("-")[0].removeprefix("rtx") in plain)
    return next(near, None)


def this_gpu() -> Device:
    properties = torch.cuda.get_device_properties(0)
    base = DEVICES[listed(properties.name) or "l4"]
    free, total = torch.cuda.mem_get_info(0)
    del total
    return replace(base, name=properties.name, memory=free + CUDA_RUNTIME)


def this_machine() -> Device:
    return this_gpu() if torch.cuda.is_available() else this_cpu(rates=False)


def this_cpu(*, rates: bool = True) -> Device:
    """Rates are measured in about a second; memory is what is held and what is free."""
    half, single, bandwidth = cpu_rates() if rates else (1e11, 1e11, 1e10)
    memory = available_memory() + resident()
    return Device("cpu", "cpu", memory, bandwidth, half, single, bandwidth, measured=True)


def available_memory() -> int:
    """Return the bytes this process could still take: free memory, or less in a cgroup."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        import os

        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *cgroup_rooms()])


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Names of the files with the limit and the usage, in both versions of cgroups."""
FILE_CACHE = ("inactive_file", "active_file")
"""Lines of memory.stat: copies of files, which the kernel drops when memory is needed."""


def cgroup_rooms() -> list[int]:
    """Return the bytes that this process may still take in each cgroup that limits memory."""
    rooms: list[int] = []
    for folder in cgroup_folders():
        for limit, usage in ((folder / a, folder / b) for a, b in LIMITS):
            if limit.is_file() and usage.is_file() and (text := limit.read_text().strip()) != "max":
                used = int(usage.read_text()) - file_cache(folder / "memory.stat")
                rooms.append(max(0, int(text) - used))
    return rooms


def cgroup_folders() -> list[Path]:
    """Return the cgroups of this process and around it; a container sees its own on top."""
    tops = {"": CGROUPS, "memory": CGROUPS / "memory"}
    found = dict.fromkeys(tops.values())
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []:
        _, controller, path = line.split(":", 2)
        if controller in tops:
            own = Path(path.strip("/"))
            found |= dict.fromkeys(tops[controller] / part for part in (own, *own.parents))
    return list(found)


def file_cache(stat: Path) -> int:
    """Return the bytes of a cgroup's memory that are copies of files."""
    lines = stat.read_text().splitlines() if stat.is_file() else []
    counts = dict(line.split(maxsplit=1) for line in lines)
    return sum(int(counts.get(f"total_{name}", counts.get(name, 0))) for name in FILE_CACHE)


def cpu_rates() -> tuple[float, float, float]:
    """Measure bfloat16 and float32 operations and bytes a second; bfloat16: the better dtype."""
    single, half = (product_rate(dtype) for dtype in (torch.float32, torch.bfloat16))
    x = torch.empty(1 << 24)
    seconds = fastest(lambda: x.mul_(1.0))
    return max(half, single), single, 2 * x.nbytes / seconds


def product_rate(dtype: torch.dtype, width: int = 1024, rows: int = 512) -> float:
    a, b = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    return 2 * rows * width * width / fastest(lambda: a @ b)


def fastest(work: Callable[[], object], budget: float = 0.3) -> float:
    """Return the shortest time of some work in seconds, tried for `budget` seconds."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget:
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


DECIMAL = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS = DECIMAL | {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def bytes_from(text: str) -> int:
    """Return the bytes that `24GB`, `22.5GiB` or a plain number means; else UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in UNITS:
        raise UsageError(f"'memory' must be a size such as 24GB or 80GiB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])
