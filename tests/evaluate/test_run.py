from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from inlay.errors import DataError, ModelError
from inlay.evaluate.losses import logits_at
from inlay.evaluate.samples import choose_samples
from inlay.evaluate.supervised import compare, evaluate, generate, losses
from inlay.methods.base import Params, PromptMethod
from inlay.methods.lora import LoRA
from inlay.model.adapters.attach import attach, use

torch.set_num_threads(1)
WORDS = 97
END, PAD = 0, 1


@dataclass
class Row:
    input_ids: list[int]
    trained: list[bool]


@dataclass
class Rows:
    rows: list[dict[str, Any]]
    lines: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.lines = self.lines or list(range(1, len(self.rows) + 1))


@dataclass(frozen=True, kw_only=True)
class KeysValues(PromptMethod):
    """Random keys and values before every sequence."""

    name: ClassVar[str] = "random-prefix"
    tokens: int = 3

    def init(self, model: nn.Module, seed: torch.Generator) -> Params:
        config = model.config
        width = config.hidden_size // config.num_attention_heads
        shape = (2, config.num_hidden_layers, 1, config.num_key_value_heads, self.tokens, width)
        return Params({"kv": torch.randn(shape, generator=seed) * 3})

    def keys_values(self, p: Params, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return list(zip(p.kv[0], p.kv[1], strict=True))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<end>": END, "<pad>": PAD} | {f"w{i}": i for i in range(2, WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny()).eval()


def tiny(**changes: Any) -> LlamaConfig:
    small: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**small | changes)


def some_rows(count: int = 9) -> list[Row]:
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 25, (count,), generator=drawn).tolist()
    ids = [torch.randint(2, WORDS, (n,), generator=drawn).tolist() for n in lengths]
    return [Row(i, [k >= len(i) // 2 for k in range(len(i))]) for i in ids]


def some_prompts() -> list[list[int]]:
    return [row.input_ids for row in some_rows()]


def with_records(encoded: list[Row]) -> Rows:
    texts = [[f"w{i}" for i in row.input_ids] for row in encoded]
    return Rows(
        [
            {"prompt": " ".join(t[: len(t) // 2]), "completion": " ".join(t[len(t) // 2 :])}
            for t in texts
        ],
        lines=[10 * i + 3 for i in range(len(encoded))],
    )


def trained_lora(model: nn.Module) -> nn.Module:
    """A LoRA adapter that changes what the model does."""
    attach(model, LoRA(rank=4), targets="all-linear")
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def their_loss(model: nn.Module, row: Row) -> float:
    labels = [i if t else -100 for i, t in zip(row.input_ids, row.trained, strict=True)]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels]))
    return float(out.loss)


def test_the_loss_is_transformers_own(model: LlamaForCausalLM):
    for row in some_rows():
        assert losses(model, [row])[0].per_token == pytest.approx(their_loss(model, row), rel=1e-5)


def test_every_token_but_the_first_is_measured_where_all_are_trained(model: LlamaForCausalLM):
    row = Row([5, 6, 7, 8], [True] * 4)
    found = losses(model, [row])[0]
    assert found.tokens == 3
    assert found.per_token == pytest.approx(their_loss(model, row), rel=1e-5)


def test_logits_of_a_batch_fit_their_room(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row([5 + i] * 12, [i % 2 == 0 or j > 6 for j in range(12)]) for i in range(6)]
    whole = losses(model, rows, 6)
    held: list[int] = []

    def recorded(*call: Any) -> Tensor:
        logits = logits_at(*call)
        held.append(len(logits))
        return logits

    monkeypatch.setattr("inlay.evaluate.losses.logits_at", recorded)
    monkeypatch.setattr("inlay.kernels.loss.LOGIT_BYTES", 20 * 4 * WORDS)
    found = losses(model, rows, 6)
    assert sum(held) == sum(row.tokens for row in whole)
    assert max(held) <= 20
    assert [r.nll for r in found] == pytest.approx([r.nll for r in whole], rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "prompt"])
def test_losses_do_not_depend_on_the_batch(model: nn.Module, kind: str):
    if kind == "gpt2":
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, initializer_range=0.3, **sizes))
    if kind == "prompt":
        attach(model, KeysValues())
    rows = some_rows()
    together, alone = losses(model, rows, 4), losses(model, rows, 1)
    assert [r.tokens for r in together] == [sum(row.trained[1:]) for row in rows]
    assert [r.nll for r in together] == pytest.approx([r.nll for r in alone], rel=1e-5)


def test_a_model_that_gives_every_logit_is_measured_too(model: LlamaForCausalLM):
    class Plain(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    rows = some_rows()
    plain = [r.nll for r in losses(Plain(model), rows, 4)]
    assert plain == pytest.approx([r.nll for r in losses(model, rows, 4)], rel=1e-6)


def test_only_the_logits_of_trained_positions_are_made(model: LlamaForCausalLM):
    made: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: made.append(out.shape[1]))
    losses(model, [Row([5] * 30, [False] * 28 + [True] * 2)])
    assert made == [2]


def test_no_rows_have_no_losses(model: LlamaForCausalLM):
    assert losses(model, []) == []


def test_the_models_mode_is_what_it_was(model: LlamaForCausalLM):
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    losses(model, some_rows())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(DataError):
        losses(model, [Row([4, 5], [False, False])])
    assert [m.training for m in model.modules()] == before


def test_dropout_is_off_while_measuring(model: LlamaForCausalLM):
    attach(model, LoRA(rank=4, dropout=0.5), targets="all-linear")
    model.train()
    assert losses(model, some_rows()) == losses(model, some_rows())


def test_a_loss_that_is_not_finite_names_its_line(model: LlamaForCausalLM):
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.nan
    rows = [Row([4, 5, 6], [True] * 3), Row([4, 50, 6], [True] * 3)]
    with pytest.raises(ModelError, match="a loss of nan on the row of line 17"):
        losses(model, rows, lines=[12, 17])


@pytest.mark.parametrize("trained", [[False] * 3, [True, False, False]])
def test_a_row_without_a_token_to_measure_names_its_line(
    model: LlamaForCausalLM, trained: list[bool]
):
    with pytest.raises(DataError, match="line 8 has no token to measure"):
        losses(model, [Row([4, 5, 6], trained)], lines=[8])


@pytest.mark.parametrize("method", [None, "prompt", "lora"])
def test_generation_does_not_depend_on_the_batch(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, method: str | None
):
    if method == "prompt":
        attach(model, KeysValues())
    if method == "lora":
        trained_lora(model)
    together = generate(model, tokenizer, some_prompts(), max_new_tokens=12, batch_size=4)
    alone = [generate(model, tokenizer, [p], max_new_tokens=12)[0] for p in some_prompts()]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("prompted", [False, True])
def test_generation_is_the_likeliest_token_each_time(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompted: bool
):
    if prompted:
        attach(model, KeysValues())
    model.generation_config.update(do_sample=True, temperature=0.5, repetition_penalty=3.0)
    prompt = some_prompts()[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == END:
                break
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert generate(model, tokenizer, [prompt], max_new_tokens=10) == [expected]


def test_a_prompt_adapter_changes_the_text(model: nn.Module, tokenizer: PreTrainedTokenizerFast):
    plain = generate(model, tokenizer, some_prompts(), max_new_tokens=8)
    attach(model, KeysValues())
    assert generate(model, tokenizer, some_prompts(), max_new_tokens=8) != plain


def test_generation_stops_at_any_end_of_sequence(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    prompt = some_prompts()[0]
    free = generate(model, tokenizer, [prompt], max_new_tokens=12)[0].split()
    stop = free[4]
    model.generation_config.eos_token_id = [END, int(stop[1:])]
    cut = generate(model, tokenizer, [prompt], max_new_tokens=12)[0].split()
    assert cut == free[: free.index(stop)]


def test_text_and_tokens_are_the_same_prompt(model: nn.Module, tokenizer: PreTrainedTokenizerFast):
    assert generate(model, tokenizer, ["w5 w6"], 6) == generate(model, tokenizer, [[5, 6]], 6)


def test_generation_stops_where_the_context_is_full_and_cuts_no_other_row(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[END] = 0
        model.lm_head.weight[PAD] = 0
    long, short = [7] * 60, [9] * 5
    found = generate(model, tokenizer, [long, short], max_new_tokens=20)
    assert [len(text.split()) for text in found] == [4, 20]
    attach(model, KeysValues())
    assert len(generate(model, tokenizer, [long], max_new_tokens=20)[0].split()) == 1


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt 2 is empty"), ([5] * 64, "no room to generate")]
)
def test_a_prompt_that_cannot_be_continued_is_refused(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: list[int], message: str
):
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, [[5], prompt])


def test_a_model_that_cannot_generate_says_so(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ModelError, match="a Linear cannot generate text"):
        generate(nn.Linear(2, 2), tokenizer, [[5]])


def test_base_and_tuned_are_each_measured_on_the_same_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    encoded = some_rows()
    rows = with_records(encoded)
    base_alone = evaluate(model, tokenizer, rows, encoded, generate_rows=9, max_new_tokens=8)
    trained_lora(model)
    comparison = compare(model, tokenizer, rows, encoded, generate_rows=9, max_new_tokens=8)
    tuned_alone = evaluate(model, tokenizer, rows, encoded, generate_rows=9, max_new_tokens=8)
    assert comparison.base == base_alone
    assert comparison.tuned == tuned_alone
    assert base_alone.losses != tuned_alone.losses
    assert base_alone.texts != tuned_alone.texts


def test_the_record_holds_what_was_measured(model: nn.Module, tokenizer: PreTrainedTokenizerFast):
    encoded = some_rows()
    trained_lora(model)
    comparison = compare(
        model, tokenizer, with_records(encoded), encoded, generate_rows=4, max_new_tokens=6
    )
    record = comparison.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["rows"], record["generated_rows"]) == (9, 4)
    names = [m["name"] for m in record["metrics"]]
    assert names == ["loss", "perplexity", "exact_match", "token_f1", "rouge_l"]
    loss, perplexity = record["metrics"][:2]
    nll = sum(r.nll for r in comparison.tuned.losses)
    assert loss["tuned"]["value"] == pytest.approx(nll / record["tokens"])
    assert loss["tuned"]["low"] < loss["tuned"]["value"] < loss["tuned"]["high"]
    change = loss["tuned"]["value"] - loss["base"]["value"]
    assert loss["difference"]["value"] == pytest.approx(change)
    for bound in ("value", "low", "high"):
        assert perplexity["base"][bound] == pytest.approx(math.exp(loss["base"][bound]))
    example = record["examples"][0]
    assert example["line"] == 3
    assert f"{example['prompt']} {example['reference']}" == " ".join(
        f"w{i}" for i in encoded[0].input_ids
    )
    assert (example["base"], example["tuned"]) == (
        comparison.base.texts[0],
        comparison.tuned.texts[0],
    )
    assert [s.line for s in comparison.samples] == [3, 33, 53, 83]


def test_a_model_is_no_different_from_itself(model: nn.Module, tokenizer: PreTrainedTokenizerFast):
    encoded = some_rows()
    attach(model, LoRA(rank=4), targets="all-linear")
    record = compare(model, tokenizer, with_records(encoded), encoded, max_new_tokens=4).to_dict()
    assert {m["p_value"] for m in record["metrics"]} == {1.0}
    assert {m["difference"]["value"] for m in record["metrics"]} == {0.0}


def test_the_last_answer_of_a_conversation_is_the_reference(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    trained = [False, True, True, False, False, True, True]
    encoded = [Row([5, 6, 7, 8, 9, 10, 0], trained)] * 2
    turns = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w10 w11 w12"}]
    comparison = compare(
        trained_lora(model), tokenizer, Rows([{"messages": turns}] * 2), encoded, max_new_tokens=3
    )
    assert comparison.samples[0].prompt == (5, 6, 7, 8, 9)
    assert comparison.samples[0].reference == "w10 w11 w12"


@pytest.mark.parametrize(
    ("roles", "reference"),
    [("uaua", "w4"), ("uau", "w2"), ("uauaua", "w4")],  # the last: its third answer is cut off
)
def test_the_reference_is_the_answer_that_is_left(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, roles: str, reference: str
):
    trained = [False, True, True, False, False, True, True][: 3 + 4 * (len(roles) > 3)]
    encoded = [Row([5, 6, 7, 8, 9, 10, 0][: len(trained)], trained)]
    names = {"u": "user", "a": "assistant"}
    turns = [{"role": names[role], "content": f"w{i}"} for i, role in enumerate(roles, start=1)]
    found = evaluate(model, tokenizer, Rows([{"messages": turns}]), encoded, max_new_tokens=3)
    assert found.scores["exact_match"] == (float(found.texts[0] == reference),)
    (sample,) = choose_samples(Rows([{"messages": turns}]), encoded, 1)
    assert sample.reference == reference


def test_a_prompt_that_fills_the_context_has_a_loss_and_no_answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    lengths = (63, 64, 5)
    encoded = [Row([7] * n + [8], [False] * n + [True]) for n in lengths]
    rows = Rows([{"prompt": "w7", "completion": "w8"}] * len(lengths))
    record = compare(trained_lora(model), tokenizer, rows, encoded, max_new_tokens=2).to_dict()
    assert (record["rows"], record["generated_rows"]) == (3, 2)
    assert [each["line"] for each in record["examples"]] == [1, 3]


def test_plain_text_has_a_loss_and_nothing_to_generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    encoded = [Row([5, 6, 7], [False, True, True]), Row([8, 9], [False, True])]
    rows = Rows([{"text": "w6 w7"}, {"text": "w9"}])
    record = compare(trained_lora(model), tokenizer, rows, encoded).to_dict()
    assert [m["name"] for m in record["metrics"]] == ["loss", "perplexity"]
    assert (record["generated_rows"], record["examples"]) == (0, [])


def test_an_overflowing_perplexity_is_null_in_the_record(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    attach(model, LoRA(rank=2), targets="all-linear")
    rows = Rows([{"text": "w6 w7"}, {"text": "w9"}])
    encoded = [Row([5, 6, 7], [False, True, True]), Row([8, 9], [False, True])]
    loss, perplexity = compare(model, tokenizer, rows, encoded).to_dict()["metrics"]
    assert loss["base"]["value"] > 710
    assert perplexity["base"]["value"] is perplexity["difference"]["value"] is None


@pytest.mark.parametrize("encoded", [[], [Row([5, 6], [False, True])]])
def test_rows_and_tokens_must_be_the_same_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, encoded: list[Row]
):
    with pytest.raises(DataError, match="expected the same number, at least one"):
        evaluate(model, tokenizer, Rows([{"text": "w6"}] * 2), encoded)


def test_progress_counts_the_rows_of_each_stage(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    encoded, seen = some_rows(), []
    compare(
        trained_lora(model),
        tokenizer,
        with_records(encoded),
        encoded,
        generate_rows=4,
        max_new_tokens=2,
        on_progress=lambda *report: seen.append(report),
    )
    last = {what: (done, total) for what, done, total in seen}
    assert last == {
        "tuned: held-out loss": (9, 9),
        "tuned: generating": (4, 4),
        "base: held-out loss": (9, 9),
        "base: generating": (4, 4),
    }


def test_comparing_leaves_the_adapters_as_they_were(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast
):
    encoded = some_rows()
    trained_lora(model)
    attach(model, LoRA(rank=2), targets="all-linear", name="b")
    use(model, "b")
    before = losses(model, encoded)
    record = compare(model, tokenizer, with_records(encoded), encoded, generate_rows=0).to_dict()
    assert losses(model, encoded) == before
    assert record["metrics"][0]["difference"]["value"] == 0.0  # b is untrained: the base
