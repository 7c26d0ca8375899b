"""What `inlay plan` says of a run on several processes: memory, what they exchange, scaling."""

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
    from inlay.train.planning import Rows


class Processes:
    """A run's plan on several processes."""

    def __init__(self, config: RunConfig, options: LaunchOptions) -> None:
        """Divide the run.

        Raises:
            UsageError: it cannot be divided so.
        """
        from inlay.train.processes.division import divided
        from inlay.train.processes.world import World

        self.asked, self.options = config, options
        self.world = World(size=options.size, local_size=options.local)
        self.config, self.share = divided(config, self.world)
        """The run as one process takes part in it."""

    def planned(self, rows: Rows, device: Device) -> Plan:
        """Plan one process's step."""
        from functools import partial

        from inlay.memory.parallel import Division, links_of, pass_seconds, scaling, step_of
        from inlay.train.planning import planned_run
        from inlay.train.processes.division import groups, planned_division

        plan = partial(planned_run, self.config, rows)
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

    def part_of(self, rows: Rows) -> Rows:
        """Return as many of the rows as one process trains on."""
        counts = {name: getattr(rows, name) for name in ("count", "tokens", "trained_tokens")}
        return replace(rows, **{n: ceil(count / self.world.size) for n, count in counts.items()})

    def draw(self) -> None:
        """Write what each process holds, receives and waits for, and how more of them would do."""
        division, step = self.division, self.step
        shards = division.shards
        held = "whole in each" if shards == 1 else f"divided among {shards}"
        machines = "one machine" if division.nodes == 1 else f"{division.nodes} machines"
        show.heading(f"{division.size} processes on {machines}")
        show.facts(
            [
                ("frozen weights", held),
                ("a step", f"{division.passes} passes of {self.share.pass_rows} rows in each"),
                ("arithmetic", seconds(step.compute)),
                ("gradients", f"{show.size(step.gradient_bytes)}, {seconds(step.gradients)}"),
                ("blocks gathered", f"{show.size(step.gathered_bytes)}, {seconds(step.gathers)}"),
                ("a step takes", f"{seconds(step.seconds)}, {step.efficiency:.0%} arithmetic"),
            ]
        )
        show.heading("predicted, not measured: the same run on more of these devices")
        columns = ("devices", "machines", "divided by", "passes each", "a step", "arithmetic")
        show.table(columns, [cells(*pair) for pair in self.scaling])
        for sentence in self.assumptions():
            print(f"  {sentence}")

    def assumptions(self) -> list[str]:
        """Return what the prediction rests on."""
        beside = (
            "blocks are gathered beside the arithmetic, gradients after it"
            if self.links.overlaps
            else "nothing is gathered beside the arithmetic"
        )
        return [
            *self.links.said,
            "a transfer takes 20 µs to start for each doubling of those that take part",
            beside,
            f"a step has its {self.share.passes * self.world.size} passes, or one a device on more "
            "devices than that, which makes its batch larger; every device is equally fast",
        ]

    def as_record(self) -> dict[str, Any]:
        """Return the same for a machine."""
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
    """Return the table's cells for one number of devices."""
    numbers = (division.size, division.nodes, division.shards, division.passes)
    return [*map(str, numbers), seconds(step.seconds), f"{step.efficiency:.0%}"]
