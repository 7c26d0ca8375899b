"""The stages of a run, from its rows to its report, and what a task decides in them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Generic, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.checkpoint.adapter import keep_base_description, save_adapter
from inlay.errors import ModelError
from inlay.evaluate.record import ComparisonRecord, Run, Step
from inlay.evaluate.report import write_report
from inlay.memory.devices import this_machine
from inlay.memory.plan import Plan
from inlay.memory.policy import applied
from inlay.memory.skeleton import config_of
from inlay.methods.base import Method
from inlay.model.adapters.report import report
from inlay.model.load.causal import check_writes
from inlay.model.load.folder import located
from inlay.model.load.libraries import quiet_transformers
from inlay.model.stream.shard import let_go, resident_bytes, shard
from inlay.run.config import RunConfig
from inlay.train.adapted_model import load_adapted
from inlay.train.arguments import check_optimizer
from inlay.train.guard import Guard, check_changed, fingerprints
from inlay.train.output import checkpoints, provenance
from inlay.train.output.failures import naming_the_model, stopping
from inlay.train.output.folder import RunFolder, check_same_inputs
from inlay.train.output.recorder import Recorder, read_metrics
from inlay.train.output.run_json import begun_record, ended_record, planned_record
from inlay.train.output.saving import saving
from inlay.train.planning import largest_batch, planned_run
from inlay.train.processes.division import (
    FollowedFolder,
    FollowingRecorder,
    groups,
    mesh_of,
    planned_division,
)
from inlay.train.processes.share import Share
from inlay.train.proposal import check_fits
from inlay.train.recipe import LearningRate, learning_rate
from inlay.train.rows import RunRows, check_image_keys, rows_of_run, sample
from inlay.train.task_run import Row, Setup, TaskRun, Tokens
from inlay.train.trainer import AdapterLoop
from inlay.train.trl import left_as_it_was

TOLERATED = 0.05
"""How far the probed memory may be from the planned one without a word."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind; model and tokenizer are None when it had ended before."""

    folder: RunFolder
    run: dict[str, Any]
    """The contents of run.json; `comparison` holds base against tuned, or None."""
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    leads: bool = True
    """Whether this is the process that wrote the folder; the others of a run have no comparison."""


class Stages(Generic[Row]):
    """One run from its rows to its report; its task says what rows, loop and metrics are."""

    def __init__(
        self, task: TaskRun[Any, Row], method: Method, folder: RunFolder, share: Share
    ) -> None:
        self.task, self.method, self.share, self.world = task, method, share, share.world
        self.started = datetime.now(UTC)
        self.shards = groups(task.asked, self.world)[0]
        """The processes that divide the frozen weights; 1 where each holds them all."""
        self.folder = folder if self.world.leads else FollowedFolder(folder.path)

    @property
    def config(self) -> RunConfig:
        """The run as divided among the processes, and as its rows take it."""
        return self.task.config

    def result(self) -> TrainResult:
        """Go through the stages of the run, the cheap checks first."""
        self.stage("reading the data")
        tokens, rows = self.tokens()
        planned, self.shards = self.world.from_leader(lambda: (self.planned(tokens), self.shards))
        self.stage("loading the model")
        model, tokenizer = self.loaded()
        self.task.check_model(model)
        record = self.begin(model, rows)
        self.task.prepare(model, tokens, record)
        record["memory"] = planned_record(planned)
        self.compare_trained(model, planned)
        check_optimizer(self.config.optimizer, model.device.type)
        setup = self.setup(model, tokenizer, tokens, record)
        with (
            naming_the_model(self.config.model),
            stopping(self.folder, record),
            self.world.together(),
            left_as_it_was(model),
            self.keeping(model, planned),
        ):
            trainer = self.trainer(setup, planned)
            with self.task.around(setup):
                self.fit(trainer)
        self.save(model, trainer)
        with naming_the_model(self.config.model):
            record["comparison"] = self.compared(model, tokens)
        let_go(model)
        self.finish(model, trainer, record)
        return TrainResult(self.folder, record, model, tokenizer, self.world.leads)

    def stage(self, message: str) -> None:
        self.task.stage(message)

    def note(self, message: str) -> None:
        self.task.note(message)

    # Before the model

    def tokens(self) -> tuple[Tokens[Row], RunRows]:
        """Read the rows and encode them; raise for whatever would make training on them vain."""
        task, config = self.task, self.config
        if not task.task.has_head:
            check_writes(config_of(config.model, config.revision)[0])
        rows = rows_of_run(config)
        if not rows.train.pictured:
            check_image_keys(config)
        for note in rows.train.notes:
            self.note(note)
        with quiet_transformers():
            task.read_by(located(config.model, config.revision), rows.train.pictured)
        task.learn(rows)
        encoded = task.encode(rows.train)
        task.check(rows.train, encoded)
        validation = sample(rows.validation, config.eval_rows)
        test = sample(rows.test, config.eval_rows)
        found = Tokens(
            train=encoded,
            validation=task.encode(validation) if validation else [],
            test=task.encode(test) if test else [],
            train_rows=rows.train,
            validation_rows=validation,
            test_rows=test,
        )
        if config.evaluate and found.test:
            task.check_held_out(test)
        return found, rows

    def planned(self, tokens: Tokens[Row]) -> Plan | None:
        """Plan the largest batch's step; None if it cannot be planned; raise if it does not fit."""
        device = this_machine()
        try:
            plan = partial(planned_run, self.task.to_plan(tokens.train, device))
            choices = groups(self.task.asked, self.world)
            found, self.shards = planned_division(plan, device, choices, self.world)
        except ModelError as error:
            self.note(f"memory is not planned: {error}")
            return None
        check_fits(found, self.config)
        best = found.best
        self.note(
            f"memory planned: {best.total / 1e9:.2f} GB of {found.limit / 1e9:.2f} GB, "
            f"activations {best.policy}"
        )
        return found

    # The model and its adapter

    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the base, put the adapter on it and keep this process's part of the weights."""
        mesh = mesh_of(self.world, self.shards)
        if mesh is None:
            return load_adapted(self.config, self.method, self.task.head)
        with self.world.in_turn():
            model, tokenizer = load_adapted(self.config, self.method, self.task.head, "cpu")
            keep_base_description(model)
            shard(model, mesh)
        return model, tokenizer

    def begin(self, model: PreTrainedModel, rows: RunRows) -> dict[str, Any]:
        """Write run.json before anything is trained; return its contents."""
        found = report(model)
        base = provenance.base_files(self.config.model, self.config.revision)
        inputs = {
            **provenance.describe_base(base),
            "data_sha256": rows.sha256,
            **self.task.inputs(),
        }
        begun = self.folder.record() if self.folder.state == "interrupted" else None
        if begun is not None:
            check_same_inputs(begun, inputs, self.folder)
        rate = self.rate(model)
        record = begun_record(
            self.task.asked,
            self.method,
            found,
            rate,
            rows={part: len(getattr(rows, part)) for part in ("train", "validation", "test")},
            started=(begun or {}).get("started") or self.started.isoformat(timespec="seconds"),
            device=model.device,
            parallel=self.division(model),
            inputs=inputs,
        )
        self.folder.write_record(record)
        self.note(str(found))
        self.note(f"learning rate {rate.value:.3g}: {rate.reason}")
        return record

    def division(self, model: PreTrainedModel) -> dict[str, int]:
        return {
            "processes": self.world.size,
            "weights_divided_by": self.shards,
            "frozen_bytes": resident_bytes(model),
        }

    def rate(self, model: PreTrainedModel) -> LearningRate:
        shape: Any = model.config.get_text_config()
        factor = type(self.method).learning_rate_factor
        return learning_rate(self.config, int(shape.hidden_size), str(shape.model_type), factor)

    # Training

    def setup(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens[Row],
        record: dict[str, Any],
    ) -> Setup[Row]:
        """Return what the trainer is made of; checkpoints have a folder from now on."""
        with saving("the run", self.folder.path):
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        recorder = Recorder if self.world.leads else FollowingRecorder
        watched = {
            "recorder": recorder(self.folder.metrics, self.config.log_every, self.task.tell),
            "guard": Guard(),
            "share": self.share,
            "warmup": self.config.warmup,
            "keep_checkpoints": self.config.keep_checkpoints,
        }
        rate, folder = record["learning_rate"]["value"], self.folder.checkpoints
        return Setup(model, tokenizer, tokens, rate, folder, record, watched)

    def trainer(self, setup: Setup[Row], planned: Plan | None) -> AdapterLoop:
        """Return the trainer, after a try of the largest batch."""
        self.task.keep_features(setup)
        with self.task.reading():
            trainer = self.task.trainer(setup)
            self.try_largest(trainer, planned)
        return trainer

    def keeping(self, model: PreTrainedModel, planned: Plan | None) -> AbstractContextManager[Any]:
        """Make the model keep the activations that were planned; without a plan, all or few."""
        if planned is not None:
            return applied(model, planned.best.policy)
        if self.config.activations != "auto":
            return applied(model, self.config.activations)
        on_gpu = model.device.type == "cuda" and model.supports_gradient_checkpointing
        return applied(model, "layer-inputs" if on_gpu else "keep-all")

    def compare_trained(self, model: PreTrainedModel, planned: Plan | None) -> None:
        """Report when the planned model trains other values than the run does."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if planned is not None and planned.trained != trained:
            self.note(
                f"memory is planned for {planned.trained:,} values that train, and the model has "
                f"{trained:,}: the run may hold more than was planned"
            )

    def try_largest(self, trainer: AdapterLoop, planned: Plan | None) -> None:
        """Run the largest batch once, without a step; tell when its memory was planned wrongly."""
        if planned is None:
            return
        measured = trainer.peak_of(largest_batch(self.config, trainer.lengths, self.task.arrange))
        expected = planned.best.passes
        if measured is not None and abs(measured / expected - 1) > TOLERATED:
            self.note(
                f"the largest batch used {measured / 1e9:.2f} GB, planned: "
                f"{expected / 1e9:.2f} GB ({measured / expected - 1:+.0%})"
            )

    def fit(self, trainer: AdapterLoop) -> None:
        """Train from the start, or from the last complete checkpoint."""
        before = fingerprints(trainer.adapted, trainer.adapter)
        last = self.world.from_leader(lambda: checkpoints.latest(self.folder.checkpoints))
        if last is None:
            self.stage("training")
            trainer.train()
        elif checkpoints.step_of(last) < trainer.total_steps:
            self.stage(f"training on from {last.name}")
            trainer.train(resume_from_checkpoint=str(last))
        else:
            trainer.restore(last)
        check_changed(before, trainer.adapted, trainer.adapter)
        trainer.check_agreement()

    # Afterwards

    def compared(self, model: PreTrainedModel, tokens: Tokens[Row]) -> ComparisonRecord | None:
        """Return base against tuned on held-out rows, if there are any and the run says so.

        Where weights are divided every process takes part, else the first one alone.
        """
        if self.shards == 1 and not self.world.leads:
            return None
        if not self.config.evaluate or not tokens.test:
            return None
        self.stage("comparing base and tuned on held-out rows")
        task = self.task
        if task.images is not None:
            task.images.prepare_again(model)
        return task.compare(model, tokens.test_rows, tokens.test, task.limits())

    def save(self, model: PreTrainedModel, trainer: AdapterLoop) -> None:
        model.eval()
        if not self.world.leads:
            return
        with saving("the adapter", self.folder.adapter):
            save_adapter(model, self.folder.adapter, trainer.adapter)

    def finish(self, model: PreTrainedModel, trainer: AdapterLoop, record: dict[str, Any]) -> None:
        """Write the report, and run.json with all that is known at the end."""
        if not self.world.leads:
            return
        record |= ended_record(model, trainer, self.folder)
        metrics = cast("list[Step]", read_metrics(self.folder.metrics))
        write_report(
            self.folder.report,
            cast("Run", record),
            metrics,
            record["comparison"],
            titles=self.task.task.titles,
        )
        self.folder.write_record(record)
        self.stage(f"done: {self.folder.path}")
