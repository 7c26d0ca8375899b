from __future__ import annotations

import json
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_tiny import (
    GRPO,
    KINDS,
    adapter_hash,
    broken_at,
    check_refused,
    losses_of,
    make_task,
    one_model,
    silence,
    trainer_on,
    what_is_left,
)
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from inlay.errors import DataError, MergeError, TrainingError, UsageError
from inlay.evaluate.generation import Answer, Sampling, continued, settings
from inlay.kernels.switches import plain
from inlay.methods.base import evaluating
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach, disabled
from inlay.model.adapters.registry import adapter_places
from inlay.model.load.pretrained import load
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.tasks.grpo import run as grpo
from inlay.tasks.grpo.compare import Measured, divergence, reward_records
from inlay.tasks.grpo.order import Group, PromptOrder
from inlay.tasks.grpo.trainer import RewardTrainer
from inlay.train.recipe import learning_rate
from inlay.train.rows import rows_of_run
from inlay.train.run import TrainResult, train
from inlay.train.trl import left_as_it_was

make_grpo = partial(make_task, "grpo")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, TrainResult]:
    with one_model(grpo_trainer):
        folder = tmp_path_factory.mktemp("grpo")
        make_grpo(folder)
        config = make_grpo(
            folder,
            epochs=8.0,
            batch_size=8,
            learning_rate=0.1,
            beta=0.01,
            rewards=[*GRPO["rewards"], {"name": "length", "most": 6, "weight": 0.1}],
            eval_data=str(folder / "prompts.jsonl"),
        )
        return config, train(config)


def metric(result: TrainResult, name: str) -> dict[str, Any]:
    (found,) = [m for m in result.run["comparison"]["metrics"] if m["name"] == name]
    return found


def test_a_run_leaves_what_a_supervised_one_does(done: tuple[RunConfig, TrainResult]):
    config, result = done
    run, page = what_is_left(config, result)
    assert run["config"]["generation"] == "transformers"
    assert run["steps"] == 8 * (30 // 4)
    assert "rewards_sha256" not in run
    assert "<h3>Reward</h3>" in page
    assert "KL to the base" in page
    assert "tokens in the tuned model&#x27;s drawn answers) for both" in page


def test_metrics_of_a_step_are_the_tasks_own(done: tuple[RunConfig, TrainResult]):
    steps = [x for x in losses_of(done[0].output) if "loss" in x]
    assert set(steps[0]) == {
        "step", "epoch", "loss", "reward", "reward_std", "kl", "answer_tokens", "cut_off",
        "equal_groups", "entropy", "reward_regex", "reward_length", "learning_rate", "grad_norm",
        "tokens",
    }  # fmt: skip
    assert steps[0]["kl"] == 0
    assert steps[-1]["kl"] > 0.001
    for step in steps:
        whole = step["reward_regex"] + 0.1 * step["reward_length"]
        assert step["reward"] == pytest.approx(whole, abs=1e-6)
        assert 1 <= step["answer_tokens"] <= 6
        assert 0 <= step["cut_off"] <= 1


def test_reward_rises(done: tuple[RunConfig, TrainResult]):
    held = [x["eval_reward"] for x in losses_of(done[0].output) if "eval_reward" in x]
    assert held[-1] > held[0] + 0.2


def test_base_and_tuned_are_compared_on_held_out_prompts(done: tuple[RunConfig, TrainResult]):
    result = done[1]
    names = [m["name"] for m in result.run["comparison"]["metrics"]]
    assert names == [
        "reward", "sampled_reward", "reward_regex", "sampled_reward_regex", "reward_length",
        "sampled_reward_length", "kl", "answer_tokens", "cut_off",
    ]  # fmt: skip
    assert metric(result, "reward")["difference"]["value"] > 0.2
    assert metric(result, "reward")["p_value"] < 0.05
    assert metric(result, "reward")["rows"] == 30
    kl = metric(result, "kl")
    assert kl["base"] == {"value": 0.0, "low": None, "high": None}
    assert 0 < kl["tuned"]["low"] < kl["tuned"]["value"] < kl["tuned"]["high"]
    assert kl["p_value"] is None


def test_the_distance_to_the_base_is_that_of_the_whole_distributions(
    done: tuple[RunConfig, TrainResult],
):
    model = done[1].model
    rows, starts = [[3, 4, 5, 6, 7], [8, 9, 3]], [3, 1]
    found = divergence(model, rows, starts, temperature=0.7)
    for ids, start, value in zip(rows, starts, found, strict=True):
        with torch.no_grad():
            tuned = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            with disabled(model):
                base = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
        kl = (tuned.exp() * (tuned - base)).sum(-1)[start - 1 : -1].mean()
        assert value == pytest.approx(float(kl), rel=1e-3)


def test_the_same_run_gives_the_same_adapter(done: tuple[RunConfig, TrainResult]):
    config = done[0]
    before, lines = adapter_hash(config.output), losses_of(config.output)
    again = load_config(None, {**config.model_dump(), "overwrite": True, "evaluate": False})
    train(again)
    assert (adapter_hash(config.output), losses_of(config.output)) == (before, lines)


# The trainer, and what it asks of the model.


def adapted(config: RunConfig, **changes: Any) -> tuple[Any, Any]:
    model, tokenizer = load(config.model, **changes)
    attach(model, LoRA(rank=4), targets=["q_proj", "lm_head"], name="default")
    torch.manual_seed(1)
    for _, params in adapter_places(model, "default"):
        torch.nn.init.normal_(params.B, std=0.5)
    return model, tokenizer


PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]
WRITTEN = [[4, 4, 2], [5], [6, 7, 8, 9]]


def padded_on_both_sides() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [
        ([0] * (5 - len(p)) + p + a + [0] * (4 - len(a)))
        for p, a in zip(PROMPTS, WRITTEN, strict=True)
    ]
    mask = [
        [0] * (5 - len(p)) + [1] * len(p + a) + [0] * (4 - len(a))
        for p, a in zip(PROMPTS, WRITTEN, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(mask)


def by_hand(model: Any, temperature: float) -> torch.Tensor:
    found = torch.zeros(3, 4)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, WRITTEN, strict=True)):
        logits = model(torch.tensor([prompt + answer])).logits[0] / temperature
        for place, token in enumerate(answer):
            found[row, place] = logits[len(prompt) + place - 1].log_softmax(-1)[token]
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_log_probabilities_are_those_of_each_row_alone(
    tmp_path: Path, temperature: float, fast: bool, storage: str
):
    config = make_grpo(tmp_path, temperature=temperature)
    model, tokenizer = adapted(config, storage=storage)
    trainer = trainer_on(config, model, tokenizer)
    ids, mask = padded_on_both_sides()
    with torch.no_grad(), evaluating(model):
        wanted = by_hand(model, temperature)
        with disabled(model):
            base = by_hand(model, temperature)
    model.train()
    switch = plain() if not fast else torch.no_grad()
    with torch.no_grad(), switch:
        found, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, 4, batch_size=2, compute_entropy=True
        )
        batch = {
            "prompt_ids": ids[:, :5], "completion_ids": ids[:, 5:],
            "prompt_mask": mask[:, :5], "completion_mask": mask[:, 5:],
        }  # fmt: skip
        reference = trainer.reference(batch)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(reference, base, atol=2e-3, rtol=1e-3)
    assert float((wanted - base).abs().max()) > 0.3
    written = mask[:, 5:] == 1
    assert bool((entropy[written] > 0).all())
    assert not bool(entropy[~written].any())


def test_answers_are_written_without_dropout_and_the_mode_is_restored(tmp_path: Path):
    config = make_grpo(tmp_path)
    model, tokenizer = adapted(config)
    trainer = trainer_on(config, model, tokenizer)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append(module.training)
    )
    trainer.here = [0, 0]
    trainer._generate_single_turn([[3, 4], [5]], None, {}, 2)
    handle.remove()
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == before


def test_dropout_of_the_base_is_off_while_it_trains_and_back_afterwards(tmp_path: Path):
    config = make_grpo(tmp_path)
    model, tokenizer = adapted(config)
    model.model.extra = torch.nn.Dropout(0.3)
    with left_as_it_was(model):
        trainer_on(config, model, tokenizer)
        assert model.model.extra.p == 0
    assert model.model.extra.p == 0.3
    assert "forward" not in vars(model)


def test_the_order_gives_each_prompt_to_its_answers_once_a_pass():
    group = Group(answers=3, step=6, passes=2)
    lengths = [4, 5, 6, 7, 8]
    order = PromptOrder(lengths, group, seed=1)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        rows = list(order)
        assert len(rows) == len(order) == 2 * 6 * 2
        steps = [rows[start : start + 12] for start in (0, 12)]
        for step in steps:
            a, b = step[0], step[3]
            assert step == [a, a, a, b, b, b] * 2
        assert len(set(rows)) == 4
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    order.set_epoch(0)
    assert list(order) == epochs[0]


# A run that goes wrong.


def own(folder: Path, text: str) -> str:
    path = folder / "rewards.py"
    path.write_text(text)
    return f"{path}:mine"


FROM_STEP_4 = """
def mine(completions, trainer_state=None, **columns):
    late = trainer_state is None or trainer_state.global_step >= 3
    return [float(late and "heart" in c) for c in completions]
"""


def test_a_first_step_of_equal_rewards_is_told_and_does_not_stop_the_run(tmp_path: Path):
    told: list[str] = []
    config = make_grpo(tmp_path, rewards=[own(tmp_path, FROM_STEP_4)], evaluate=False, log_every=1)
    train(config, on_event=lambda event: told.append(event.message))
    assert [message for message in told if "step 1 teaches nothing" in message]
    steps = [x for x in losses_of(config.output) if "loss" in x]
    assert [step["equal_groups"] for step in steps[:3]] == [1, 1, 1]
    assert [step["grad_norm"] for step in steps[:3]] == [0, 0, 0]
    assert min(step["equal_groups"] for step in steps[3:]) < 1


def test_a_layer_without_gradient_is_found_at_the_first_step_that_teaches(tmp_path: Path):
    config = make_grpo(tmp_path, rewards=[own(tmp_path, FROM_STEP_4)], targets=["v_proj"])
    silence(config.model, layer=1)
    with pytest.raises(TrainingError, match=r"no gradient reaches .*layers\.1\.self_attn\.v_proj"):
        train(config)


def test_a_run_in_which_no_step_teaches_ends_in_a_sentence(tmp_path: Path):
    config = make_grpo(tmp_path, rewards=[{"name": "regex", "pattern": "nowhere"}], max_steps=3)
    with pytest.raises(TrainingError, match="in none of the 3 steps were two answers to one"):
        train(config)
    assert not (tmp_path / "out" / "adapter").exists()


BREAKS = """
def mine(completions, number, **columns):
    return [1 / (0 if n == {row} else 1) for n in number]
"""


def test_a_reward_that_does_not_judge_every_answer_has_no_record_of_its_own():
    answers = [Answer((1, 2), "heart", ended=True), Answer((1,), "no", ended=True)]
    both = {"reward": [1.0, 0.0], "regex": [1.0, 0.0], "length": [1.0, 1.0]}
    some = {name: values for name, values in both.items() if name != "regex"}
    for order in permutations([both, both, some]):
        base, tuned = Measured(both, order[0], answers), Measured(order[1], order[2], answers)
        names = [record["name"] for record in reward_records(base, tuned)]
        assert names == ["reward", "sampled_reward", "reward_length", "sampled_reward_length"]


FROM_STEP_3 = """
def mine(completions, trainer_state=None, **columns):
    early = trainer_state is not None and trainer_state.global_step < 2
    return [None if early else 1.0 for c in completions]
"""


def test_a_step_in_which_a_reward_judges_nothing_has_no_value_of_it(tmp_path: Path):
    rewards = [own(tmp_path, FROM_STEP_3), GRPO["rewards"][0]]
    config = make_grpo(tmp_path, rewards=rewards, max_steps=4, log_every=1, evaluate=False)
    train(config)
    steps = [x for x in losses_of(config.output) if "loss" in x]
    assert [x.get("reward_mine") for x in steps] == [None, None, 1, 1]


def test_a_reward_that_raises_names_function_row_and_step(tmp_path: Path):
    config = make_grpo(tmp_path)
    row = rows_of_run(config).train.rows[5]["number"]
    text = BREAKS.format(row=row)
    config = make_grpo(tmp_path, rewards=[own(tmp_path, text)])
    with pytest.raises(TrainingError) as caught:
        train(config)
    sentence = str(caught.value)
    assert "rewards.py:mine' raised ZeroDivisionError: division by zero, at step " in sentence
    assert f"prompts.jsonl, line {row + 1}; mend the function; the last good state" in sentence


def test_a_changed_file_of_rewards_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = own(tmp_path, FROM_STEP_4.replace(">= 3", ">= 0"))
    config = make_grpo(tmp_path, rewards=[name], resume=True, evaluate=False)
    broken_at(monkeypatch, RewardTrainer, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(run["rewards_sha256"]) == 64
    own(tmp_path, FROM_STEP_4)
    with pytest.raises(UsageError, match="the file of reward functions has changed since the run"):
        train(config)
    own(tmp_path, FROM_STEP_4.replace(">= 3", ">= 0"))
    assert train(config).run["finished"]


def test_nothing_is_written_for_bad_data(tmp_path: Path):
    for changes, sentence in (
        ({"max_length": 4}, r"line \d+: the prompt has \d tokens, more than max_length 4"),
        ({"rewards": ["final_number"]}, r"line 1: no field 'answer'.* The reward final_number"),
        ({"max_rows": 4, "split": [0.5, 0.5, 0]}, "prompts to train on, and a step takes 4"),
    ):
        config = make_grpo(tmp_path, **{"batch_size": 8, **changes})
        with pytest.raises(DataError, match=sentence):
            train(config)
        assert not Path(config.output).exists()


def test_answers_that_do_not_fit_the_context_are_refused(tmp_path: Path):
    config = make_grpo(tmp_path, max_completion_tokens=60)
    with pytest.raises(UsageError, match=r"7 tokens and an answer may have 60 .* context of 64"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"packing": "bfd"}, "'packing' does not apply to the task 'grpo'"),
        ({"eight_bits": True}, "'eight_bits' does not apply to the task 'grpo'"),
        ({"cache_trunk": True}, "'cache_trunk' does not apply to the task 'grpo'"),
        ({"completion": "b"}, "'completion' does not apply to the task 'grpo'"),
        ({"text": "a"}, "'text' does not apply to the task 'grpo'"),
        ({"format": "alpaca"}, "'format' does not apply to the task 'grpo'"),
        ({"generate_rows": 3}, "'generate_rows' does not apply to the task 'grpo'"),
        ({"generate_tokens": 3}, "'generate_tokens' does not apply to the task 'grpo'"),
        ({"rewards": None}, "the task 'grpo' needs 'rewards', which say what an answer is worth"),
        ({"rewards": []}, "'rewards' must be a list of one or more"),
        ({"rewards": ["regx"]}, "there is no reward 'regx'"),
        ({"num_generations": 1}, "'num_generations' must be a whole number of at least 2"),
        (
            {"num_generations": 5},
            "batch_size 4 x gradient_accumulation 4 = 16 answers a step, which is no multiple of "
            "num_generations 5",
        ),
        ({"temperature": 0}, "'temperature' must be a number above 0"),
        ({"top_p": 1.5}, "'top_p' must be a number above 0 and of at most 1"),
        ({"generation": "sglang"}, "'generation' must be one of 'transformers', 'vllm'"),
        ({"beta": -1.0}, "'beta' must be a number of at least 0"),
        ({"task": "sft"}, "'rewards' belongs to the task grpo, not to 'sft'"),
        ({"task": "dpo", "rewards": None, "top_p": 1.0}, "'top_p' belongs to the task grpo"),
    ],
)
def test_a_key_that_does_not_fit_the_task_is_refused_by_name(
    changes: dict[str, Any], sentence: str
):
    run = {"task": "grpo", "rewards": ["json"], **changes}
    check_refused(sentence, **{key: value for key, value in run.items() if value is not None})


def test_vllm_that_is_not_installed_is_a_sentence(tmp_path: Path):
    config = make_grpo(tmp_path, generation="vllm")
    with pytest.raises(UsageError, match="generation 'vllm' needs vLLM, which is not installed"):
        train(config)
    assert not Path(config.output).exists()


def test_the_formula_knows_that_rewards_want_a_lower_rate():
    run = {"model": "m", "data": "d", "output": "o"}
    sft = learning_rate(load_config(None, run), 1024, "llama", 1.0)
    config = load_config(None, {**run, "task": "grpo", "rewards": ["json"]})
    grpo = learning_rate(config, 1024, "llama", 1.0)
    assert grpo.value == pytest.approx(sft.value / 10)


def test_what_the_user_left_open_is_settled_by_the_task_and_stays():
    run = {"model": "m", "data": "d", "output": "o", "task": "grpo", "rewards": ["json"]}
    config = load_config(None, run)
    assert (config.beta, config.num_generations, config.max_completion_tokens) == (0.0, 8, 256)
    assert (config.temperature, config.top_p, config.generation) == (1.0, 1.0, "transformers")
    assert load_config(None, config.model_dump()) == config


# Storages, methods, options.


@pytest.mark.parametrize(
    "changes", [*KINDS, {"temperature": 0.8, "top_p": 0.9, "beta": 0.1}], ids=str
)
def test_every_kind_of_run_learns(tmp_path: Path, changes: dict[str, Any]):
    train(make_grpo(tmp_path, epochs=2.0, evaluate=False, batch_size=8, **changes))
    steps = [x for x in losses_of(tmp_path / "out") if "loss" in x]
    assert steps[-1]["kl"] > 1e-5
    assert min(step["equal_groups"] for step in steps) < 1
    if changes.get("method") != "prefix":  # the only one of these that begins off the base
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_messages_are_answered_and_judged_as_messages(tmp_path: Path):
    config = make_grpo(tmp_path)
    _, tokenizer = load(config.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(config.model)
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    Path(config.data).write_text("\n".join(map(json.dumps, rows)))
    text = """
def mine(prompts, completions, **columns):
    assert all(p[-1]["role"] == "user" for p in prompts)
    assert all(c[0]["role"] == "assistant" for c in completions)
    return [float("heart" in c[0]["content"]) for c in completions]
"""
    result = train(make_grpo(tmp_path, rewards=[own(tmp_path, text)], max_steps=3))
    assert result.run["finished"]
    assert metric(result, "reward")["rows"] > 0


def test_an_answer_knows_whether_it_ended():
    assert not Answer((1, 2), "a b", ended=False).ended


# vLLM, by a stand-in: what is pushed to it, and what it gives back.


class Engine(VLLMGeneration):
    """Stands where TRL has vLLM: a plain model of its own that takes the weights pushed to it."""

    pushes = 0

    def _init_vllm(self) -> None:
        plain_model, _ = load(self.model.name_or_path)
        self.plain: Any = plain_model
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        self.llm = SimpleNamespace(llm_engine=executor, reset_prefix_cache=self.pushed)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.plain.named_parameters())
        for name, value in weights:
            assert own[name].dtype == value.dtype
            with torch.no_grad():
                own[name].copy_(value)

    def pushed(self) -> None:
        Engine.pushes += 1

    def generate(self, prompts: Any, **options: Any) -> Any:
        config = settings(6, [2], self.processing_class, Sampling())
        with torch.no_grad():
            answers = continued(self.plain, prompts, config)
            scores = [
                by_row(self.plain, prompt, written)
                for prompt, written in zip(prompts, answers, strict=True)
            ]
        return None, answers, [[[score] for score in row] for row in scores], None


def by_row(model: Any, prompt: list[int], written: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + written])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(written) - 1)
    return [float(logits[p, token]) for p, token in zip(places, written, strict=True)]


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_vllm_is_given_the_merged_weights_before_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    monkeypatch.setattr(grpo, "find_spec", lambda name: name)
    monkeypatch.setattr(Engine, "pushes", 0)
    differences: list[float] = []
    generate = RewardTrainer._generate_and_score_completions

    def noted(self: RewardTrainer, inputs: Any) -> Any:
        found = generate(self, inputs)
        differences.append(self.measured["sampling/sampling_logp_difference/max"][-1])
        return found

    monkeypatch.setattr(RewardTrainer, "_generate_and_score_completions", noted)
    config = make_grpo(
        tmp_path, generation="vllm", max_steps=4, storage=storage, dtype="float32",
        evaluate=False, log_every=1, dropout=0.0,
    )  # fmt: skip
    train(config)
    assert Engine.pushes == len(differences) == 4
    assert max(differences) < 1e-3
    assert losses_of(config.output)[-1].get("kl", 1) > 0


def test_an_adapter_that_cannot_merge_is_refused_for_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grpo, "find_spec", lambda name: name)
    with pytest.raises(MergeError, match="cannot merge"):
        train(make_grpo(tmp_path, generation="vllm", method="prefix", tokens=4))
