"""TRL scripts whose only change is the import of `get_peft_model`: the curves of TRL + peft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl.trainer.dpo_trainer
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, prepare_model_for_kbit_training
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import inlay.peft
from inlay.model.load.folder import EMBEDDED

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # transformers about its own and TRL's and peft's arguments' names.
        "`is_gradient_checkpointing` is deprecated:FutureWarning",
        "`gradient_checkpointing:FutureWarning",
        # torch, on a schedule that Trainer loads before the first step of a resumed run.
        "Detected call of `lr_scheduler.step:UserWarning",
    )
]

Wrap = Callable[..., Any]
WRAPS: dict[str, Wrap] = {"inlay": inlay.peft.get_peft_model, "peft": peft.get_peft_model}
TEXTS = [f"The {w} number {i} is {i * i}." for i in range(8) for w in ("first", "second")]
PAIRS = [
    {"prompt": f"The square of {i} is", "chosen": f" {i * i}.", "rejected": f" {i * i + 7}!"}
    for i in range(16)
]


@dataclasses.dataclass
class Run:
    """What a script leaves behind."""

    trainer: Any
    losses: list[float]
    evaluations: list[float]


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED["pocket"])


def bare() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            initializer_range=0.1, name_or_path="",
        )
    )  # fmt: skip


def wrapped(wrap: Wrap, **options: Any) -> Any:
    model = bare()
    torch.manual_seed(1)
    return wrap(model, lora(**options))


def lora(**options: Any) -> LoraConfig:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
    return LoraConfig(**given | options, task_type="CAUSAL_LM")


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "seed": 3,
        "disable_tqdm": True, "max_length": 32,
    }  # fmt: skip


def finished(trainer: Any, resume: str | None = None) -> Run:
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return Run(trainer, losses, [e["eval_loss"] for e in history if "eval_loss" in e])


def sft(wrap: Wrap, folder: Path, resume: str | None = None, **options: Any) -> Run:
    config = SFTConfig(
        **common(folder), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, gradient_checkpointing=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    trainer = SFTTrainer(
        wrapped(wrap, **options), config, train_dataset=rows, eval_dataset=rows.select(range(4)),
        processing_class=tokenizer(),
    )  # fmt: skip
    return finished(trainer, resume)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_a_trainers_peft_config_makes_an_inlay_model_once_it_takes_over(tmp_path: Path) -> None:
    def trained(folder: Path) -> Run:
        rows = Dataset.from_list([{"text": text} for text in TEXTS])
        config = SFTConfig(**common(folder), max_steps=3)
        model = bare()
        torch.manual_seed(1)
        return finished(
            SFTTrainer(
                model, config, train_dataset=rows, processing_class=tokenizer(), peft_config=lora()
            )
        )

    peers = trained(tmp_path / "peers")
    with inlay.peft.take_over():
        mine = trained(tmp_path / "mine")
        pairs = dpo_with_config(tmp_path / "pairs")
    assert not isinstance(peers.trainer.model, inlay.peft.PeftModel)
    assert isinstance(mine.trainer.model, inlay.peft.PeftModel)
    assert isinstance(pairs.trainer.model, inlay.peft.PeftModel)
    assert mine.losses == pytest.approx(peers.losses, rel=2e-4)
    assert not isinstance(trained(tmp_path / "after").trainer.model, inlay.peft.PeftModel)


def dpo_with_config(folder: Path) -> Run:
    config = DPOConfig(**common(folder), max_steps=2)
    rows = Dataset.from_list(PAIRS)
    return finished(
        DPOTrainer(
            bare(), args=config, train_dataset=rows, processing_class=tokenizer(),
            peft_config=lora(),
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_sft_script_trains_resumes_and_saves_as_with_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    mine = sft(WRAPS["inlay"], tmp_path / "mine", **options)
    peers = sft(WRAPS["peft"], tmp_path / "peers", **options)
    assert len(mine.losses) == 4
    assert mine.losses == pytest.approx(peers.losses, rel=2e-4)
    assert mine.evaluations == pytest.approx(peers.evaluations, rel=2e-4)
    assert mine.evaluations[-1] < mine.evaluations[0]

    resumed = sft(WRAPS["inlay"], tmp_path / "mine", str(tmp_path / "mine/checkpoint-2"), **options)
    assert resumed.losses == mine.losses
    assert resumed.evaluations == mine.evaluations
    resumed.trainer.save_model(str(tmp_path / "final"))
    read = peft.PeftModel.from_pretrained(bare(), tmp_path / "final")
    torch.testing.assert_close(logits(read), logits(mine.trainer.model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    config = SFTConfig(
        **common(tmp_path / "run"),
        max_steps=6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first checkpoint, the worst, is the one to load
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    model = wrapped(WRAPS["inlay"])
    trainer = SFTTrainer(
        model, config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )
    run = finished(trainer)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2"), run.evaluations
    read = inlay.peft.PeftModel.from_pretrained(bare(), best)
    assert torch.equal(logits(read), logits(trainer.model))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_p_tuning_trains_resumes_and_loads_its_best_checkpoint(
    encoder: str, tmp_path: Path
) -> None:
    """With gradient checkpointing, TRL's default. HF PEFT's own resumed run differs."""

    def trainer(name: str, **more: Any) -> SFTTrainer:
        model = bare()
        torch.manual_seed(1)
        config = SFTConfig(**common(tmp_path / name), max_steps=4, save_steps=2, **more)
        rows = Dataset.from_list(
            [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
        )
        return SFTTrainer(
            model, config, train_dataset=rows, eval_dataset=rows.select(range(4)),
            processing_class=tokenizer(),
            peft_config=PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=24,
                encoder_reparameterization_type=encoder,
            ),
        )  # fmt: skip

    peers = finished(trainer("peers"))
    with inlay.peft.take_over():
        mine = finished(trainer("mine"))
        resumed = finished(trainer("mine"), str(tmp_path / "mine/checkpoint-2"))
        worst = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        best = finished(trainer("best", **worst, greater_is_better=True))
    assert isinstance(mine.trainer.model, inlay.peft.PeftModel)
    assert mine.losses == pytest.approx(peers.losses, rel=2e-4)
    assert mine.losses[-1] < mine.losses[0]
    assert resumed.losses == mine.losses
    ends = [dict(run.trainer.model.named_parameters()) for run in (mine, resumed)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    loaded = best.trainer.state.best_model_checkpoint
    assert loaded is not None
    assert loaded.endswith("checkpoint-2")
    read = inlay.peft.PeftModel.from_pretrained(bare(), loaded)
    assert torch.equal(logits(read), logits(best.trainer.model))
    mine.trainer.save_model(str(tmp_path / "final"))
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "final")
    text = logits(theirs)[:, 4:]
    torch.testing.assert_close(text, logits(mine.trainer.model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_4_bit_base_trains_as_with_peft_and_its_adapter_stays_in_fp32(
    options: dict[str, Any], tmp_path: Path
) -> None:
    bare().save_pretrained(tmp_path / "base")
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    losses: dict[str, list[float]] = {}
    for name, wrap in WRAPS.items():
        base = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=in_4_bits, dtype=torch.float32
        )
        torch.manual_seed(1)
        model = wrap(prepare_model_for_kbit_training(base), lora(**options))
        config = SFTConfig(**common(tmp_path / name), max_steps=3, save_strategy="no")
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer())
        losses[name] = finished(trainer).losses
        if name == "inlay":
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert losses["inlay"] == pytest.approx(losses["peft"], rel=5e-3)
    assert losses["inlay"][-1] != losses["inlay"][0]


def dpo(wrap: Wrap, folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Run:
    config = DPOConfig(**common(folder), max_steps=4, save_strategy="no", beta=0.5)
    rows = Dataset.from_list(PAIRS)
    given: dict[str, Any] = {"model": bare(), "peft_config": lora()}
    if monkeypatch is None:
        given = {"model": wrapped(wrap, init_lora_weights=False)}
    else:
        monkeypatch.setattr(trl.trainer.dpo_trainer, "get_peft_model", wrap)
        torch.manual_seed(1)
    trainer = DPOTrainer(**given, args=config, train_dataset=rows, processing_class=tokenizer())
    return finished(trainer)


@pytest.mark.slow
def test_dpo_against_a_frozen_copy_of_the_adapter_is_that_of_peft(tmp_path: Path) -> None:
    mine, peers = (dpo(wrap, tmp_path / name) for name, wrap in WRAPS.items())
    model = mine.trainer.model
    assert mine.losses == pytest.approx(peers.losses, rel=1e-3)
    assert mine.losses[-1] != mine.losses[0]
    assert sorted(model.peft_config) == ["default", "ref"]
    assert model.active_adapter == "default"
    frozen = [p for n, p in model.named_parameters() if ".ref." in n]
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    assert not all(
        torch.equal(p, model.get_parameter(n.replace(".default.", ".ref.")))
        for n, p in model.named_parameters()
        if ".default." in n
    )


@pytest.mark.slow
def test_a_dpo_run_resumes_with_its_frozen_copy(tmp_path: Path) -> None:
    def trainer() -> DPOTrainer:
        config = DPOConfig(**common(tmp_path), max_steps=4, save_steps=2, beta=0.5)
        model = wrapped(WRAPS["inlay"], init_lora_weights=False)
        rows = Dataset.from_list(PAIRS)
        return DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer())

    whole = finished(trainer())
    resumed = finished(trainer(), str(tmp_path / "checkpoint-2"))
    assert len(whole.losses) == 4
    assert resumed.losses == whole.losses
    state = resumed.trainer.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole.trainer.model.state_dict().items())


@pytest.mark.slow
def test_dpo_against_the_base_with_the_adapter_off_is_that_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, peers = (dpo(wrap, tmp_path / name, monkeypatch) for name, wrap in WRAPS.items())
    assert isinstance(mine.trainer.model, inlay.peft.PeftModel)
    assert mine.losses == pytest.approx(peers.losses, rel=1e-3)
    assert mine.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert mine.losses[-1] < 0.69


def answers(completions: list[str], **unused: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def reward(wrap: Wrap, folder: Path) -> Any:
    config = bare().config
    config.num_labels = 1
    base = LlamaForSequenceClassification(config)
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    arguments = RewardConfig(**common(folder), max_steps=3, save_strategy="no")
    rows = Dataset.from_list(PAIRS)
    return RewardTrainer(
        wrap(base, adapter), arguments, train_dataset=rows, processing_class=tokenizer()
    )


def kto(wrap: Wrap, folder: Path) -> Any:
    arguments = KTOConfig(**common(folder), max_steps=3, save_strategy="no")
    texts = [(p["prompt"], p[k], k == "chosen") for p in PAIRS for k in ("chosen", "rejected")]
    rows = Dataset.from_list([{"prompt": p, "completion": c, "label": k} for p, c, k in texts])
    return KTOTrainer(
        wrapped(wrap), args=arguments, train_dataset=rows, processing_class=tokenizer()
    )


def grpo(wrap: Wrap, folder: Path) -> Any:
    given = {k: v for k, v in common(folder).items() if k != "max_length"}
    given |= {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.1}
    arguments = GRPOConfig(
        **given, max_steps=3, save_strategy="no", max_completion_length=8, temperature=0.8
    )
    rows = Dataset.from_list([{"prompt": f"Count {i}"} for i in range(16)])
    return GRPOTrainer(
        wrapped(wrap), answers, args=arguments, train_dataset=rows, processing_class=tokenizer()
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", [reward, kto, grpo], ids=lambda build: build.__name__)
def test_trls_other_trainers_give_pefts_curve(build: Any, tmp_path: Path) -> None:
    mine, peers = (finished(build(wrap, tmp_path / name)) for name, wrap in WRAPS.items())
    assert len(mine.losses) == 3
    assert mine.losses == pytest.approx(peers.losses, rel=1e-3, abs=1e-6)
    assert len(set(mine.losses)) > 1
