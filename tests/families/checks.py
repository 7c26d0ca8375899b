"""What must hold of every class: each check returns nothing, a note, or raises.

A check that raises one of Inlay's own errors was refused; anything else that it raises is a fault.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock
from zlib import crc32

import family
import inputs
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.checkpoint.adapter import save_adapter
from inlay.checkpoint.peft_differences import differences
from inlay.memory.policy import applied
from inlay.methods.catalog import build_method
from inlay.model.adapters.registry import adapter_places, adapters
from inlay.model.adapters.watch import listed
from inlay.model.fast.packing import mixes_rows, positions
from inlay.model.merge.fidelity import first_tensor

VALUES, GRADIENTS = 1e-4, 1e-3
"""How far fp32 values may lie apart, as a share of the largest, and gradients of their length."""
Outcome = str | None


class WrongError(AssertionError):
    """A value is not what it must be."""


@dataclass
class Case:
    """One class with its tiny model, inputs, and what is computed of them once."""

    name: str
    model_type: str
    mapping: str
    notes: list[str] = field(default_factory=list)

    @cached_property
    def base(self) -> PreTrainedModel:
        return family.built(self.model_type, self.name)

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return inputs.batch(self.base, self.mapping)

    @property
    def unlabelled(self) -> dict[str, Tensor]:
        """The batch as it is read, not trained on; a decoder is given what it is to continue."""
        found = {n: x for n, x in self.batch.items() if n != "labels"}
        if self.decodes:
            found["decoder_input_ids"] = inputs.words(inputs.ROWS, inputs.SHORT, 5)
        return found

    @property
    def decodes(self) -> bool:
        """Whether it is an encoder-decoder that answers in words."""
        took = "decoder_input_ids" in inputs.accepts(self.base)
        return took and not self.mapping.endswith("_CLASSIFICATION")

    @property
    def storage(self) -> str:
        """The storage that is planned: one or the other, as both take their time."""
        return ("dense", "nf4")[crc32(self.name.encode()) % 2]

    @cached_property
    def moves_statistics(self) -> bool:
        """Whether the model itself changes when it is run in training."""
        return any(
            isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in self.base.modules()
        )

    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)

    def adapted(self, seed: int = 7) -> PreTrainedModel:
        """Return the model with an adapter whose values all matter."""
        return randomised(self.attached(self.fresh()), seed)

    def attached(self, model: PreTrainedModel) -> PreTrainedModel:
        """Adapt all linear layers, apart from those that no gradient reaches."""
        lora = inlay.LoRA(rank=4, alpha=8)
        return inlay.attach(model, lora, targets="all-linear", exclude=self.left_out)

    @cached_property
    def left_out(self) -> list[str]:
        """The layers that no gradient reaches, as the model's first step in training says."""
        model = inlay.attach(self.fresh(), inlay.LoRA(rank=4, alpha=8), targets="all-linear")
        try:
            gradients(randomised(model, 7), self.batch)
        except inlay.TrainingError:
            return [
                re.escape(name)
                for name, places in adapter_places(model, "default")
                if all(p.grad is None or not p.grad.any() for p in places.parameters())
            ]
        return []


@torch.no_grad()
def randomised(model: Any, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    for _, places in adapter_places(model, "default"):
        for p in places.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / p.shape[-1] ** 0.5))
    return model


def output(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return what a model gives for a batch, in eval mode."""
    model.eval()
    with torch.no_grad(), seeded():
        return first_tensor(model(**batch)).double()


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return a training loss: the model's own, where it has one."""
    model.train()
    with seeded():
        result = model(**batch)
        loss = getattr(result, "loss", None)
        return loss if loss is not None else first_tensor(result).double().square().mean()


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and what trains by name with its gradient, zero where it had none."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, batch)
    loss.backward()
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for n, p in found.items()
    }


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers each time, for models that draw some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def far(x: Tensor, y: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    if x.shape != y.shape:
        raise WrongError(f"shapes {tuple(x.shape)} and {tuple(y.shape)}")
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x.double() - y.double()).abs())
    finite = y[y.isfinite()].double()
    return float(difference.max() / finite.abs().max().clamp_min(1e-6)) if finite.numel() else 0.0


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the length of the difference of two gradients as a share of the second's."""
    if set(a) != set(b):
        raise WrongError(f"names differ: {sorted(set(a) ^ set(b))[:3]}")
    x, y = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (a, b))
    return float((x - y).norm() / y.norm().clamp_min(1e-9))


def must(found: float, limit: float, what: str) -> None:
    if not found <= limit:
        raise WrongError(f"{what}: {found:.2g} apart")


# The checks


def plain(case: Case) -> Outcome:
    """Fast and plain agree, in values, loss and gradients."""
    model = case.adapted()
    fast = output(model, case.unlabelled)
    loss, g = gradients(model, case.batch)
    with inlay.plain():
        slow = output(model, case.unlabelled)
        slow_loss, slow_g = gradients(model, case.batch)
    must(far(fast, slow), VALUES, "values, fast and plain")
    must(abs(loss - slow_loss) / max(abs(slow_loss), 1e-6), VALUES, "loss, fast and plain")
    must(apart(g, slow_g), GRADIENTS, "gradients, fast and plain")
    if not any(bool(x.any()) for x in g.values()):
        raise WrongError("nothing has a gradient")
    return None


def hf_peft(case: Case) -> Outcome:
    """HF PEFT reads the adapter and agrees, in values and gradients; and the other way."""
    model = case.adapted()
    wanted = output(model, case.unlabelled)
    gradients(model, case.batch)  # what a model reads of weights, it may read in training alone
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        said = [reason for _, reason in differences(model, adapters(model)["default"])]
        if said:
            back = inlay.load_adapter(case.fresh(), folder)
            must(far(output(back, case.unlabelled), wanted), VALUES, "values, read back")
            return f"HF PEFT computes otherwise, and saving says so: {said[0]}"
        try:
            theirs = peft.PeftModel.from_pretrained(case.fresh(), folder, is_trainable=True)
        except ValueError as error:
            if "is incompatible with" in str(error):
                return f"HF PEFT refuses it: {first_line(error)}"
            raise
        must(
            far(wanted, output(theirs, case.unlabelled)),
            VALUES,
            "values, Inlay and HF PEFT",
        )
        if not case.moves_statistics:
            a, b = gradients(model, case.batch), gradients(theirs, case.batch)
            must(abs(a[0] - b[0]) / max(abs(b[0]), 1e-6), VALUES, "loss, Inlay and HF PEFT")
            must(
                apart(named(model, folder), named_peft(theirs)),
                GRADIENTS,
                "gradients, Inlay and HF PEFT",
            )
        theirs.save_pretrained(folder + "/again")
        back = inlay.load_adapter(case.fresh(), folder + "/again")
        must(far(output(back, case.unlabelled), wanted), VALUES, "values, read back from HF PEFT")
    return None


@torch.no_grad()
def named(model: PreTrainedModel, folder: str) -> dict[str, Tensor]:
    """Return gradients under the names of the saved file: written as an adapter, and read."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    for name in kept:
        p = parameters[name]
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    save_adapter(model, folder + "/gradients")
    for name, value in kept.items():
        parameters[name].copy_(value)
    return load_file(Path(folder, "gradients", "adapter_model.safetensors"))


def named_peft(model: Any) -> dict[str, Tensor]:
    state = {
        n: (torch.zeros_like(p) if p.grad is None else p.grad)
        for n, p in model.named_parameters() if p.requires_grad
    }  # fmt: skip
    return peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


def padded(case: Case) -> Outcome:
    """A padded row has the values that it has alone, where the base's own does."""
    if "input_ids" not in case.batch or "attention_mask" not in inputs.accepts(case.base):
        return "no padding"
    if case.mapping not in (
        "CAUSAL_LM",
        "MASKED_LM",
        "TOKEN_CLASSIFICATION",
        "IMAGE_TEXT_TO_TEXT",
        "SEQ_TO_SEQ_CAUSAL_LM",
    ):
        return "no padding"
    short, mask = inputs.SHORT, torch.ones(inputs.ROWS, inputs.LONG, dtype=torch.long)
    mask[1, short:] = 0

    def both(model: PreTrainedModel) -> float:
        given = case.unlabelled
        together = output(model, {**given, "attention_mask": mask})[1]
        alone = {n: x[1:] for n, x in given.items()}
        alone["input_ids"] = given["input_ids"][1:, :short]
        if "bbox" in alone:
            alone["bbox"] = alone["bbox"][:, :short]
        single = output(model, {**alone, "attention_mask": mask[1:, :short]})[0]
        kept = together if case.decodes else together[:short]
        return far(kept, single)

    try:
        own = both(case.fresh())
    except Exception as error:
        return f"the model itself does not take padded rows: {first_line(error)}"
    if own > VALUES:
        return "the model's own padded rows differ"
    model = case.adapted()
    must(both(model), VALUES, "values, padded and alone")
    if "labels" not in case.batch or case.decodes:
        return None
    target = torch.where(mask.bool(), case.batch["labels"], -100)
    g = gradients(model, {**case.batch, "labels": target, "attention_mask": mask})
    with inlay.plain():
        h = gradients(model, {**case.batch, "labels": target, "attention_mask": mask})
    must(apart(g[1], h[1]), GRADIENTS, "gradients of padded rows, fast and plain")
    return None


def packed(case: Case) -> Outcome:
    """Rows in one sequence have the values and gradients that they have alone, or are refused."""
    if case.mapping not in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        return "no packing"
    ids, lengths = inputs.words(), (inputs.SHORT, inputs.LONG)
    rows = [ids[0, : lengths[0]].tolist(), ids[1].tolist()]
    model = case.adapted()
    why = mixes_rows(model, rows)
    if why is not None:
        raise inlay.InlayError(f"rows cannot share a sequence: {why}")
    one = {
        "input_ids": torch.tensor([rows[0] + rows[1]]), "position_ids": positions(lengths)
    }  # fmt: skip
    together = output(model, {**one, "use_cache": False})[0]
    alone = [output(model, {"input_ids": torch.tensor([row])})[0] for row in rows]
    must(far(together, torch.cat(alone)), VALUES, "values, packed and alone")
    target = one["input_ids"].clone()
    target[0, [0, lengths[0]]] = -100
    g = gradients(model, {**one, "labels": target, "use_cache": False})[1]
    counts = [length - 1 for length in lengths]
    apiece = [
        gradients(model, {"input_ids": torch.tensor([row]), "labels": torch.tensor([row])})[1]
        for row in rows
    ]
    if "router_aux_loss_coef" not in vars(case.base.config):
        joint = {
            n: sum(x[n] * c for x, c in zip(apiece, counts, strict=True)) / sum(counts) for n in g
        }
        must(apart(g, joint), GRADIENTS, "gradients, packed and alone")
    return None


def checkpointed(case: Case) -> Outcome:
    """Activations computed again give the same gradients."""
    if case.moves_statistics:
        return "the model's running statistics move"
    model = case.adapted()
    if not model.supports_gradient_checkpointing:
        return "its class cannot compute activations again"
    kept = gradients(model, case.batch)[1]
    for policy in ("layer-inputs", "keep-products"):
        with applied(model, policy):
            must(apart(gradients(model, case.batch)[1], kept), GRADIENTS, f"gradients, {policy}")
    return None


def quantised(case: Case) -> Outcome:
    """Packed weights compute what their dense values do."""
    for storage in ("nf4", "int8"):
        model = inlay.quantize(case.fresh(), storage)
        dense = case.fresh()
        with torch.no_grad():
            for name, layer in model.named_modules():
                if getattr(type(layer), "storage", None) == storage:
                    twin = dense.get_submodule(name)
                    w = layer.dequantize()
                    twin.weight.copy_(w.T if isinstance(twin, Conv1D) else w)
        must(
            far(output(model, case.unlabelled), output(dense, case.unlabelled)),
            VALUES,
            f"values, {storage}",
        )
        g = gradients(randomised(case.attached(model), 7), case.batch)[1]
        h = gradients(randomised(case.attached(dense), 7), case.batch)[1]
        must(apart(g, h), GRADIENTS, f"gradients, {storage}")
    return None


def merged(case: Case) -> Outcome:
    """The merged model, saved and read again, is the adapted one."""
    base, model = case.fresh(), case.adapted()
    if far(output(read_again(base), case.unlabelled), output(base, case.unlabelled)) > VALUES:
        return "the model itself is another once it is saved and read"
    wanted = output(model, case.unlabelled)
    inlay.merge(model)
    must(far(output(model, case.unlabelled), wanted), VALUES, "values, merged and adapted")
    must(
        far(output(read_again(model), case.unlabelled), wanted),
        VALUES,
        "values, merged, saved and read",
    )
    return None


def read_again(model: PreTrainedModel) -> PreTrainedModel:
    """Return what is read of a model that is saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def detached(case: Case) -> Outcome:
    """Taking the adapter off gives back the base's bits and classes, also after a step."""
    model = case.fresh()
    wanted = output(model, case.unlabelled)  # first: BigBird changes its own modules when it runs
    before = {n: x.clone() for n, x in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    config = said(model)
    case.attached(model)
    if far(output(model, case.unlabelled), wanted) > VALUES:
        raise WrongError("a new adapter changes the values")
    gradients(randomised(model, 7), case.batch)
    inlay.detach(model.eval())
    after = model.state_dict()
    moved = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
    if moved or set(after) != set(before):
        raise WrongError(
            f"tensors are not the base's: {(moved or sorted(set(after) ^ set(before)))[:3]}"
        )
    if classes != {n: type(m) for n, m in model.named_modules()}:
        raise WrongError("classes are not the base's")
    if said(model) != config:
        raise WrongError("the configuration is not the base's")
    if not torch.equal(output(model, case.unlabelled), wanted):
        raise WrongError("values are not the base's, bit for bit")
    return None


def said(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a model's configuration says; transformers' own losses note their kind in it."""
    return {k: v for k, v in model.config.to_dict().items() if k != "problem_type"}


def generated(case: Case) -> Outcome:
    """Greedy words are the same plainly and fast, in eval and in train mode."""
    if not case.base.can_generate():
        return "its class does not generate"
    given = {n: x for n, x in case.unlabelled.items() if n != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def said(model: PreTrainedModel) -> Tensor:
        with torch.no_grad(), seeded():
            words = model.generate(**given, **options)
            return words if isinstance(words, Tensor) else first_tensor(words)

    try:
        said(case.fresh().train())
        said(case.fresh().eval())
    except Exception as error:
        return f"the model itself does not generate: {first_line(error)}"
    model = case.adapted()
    with inlay.plain():
        wanted = said(model.eval())
    for mode in (False, True):
        if not torch.equal(said(model.train(mode)), wanted):
            raise WrongError(
                f"generation in {'train' if mode else 'eval'} mode differs from the plain one"
            )
    return None


def planned(case: Case) -> Outcome:
    """A step is planned from the configuration alone."""
    if case.mapping not in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM"):
        return "no run of Inlay's"
    from inlay.memory.devices import Device
    from inlay.run.config import RunConfig
    from inlay.tasks import TASKS
    from inlay.train import planning

    device = Device("a CPU", "cpu", 1 << 36, 1e10, 1e11, 1e11)
    config = copy.deepcopy(case.base.config)
    config.architectures = [case.name]
    run = RunConfig(
        model="unused", data="reports", output="unused", method="lora", storage=case.storage,
        max_length=32, batch_size=2,
    )  # fmt: skip
    rows = TASKS["sft"].run(run).assumed()
    with mock.patch.object(planning, "held_by_process", return_value=0):
        found = planning.planned_step(config, rows, device)
    if found.best.total <= 0 or not found.trained:
        raise WrongError("a plan of nothing")
    real = inlay.attach(copy.deepcopy(case.base), build_method("lora", {}))
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    if found.trained != trained:
        raise WrongError(f"a plan trains {found.trained:,} values, and the model {trained:,}")
    return None


CHECKS: dict[str, Callable[[Case], Outcome]] = {
    "plain": plain,
    "HF PEFT": hf_peft,
    "padded": padded,
    "packed": packed,
    "checkpointed": checkpointed,
    "quantised": quantised,
    "merged": merged,
    "detached": detached,
    "generated": generated,
    "planned": planned,
}


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:240]


def outcome(case: Case, check: str) -> dict[str, str]:
    """Return what one check of one class came to, and what was said on the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            note = CHECKS[check](case)
            found = (
                {"result": "right"} if note is None else {"result": "does not apply", "why": note}
            )
        except inlay.InlayError as error:
            found = {"result": "refused", "why": str(error)}
        except WrongError as error:
            found = {"result": "FAULT", "why": str(error)}
        except Exception as error:
            found = {
                "result": "FAULT",
                "why": f"{type(error).__name__}: {first_line(error)}",
                "at": place(error),
            }
    notes = sorted(
        {
            first_line(w.message)
            for w in said
            if issubclass(w.category, UserWarning) and "inlay" in str(w.filename)
        }
    )
    return found | ({"notes": " · ".join(notes)} if notes else {})


def place(error: BaseException) -> str:
    """Return the last of Inlay's own lines that an error went through, and the very last."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/inlay/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [frames[-1], *own[-1:]])


def tried(
    name: str, model_type: str, mapping: str, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run every check on one class; a class that cannot be built or run says why."""
    case = Case(name, model_type, mapping)
    found: dict[str, Any] = {"type": model_type, "mapping": mapping}
    try:
        loss = loss_of(case.fresh(), case.batch)
        output(case.fresh(), case.unlabelled)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"its loss is {float(loss)} on the inputs made for it")
    except Exception as error:
        return found | {
            "not built": f"{type(error).__name__}: {first_line(error)}",
            "at": place(error),
        }
    found["checks"] = {check: outcome(case, check) for check in only or CHECKS}
    if vars(case).get("left_out"):
        found["left out"] = listed(name.replace("\\", "") for name in case.left_out)
    return found
