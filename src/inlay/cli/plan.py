"""`inlay plan`: memory and time of a run before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from inlay.cli import show
from inlay.cli.options import Parser, checked
from inlay.cli.processes import Processes
from inlay.cli.show import seconds
from inlay.cli.train import add_run, config_from
from inlay.run.config import RunConfig
from inlay.run.flags import flags_of
from inlay.tasks import TASKS
from inlay.train.processes.launch import LaunchOptions, check_options

if TYPE_CHECKING:
    from inlay.memory.devices import Device
    from inlay.memory.plan import Option, Plan
    from inlay.train.planning import PlannedRows

ABOUT = (
    "Compute from the model's configuration alone what a run needs: memory by purpose, time,\n"
    "which activations are kept, and what fits. Without --method, `plan` proposes a run.\n"
    "It takes a run file or the flags of `train`; the model may be a config.json without weights."
)
USAGE = """inlay plan --model M [--data D] [--memory 24GB] [--device D] [--gpus N --nodes M] [flags]
       inlay plan RUN.yaml [flags]"""
EXAMPLES = """examples:
  inlay plan --model pocket --data reports --method lora
  inlay plan --model Qwen/Qwen3-0.6B --data my.csv --memory 8GB
  inlay plan --model llama-70b/config.json --method lora --storage nf4 --max-length 4096 \\
             --batch-size 1 --device h100
  inlay plan run.yaml --device h100 --gpus 8 --nodes 4"""


class PlanOptions(BaseModel):
    """The flags of `inlay plan` besides the keys of a run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    device: str | None = Field(
        None, description="cpu, or a GPU such as h100, rtx4090, 2xrtx4090; default: this machine's"
    )
    memory: str | None = Field(
        None, description="memory to plan for, such as 24GB; default: the free memory of the device"
    )


def parser(argv: Sequence[str]) -> Parser:
    found = Parser("plan", USAGE, ABOUT, EXAMPLES)
    found.add_flags("where", flags_of(PlanOptions))
    found.add_flags("several processes", flags_of(LaunchOptions))
    add_run(found, argv)
    found.add_switches(json="write JSON")
    return found


def run(given: dict[str, Any]) -> int:
    as_json = given.pop("json", False)
    own = {key: given.pop(key) for key in ("device", "memory") if key in given}
    options = checked(PlanOptions, own)
    launch = {key: given.pop(key) for key in LaunchOptions.model_fields if key in given}
    has_data = "data" in given or "run_file" in given
    config = config_from({"output": "unused", **({} if has_data else {"data": "reports"}), **given})
    told = {"method", "run_file"} & given.keys() or config.hyperparameters or launch
    many = divided(config, checked(LaunchOptions, launch)) if launch else None

    from inlay.memory.devices import bytes_from, device_named
    from inlay.train import planning, proposal
    from inlay.train.planning import rows_to_plan
    from inlay.train.run import quiet_libraries

    memory = None if options.memory is None else bytes_from(options.memory)
    with quiet_libraries():
        device = device_named(options.device, memory)
        read = rows_to_plan(config, device, has_data)
        if not told:
            storages = (config.storage,) if "storage" in given else proposal.STORAGES
            found = proposal.proposal(config, read, device, storages)
            config, plan, why = found.config, found.plan, found.reasons
        elif many is not None:
            config = many.config
            plan, why = many.planned(read(config), device), ()
        else:
            plan, why = planning.planned_run(read(config), device), ()
        rows = read(config) if many is None else many.part_of(read(config))
    if as_json:
        show.as_json(as_record(config, rows, plan, why) | (many.as_record() if many else {}))
        return 0
    draw(config, rows, plan, why)
    if many is not None:
        many.draw()
    return 0


def divided(config: RunConfig, options: LaunchOptions) -> Processes:
    check_options(options)
    return Processes(config, options)


def draw(config: RunConfig, rows: PlannedRows, plan: Plan, why: Sequence[str]) -> None:
    batch, length = rows.batch["input_ids"].shape
    show.heading(f"{config.method} on {config.model}, weights in {held(config)}")
    show.facts(
        [
            ("trains", f"{plan.trained:,} parameters"),
            ("largest batch", f"{batch} x {length} tokens" + " (assumed)" * rows.assumed),
            ("device", f"{plan.device.name}, {show.size(plan.limit)} available"),
        ]
    )
    if why:
        show.heading("proposed")
        for reason in why:
            print(f"  {reason}")
    show.heading("memory and time by activation policy")
    columns = ("activations", "peak", "kept for backward", "per step", "fits")
    show.table(columns, [cells(option, plan) for option in plan.options])
    show.heading(f"peak memory with {plan.best.policy}")
    show.table(("use", "memory"), [[n, show.size(b)] for n, b in plan.best.bytes.items() if b])
    for sentence in remarks(config, rows, plan):
        print(f"  {sentence}")


def held(config: RunConfig) -> str:
    words = [config.storage]
    if config.head_storage != "dense":
        words.append(f"its output head in {config.head_storage}")
    if config.embedding_storage == "host":
        words.append("its embedding on the host")
    return ", ".join(words)


def cells(option: Option, plan: Plan) -> list[str]:
    fits = "yes" if option.total <= plan.limit else "no"
    sizes = (show.size(option.total), show.size(option.kept))
    return [option.policy, *sizes, seconds(option.seconds), fits]


def remarks(config: RunConfig, rows: PlannedRows, plan: Plan) -> Iterator[str]:
    from inlay.memory.skeleton import config_of
    from inlay.model.load.vision import sees_images
    from inlay.train.planning import run_seconds
    from inlay.train.proposal import remedies

    best, device = plan.best, plan.device
    if plan.chosen is None:
        yield f"nothing fits: {remedies(config)}"
    if rows.count:
        long = show.duration(run_seconds(rows, best.seconds))
        yield f"the whole run takes {'at most' if rows.assumed else 'about'} {long}"
    if rows.assumed:
        every = "" if TASKS[config.task].has_head else ", every token trained"
        yield f"no rows were read: each row is assumed to fill max_length{every}"
        if sees_images(config_of(config.model, config.revision)[0]):
            yield "images are not counted: there were no rows to read"
    if device.measured:
        yield "times are computed from speeds measured on this machine just now"
    else:
        yield "times are estimates from 75% of the data sheet's speeds; nothing was measured"
        if config.stream == "off":
            yield (
                f"with the frozen weights streamed from the host: "
                f"{show.size(best.streamed_total)}, {seconds(best.streamed_seconds)} per step"
            )
    if best.host:
        yield f"host memory: {show.size(best.host)}"


def as_record(
    config: RunConfig, rows: PlannedRows, plan: Plan, why: Sequence[str]
) -> dict[str, Any]:
    from inlay.train.planning import run_seconds

    batch, length = rows.batch["input_ids"].shape
    return {
        "model": config.model,
        "method": config.method,
        "hyperparameters": config.hyperparameters,
        "storage": config.storage,
        "head_storage": config.head_storage,
        "embedding_storage": config.embedding_storage,
        "stream": config.stream,
        "batch_size": config.batch_size,
        "gradient_accumulation": config.gradient_accumulation,
        "largest_batch": {"rows": batch, "length": length, "assumed": rows.assumed},
        "trained_parameters": plan.trained,
        "device": described(plan.device),
        "limit": plan.limit,
        "chosen": plan.chosen.policy if plan.chosen else None,
        "run_seconds": run_seconds(rows, plan.best.seconds) if rows.count else None,
        "options": [asdict(option) for option in plan.options],
        "reasons": list(why),
    }


def described(device: Device) -> dict[str, Any]:
    rates = "measured" if device.measured else "data sheet"
    return {"name": device.name, "kind": device.kind, "memory": device.memory, "rates": rates}
