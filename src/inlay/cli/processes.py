"""The plan of a run on several processes: memory, communication and scaling."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from inlay.cli import show
from inlay.cli.show import seconds
from inlay.run.config import RunConfig
from inlay.train.processes.launch import LaunchOptions

if TYPE_CHECKING:
    from inlay.memory.devices import Device
    from inlay.memory.parallel import Division, Step
    from inlay.memory.plan import Plan
    from inlay.train.planning import PlannedRows


class Processes:
    """A run's plan on several processes."""

    def __init__(self, config: RunConfig, options: LaunchOptions) -> None:
        """Raise UsageError where the run cannot be divided so."""
        from inlay.train.processes.division import divided
        from inlay.train.processes.world import World

        self.asked, self.options = config, options
        self.world = World(size=options.size, local_size=options.local)
        self.config, self.share = divided(config, self.world)
        """The run of one process."""

    def planned(self, rows: PlannedRows, device: Device) -> Plan:
        from functools import partial

        from inlay.memory.parallel import Division, links_of, pass_seconds, scaling, step_of
        from inlay.train.planning import planned_run
        from inlay.train.processes.division import groups, planned_division

        plan = partial(planned_run, rows)
        choices = groups(self.asked, self.world)
        found, shards = planned_division(plan, device, choices, self.world)
        local, nodes = self.options.local, self.options.nodes
        self.division = Division(local, nodes, shards, self.share.passes)
        self.links = links_of(device, local)
        seconds = pass_seconds(found, self.share.passes)
        self.step = step_of(self.division, found.trained, found.frozen, seconds, self.links)
        passes = self.share.passes * self.world.size
        self.scaling = list(scaling(self.division, found, seconds, self.links, passes))
        return found

    def part_of(self, rows: PlannedRows) -> PlannedRows:
        counts = {name: getattr(rows, name) for name in ("count", "tokens", "trained_tokens")}
        return replace(rows, **{n: ceil(count / self.world.size) for n, count in counts.items()})

    def draw(self) -> None:
        division, step = self.division, self.step
        shards = division.shards
        held = "all in each process" if shards == 1 else f"sharded over {shards} processes"
        machines = "one machine" if division.nodes == 1 else f"{division.nodes} machines"
        show.heading(f"{division.size} processes on {machines}")
        show.facts(
            [
                ("frozen weights", held),
                (
                    "per step",
                    f"{division.passes} passes of {self.share.pass_rows} rows in each process",
                ),
                ("computation", seconds(step.compute)),
                ("gradients", f"{show.size(step.gradient_bytes)}, {seconds(step.gradients)}"),
                ("weight gathers", f"{show.size(step.gathered_bytes)}, {seconds(step.gathers)}"),
                ("time per step", f"{seconds(step.seconds)}, {step.efficiency:.0%} computation"),
            ]
        )
        show.heading("predicted, not measured: the same run on more of these devices")
        columns = ("devices", "machines", "shards", "passes each", "per step", "computation")
        show.table(columns, [cells(*pair) for pair in self.scaling])
        for sentence in self.assumptions():
            print(f"  {sentence}")

    def assumptions(self) -> list[str]:
        overlap = (
            "weight gathers overlap with computation, gradient reduction does not"
            if self.links.overlaps
            else "communication does not overlap with computation"
        )
        return [
            *self.links.said,
            "the latency of a transfer is 20 µs per doubling of the number of devices",
            overlap,
            f"a step has {self.share.passes * self.world.size} passes in all; with more devices, "
            "one per device, so that the batch grows; all devices are equally fast",
        ]

    def as_record(self) -> dict[str, Any]:
        return {
            "processes": asdict(self.division),
            "step": asdict(self.step),
            "scaling": [
                {**asdict(division), "devices": division.size, **asdict(step)}
                for division, step in self.scaling
            ],
            "assumptions": self.assumptions(),
        }


def cells(division: Division, step: Step) -> list[str]:
    numbers = (division.size, division.nodes, division.shards, division.passes)
    return [*map(str, numbers), seconds(step.seconds), f"{step.efficiency:.0%}"]
