"""A whole run: rows, model, adapter, training, comparison with the base, records."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from datasets import disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from inlay.checkpoint.adapter import save_adapter
from inlay.data.rows import Rows
from inlay.data.tokens import Encoded, summarise
from inlay.errors import DataError, ModelError, TrainingError, UsageError
from inlay.evaluate.losses import losses
from inlay.evaluate.record import ComparisonRecord, Run, Step
from inlay.evaluate.report import write_report
from inlay.evaluate.run import compare
from inlay.memory.devices import this_machine
from inlay.memory.plan import Plan
from inlay.memory.policy import applied
from inlay.methods.base import Method
from inlay.methods.catalog import build_method
from inlay.model.attach import attach
from inlay.model.eight_bits import ACCEPTED, compute_in_8_bits, gate
from inlay.model.load import load, located, quiet_transformers, read_tokenizer
from inlay.model.packing import mixes_rows
from inlay.model.report import Report, report
from inlay.model.shapes import length_multiple
from inlay.model.trunk import Trunk, trunk_of
from inlay.train import checkpoints, provenance
from inlay.train.arguments import arguments, check_optimizer
from inlay.train.collate import Concatenate
from inlay.train.config import RunConfig
from inlay.train.events import Event, OnEvent
from inlay.train.files import saving, size_of
from inlay.train.folder import RunFolder, check_same_inputs, open_folder
from inlay.train.guard import Guard, check_changed, fingerprints
from inlay.train.planning import (
    assumed_rows,
    check_fits,
    largest_batch,
    padding_multiple,
    planned_run,
    rows_to_plan,
)
from inlay.train.recipe import LearningRate, learning_rate
from inlay.train.recorder import Recorder, read_metrics
from inlay.train.rows import RunRows, encode_rows, rows_of_run, sample
from inlay.train.trainer import AdapterTrainer, HeldOut, left_as_it_was
from inlay.train.trunk_cache import TrunkCache, cached_trunk

LINES_NAMED = 5
GATE_ROWS = 64
"""Rows that the loss in 8 bits is measured on."""
TRUNK = "trunk.tmp"
"""The file that a kept trunk takes if it does not fit in memory; what a kill leaves is removed."""
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


@dataclass(frozen=True)
class Tokens:
    """A run's rows as tokens; the held-out ones cut down to what is measured."""

    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]
    test_rows: Rows


def train(config: RunConfig, *, on_event: OnEvent | None = None) -> TrainResult:
    """Train an adapter as a run says, measure it, and leave everything in the output folder.

    Data and output are checked before the model is loaded. A run that was killed goes on with
    `resume` from its last complete checkpoint and ends in the same adapter.

    Args:
        config: the run, as `load_config` returns it.
        on_event: told of every stage, step, held-out loss and checkpoint.

    Raises:
        InlayError: anything that is the user's to mend, in a sentence.
    """
    tell = on_event or (lambda event: None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    method = build_method(config.method, config.hyperparameters)
    folder, state = open_folder(config)
    if state == "finished":
        tell(Event("note", f"the run in {folder.path} has ended already; nothing is left to do"))
        return TrainResult(folder, folder.record(), None, None)
    with quiet_libraries():
        return Running(config, method, folder, tell).result()


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Keep progress bars and chatter of the libraries off the terminal."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


class Running:
    """One run from its rows to its report."""

    def __init__(self, config: RunConfig, method: Method, folder: RunFolder, tell: OnEvent):
        self.config, self.method, self.folder, self.tell = config, method, folder, tell
        self.started = datetime.now(UTC)

    def result(self) -> TrainResult:
        """Go through the stages of the run, the cheap checks first."""
        self.stage("reading the data")
        tokens, rows = self.tokens()
        planned = self.planned(tokens)
        self.stage("loading the model")
        model, tokenizer = self.loaded()
        record = self.begin(model, rows)
        if self.config.eight_bits:
            record["eight_bits"] = self.in_eight_bits(model, tokens)
        record["memory"] = planned_record(planned)
        with self.stopping(record), left_as_it_was(model), self.keeping(model, planned):
            trainer = self.trainer(model, tokenizer, tokens, record)
            self.try_largest(trainer, planned)
            with self.trunk(model, tokens):
                self.fit(trainer)
        if self.config.eight_bits:
            compute_in_8_bits(model, on=False)
        self.save(model, trainer)
        record["comparison"] = self.compared(model, tokenizer, tokens)
        self.finish(model, trainer, record)
        return TrainResult(self.folder, record, model, tokenizer)

    def stage(self, message: str) -> None:
        """Tell that a part of the run begins."""
        self.tell(Event("stage", message))

    def note(self, message: str) -> None:
        """Tell something worth knowing."""
        self.tell(Event("note", message))

    # Before the model

    def tokens(self) -> tuple[Tokens, RunRows]:
        """Read the rows and encode them; raise for whatever would make training on them vain."""
        rows = rows_of_run(self.config)
        source = located(self.config.model, self.config.revision)
        with quiet_transformers():
            tokenizer = read_tokenizer(source, trust_remote_code=False)
        longest = self.config.max_length
        encoded = encode_rows(rows.train, tokenizer, longest)
        self.check_rows(rows.train, encoded)
        validation = sample(rows.validation, self.config.eval_rows)
        test = sample(rows.test, self.config.eval_rows)
        return Tokens(
            train=encoded,
            validation=encode_rows(validation, tokenizer, longest) if validation else [],
            test=encode_rows(test, tokenizer, longest) if test else [],
            test_rows=test,
        ), rows

    def check_rows(self, rows: Rows, encoded: list[Encoded]) -> None:
        """Raise when no row trains the end token; tell of rows that were cut or left out."""
        summary = summarise(encoded, rows)
        if summary.ends_trained == 0:
            raise DataError(
                f"{rows.source}: no row trains the token at which generation stops, so the tuned "
                f"model would never stop: {len(summary.truncated)} of {summary.rows} rows are cut "
                f"at max_length {self.config.max_length}; the longest has {summary.lengths.max} "
                "tokens"
            )
        for lines, what in (
            (summary.truncated, f"cut at max_length {self.config.max_length}"),
            (summary.skipped, "left out: a field is empty"),
            (summary.unended, "without a trained end token"),
            (summary.unlike_prompt, "with a prompt that is tokenised otherwise on its own"),
        ):
            if lines:
                shown = ", ".join(map(str, lines[:LINES_NAMED]))
                more = ", ..." if len(lines) > LINES_NAMED else ""
                self.note(f"{len(lines)} rows {what} (lines {shown}{more})")

    def planned(self, tokens: Tokens) -> Plan | None:
        """Plan the largest batch's step; raise when it cannot fit. None when it cannot be planned.

        Raises:
            TrainingError: no activation policy that the run allows fits.
        """
        device = this_machine()
        bins = self.config.packing == "bfd"
        multiple = padding_multiple(self.config, device)
        rows = (
            assumed_rows(self.config) if bins else rows_to_plan(self.config, tokens.train, multiple)
        )
        try:
            found = planned_run(self.config, rows, device)
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
        """Load the base and put the adapter on it."""
        config = self.config
        model, tokenizer = load(
            config.model,
            config.storage,
            double_quant=config.double_quant,
            dtype=config.dtype,
            stream=config.stream,
            revision=config.revision,
        )
        attach(
            model,
            self.method,
            targets=config.targets,
            exclude=config.exclude,
            layers=config.layers,
            modules_to_save=config.modules_to_save,
            seed=config.seed,
        )
        return model, tokenizer

    def begin(self, model: PreTrainedModel, rows: RunRows) -> dict[str, Any]:
        """Write run.json before anything is trained; return its contents."""
        found = report(model)
        base = provenance.base_files(self.config.model, self.config.revision)
        inputs = {**provenance.describe_base(base), "data_sha256": rows.sha256}
        begun = self.folder.record() if self.folder.state == "interrupted" else None
        if begun is not None:
            check_same_inputs(begun, inputs, self.folder)
        rate = self.rate(model)
        record: dict[str, Any] = {
            "model": self.config.model,
            "method": self.config.method,
            "data": self.config.data,
            "seed": self.config.seed,
            "finished": False,
            "started": (begun or {}).get("started") or self.started.isoformat(timespec="seconds"),
            "config": self.config.model_dump(),
            "hyperparameters": asdict(self.method),
            "learning_rate": asdict(rate),
            "rows": {part: len(getattr(rows, part)) for part in ("train", "validation", "test")},
            "trainable": trainable(found),
            "targets": list(found.adapters[0].matched),
            "versions": provenance.versions(),
            "machine": provenance.machine(model.device),
            **inputs,
        }
        self.folder.write_record(record)
        self.note(str(found))
        self.note(f"learning rate {rate.value:.3g}: {rate.reason}")
        return record

    def rate(self, model: PreTrainedModel) -> LearningRate:
        """Return the run's learning rate."""
        shape: Any = model.config.get_text_config()
        factor = type(self.method).learning_rate_factor
        return learning_rate(self.config, int(shape.hidden_size), str(shape.model_type), factor)

    # Training

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Tokens,
        record: dict[str, Any],
    ) -> AdapterTrainer:
        """Return the trainer, nothing trained yet."""
        config = self.config
        check_optimizer(config.optimizer, model.device.type)
        collate = self.collate(model, tokens)
        with saving("the run", self.folder.path):
            self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        return AdapterTrainer(
            model,
            tokenizer,
            tokens.train,
            arguments(config, model, self.folder.checkpoints, record["learning_rate"]["value"]),
            recorder=Recorder(self.folder.metrics, config.log_every, self.tell),
            guard=Guard(),
            collate=collate,
            held_out=held_out(model, tokens.validation, config.batch_size),
            warmup=config.warmup,
            keep_checkpoints=config.keep_checkpoints,
        )

    def collate(self, model: PreTrainedModel, tokens: Tokens) -> Concatenate | None:
        """Return what joins a batch's rows without padding; None leaves the batch to TRL.

        Raises:
            UsageError: the run asks for packing, and rows would see each other.
        """
        packing = self.config.packing
        mixed = mixes_rows(model, [row.input_ids for row in tokens.train]) if packing else None
        if mixed is not None and packing != "auto":
            raise UsageError(f"'packing' would mix rows: {mixed}; leave packing at auto")
        if mixed is not None:
            self.note(f"batches are padded, not packed: {mixed}")
        if packing in (False, "bfd") or mixed is not None:
            return None
        return Concatenate(length_multiple(model))

    def trunk(self, model: PreTrainedModel, tokens: Tokens) -> AbstractContextManager[None]:
        """Return the context in which the blocks below the lowest adapted one are read, not run.

        Raises:
            UsageError: the run asks for that, and this model cannot have it.
        """
        wanted = self.config.cache_trunk
        if not wanted or (wanted == "auto" and not self.trunk_cache_pays(model, len(tokens.train))):
            return nullcontext()
        self.stage("running the frozen blocks once over every row")
        rows = [*tokens.train, *tokens.validation]
        cache = cached_trunk(model, rows, len(tokens.train), self.folder.checkpoints / TRUNK)
        if isinstance(cache, TrunkCache):
            self.note(str(cache))
            return cache.used()
        if wanted == "auto":
            self.note(f"the frozen blocks run in every epoch: {cache}")
            return nullcontext()
        raise UsageError(f"'cache_trunk' cannot be used: {cache}; leave it at auto")

    def trunk_cache_pays(self, model: PreTrainedModel, rows: int) -> bool:
        """Say whether at least the lower half of the blocks is frozen and rows come again."""
        config, trunk = self.config, trunk_of(model)
        steps = config.max_steps or math.inf
        passes = steps * config.batch_size * config.gradient_accumulation / rows
        return (
            isinstance(trunk, Trunk)
            and 2 * trunk.depth >= len(trunk.blocks)
            and min(passes, config.epochs) > 1
        )

    def keeping(self, model: PreTrainedModel, planned: Plan | None) -> AbstractContextManager[Any]:
        """Make the model keep the activations that were planned; without a plan, all or few."""
        if planned is not None:
            return applied(model, planned.best.policy)
        if self.config.activations != "auto":
            return applied(model, self.config.activations)
        on_gpu = model.device.type == "cuda" and model.supports_gradient_checkpointing
        return applied(model, "layer-inputs" if on_gpu else "keep-all")

    def try_largest(self, trainer: AdapterTrainer, planned: Plan | None) -> None:
        """Run the largest batch once, without a step; tell when its memory was planned wrongly."""
        if planned is None:
            return
        measured = trainer.peak_of(largest_batch(self.config, trainer.lengths))
        expected = planned.best.passes
        if measured is not None and abs(measured / expected - 1) > TOLERATED:
            self.note(
                f"the largest batch took {measured / 1e9:.2f} GB, planned were "
                f"{expected / 1e9:.2f} GB ({measured / expected - 1:+.0%})"
            )

    def fit(self, trainer: AdapterTrainer) -> None:
        """Train from the start, or from the last complete checkpoint."""
        before = fingerprints(trainer.adapted, trainer.adapter)
        last = checkpoints.latest(self.folder.checkpoints)
        if last is None:
            self.stage("training")
            trainer.train()
        elif step_of(last) < trainer.total_steps:
            self.stage(f"training on from {last.name}")
            trainer.train(resume_from_checkpoint=str(last))
        else:
            trainer.restore(last)
        check_changed(before, trainer.adapted, trainer.adapter)

    @contextmanager
    def stopping(self, record: dict[str, Any]) -> Generator[None]:
        """Write into run.json why a run stopped, and say where the last good state lies."""
        try:
            yield
        except TrainingError as error:
            last = checkpoints.latest(self.folder.checkpoints)
            where = f"; the last good state is {last}" if last else ""
            self.folder.write_record({**record, "stopped": str(error)})
            raise TrainingError(f"{error}{where}") from None

    def in_eight_bits(self, model: PreTrainedModel, tokens: Tokens) -> dict[str, float]:
        """Turn products in 8 bits on, if they leave the loss on this run's rows as it is.

        Raises:
            TrainingError: the loss differs by more than is accepted.
        """
        rows = (tokens.validation or tokens.train)[:GATE_ROWS]
        measure = held_out(model, rows, self.config.batch_size)
        assert measure is not None
        measured = gate(model, measure)
        found = (
            f"{measured.loss:.4f} as stored, {measured.loss_in_8_bits:.4f} in 8 bits, "
            f"a difference of {measured.difference:.2%}"
        )
        if not measured.passed:
            raise TrainingError(
                f"products in 8 bits change the loss on {len(rows)} of this run's rows: {found}; "
                f"at most {ACCEPTED:.1%} is accepted. Leave eight_bits off"
            )
        self.note(f"products in 8 bits: the loss on {len(rows)} rows is {found}")
        return {"loss": measured.loss, "loss_in_8_bits": measured.loss_in_8_bits}

    # Afterwards

    def save(self, model: PreTrainedModel, trainer: AdapterTrainer) -> None:
        """Write the trained adapter."""
        with saving("the adapter", self.folder.adapter):
            save_adapter(model, self.folder.adapter, trainer.adapter)
        model.eval()

    def compared(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tokens
    ) -> ComparisonRecord | None:
        """Return base against tuned on held-out rows, if there are any and the run says so."""
        if not self.config.evaluate or not tokens.test:
            return None
        self.stage("comparing base and tuned on held-out rows")
        return compare(
            model,
            tokenizer,
            tokens.test_rows,
            tokens.test,
            generate_rows=self.config.generate_rows,
            max_new_tokens=self.config.generate_tokens,
            batch_size=max(self.config.batch_size, 8),
        ).to_dict()

    def finish(
        self, model: PreTrainedModel, trainer: AdapterTrainer, record: dict[str, Any]
    ) -> None:
        """Write the report, and run.json with all that is known at the end."""
        record |= {
            "finished": True,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": trainer.recorder.seconds,
            "steps": trainer.total_steps,
            "tokens": trainer.recorder.tokens,
            "peak_memory_bytes": provenance.most_memory(model),
            "adapter_bytes": size_of([self.folder.adapter / "adapter_model.safetensors"]),
        }
        metrics = cast("list[Step]", read_metrics(self.folder.metrics))
        write_report(self.folder.report, cast("Run", record), metrics, record["comparison"])
        self.folder.write_record(record)
        self.stage(f"done: {self.folder.path}")


def planned_record(planned: Plan | None) -> dict[str, Any] | None:
    """Return what run.json says of the plan."""
    if planned is None:
        return None
    best = planned.best
    return {"planned_bytes": best.total, "activations": best.policy, "parts": best.bytes}


def trainable(found: Report) -> dict[str, float]:
    """Return how much of the model trains."""
    return {"count": found.trainable, "percent": found.percent, "total": found.total}


def held_out(model: PreTrainedModel, rows: list[Encoded], batch_size: int) -> HeldOut | None:
    """Return what measures the mean loss of held-out rows, or None when there are none."""
    if not rows:
        return None

    def measure() -> float:
        found = losses(model, rows, max(batch_size, 8))
        return sum(row.nll for row in found) / sum(row.tokens for row in found)

    return measure


def step_of(checkpoint: Path) -> int:
    """Return the step a checkpoint was written after."""
    state = json.loads((checkpoint / checkpoints.TRAINER_STATE).read_text(encoding="utf-8"))
    return int(state["global_step"])
