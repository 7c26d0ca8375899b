"""A prompt is seen once by every token that is generated, however generation keeps its text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import inlay
from inlay.errors import AdapterError
from inlay.model.adapters.registry import adapter_places
from inlay.model.seams.transformers import cache_argument, cache_in

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    ),
    "bloom": lambda: BloomForCausalLM(  # takes no positions
        BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    ),
}
METHODS = [inlay.PrefixTuning(tokens=3), inlay.PromptTuning(tokens=3), inlay.PTuning(tokens=3)]
IDS = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1))
ALL = torch.ones_like(IDS)
PADDED = ALL - (torch.arange(6) < torch.tensor([[0], [2]])).long()
NEW = 5


def built(name: str, method: Any) -> Any:
    return prompted(MODELS[name], method)


def prompted(make: Callable[[], Any], method: Any) -> Any:
    torch.manual_seed(0)
    model = make()
    inlay.attach(model, method)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, params in adapter_places(model, "default"):
            for tensor in params.parameters():
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator))
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
    return model


def cache_of(output: Any) -> Any:
    return cache_in(output.values())


def over(cache: Any) -> dict[str, Any]:
    """A call's argument for a cache, by the name that this transformers has for it."""
    name = cache_argument(LlamaForCausalLM.forward)
    assert name is not None
    return {name: cache}


def one_by_one(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """Return a text that goes on by the most probable tokens, each from the text alone."""
    takes_positions = not isinstance(model, BloomForCausalLM)
    model.eval()
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        more = {"position_ids": positions} if takes_positions else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", [ALL, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", MODELS)
def test_text_without_a_cache_is_that_with_one(
    name: str, method: Any, mask: Tensor, training: bool
) -> None:
    model = built(name, method)
    wanted = one_by_one(model, IDS, mask, NEW)
    model.train(training)
    for use_cache in (False, True):
        call = {"input_ids": IDS, "attention_mask": mask, "use_cache": use_cache}
        assert torch.equal(model.generate(**call, max_new_tokens=NEW), wanted)


def test_a_call_that_asks_for_no_cache_gets_none() -> None:
    model = built("llama", METHODS[1])
    assert cache_of(model(input_ids=IDS, use_cache=False)) is None
    cached = cache_of(model(input_ids=IDS, use_cache=True))
    assert cached.get_seq_length() == IDS.shape[1]
    model.config.use_cache = False
    assert cache_of(model(input_ids=IDS)) is None
    found = model(input_ids=IDS, return_dict=False)
    assert [type(value) for value in found] == [Tensor]


@pytest.mark.parametrize("mask", [ALL, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", MODELS)
def test_a_later_turn_goes_on_from_the_cache_of_an_earlier_one(
    name: str, method: Any, mask: Tensor
) -> None:
    model = built(name, method).eval()
    call = {"input_ids": IDS, "attention_mask": mask, "return_dict_in_generate": True}
    first = model.generate(**call, max_new_tokens=NEW)
    held = cache_of(first)
    cache = copy.deepcopy(held)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    text = torch.cat([first.sequences, IDS.flip(1)], 1)
    whole = torch.cat([mask, mask.new_ones(2, text.shape[1] - mask.shape[1])], 1)
    wanted = one_by_one(model, text, whole, NEW)
    for each in (held, cache):
        found = model.generate(
            input_ids=text, attention_mask=whole, max_new_tokens=NEW, **over(each)
        )
        assert torch.equal(found, wanted)


def test_a_cache_of_fixed_size_has_no_room_for_a_prompt() -> None:
    model = built("llama", METHODS[1]).eval()
    with pytest.raises(AdapterError, match="StaticCache has room for the text alone"):
        model.generate(input_ids=IDS, cache_implementation="static", max_new_tokens=NEW)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(AdapterError, match="leave cache_implementation out"):
        model(input_ids=IDS, **over(cache))


def test_text_between_a_cache_and_a_call_is_missed() -> None:
    model = built("llama", METHODS[1]).eval()
    cache = cache_of(model(input_ids=IDS, use_cache=True))
    mask = torch.ones(2, 10, dtype=torch.long)
    with pytest.raises(AdapterError, match=r"holds 6 tokens .* the call brings 2, expected 4"):
        model(input_ids=IDS[:, :2], attention_mask=mask, **over(cache))
    assert cache.get_seq_length() == 6
    model(input_ids=IDS[:, :4], attention_mask=mask, **over(cache))


def test_a_mask_for_each_layer_is_refused() -> None:
    model = built("llama", METHODS[1]).eval()
    with pytest.raises(AdapterError, match="attention_mask is dict, and a prompt needs"):
        model(input_ids=IDS, attention_mask={"full_attention": None})


def bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.3,
        dropout=0.0, max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_an_encoder_decoder_generates_without_a_cache(method: Any) -> None:
    model = prompted(bart, method)
    call = {"input_ids": IDS, "attention_mask": PADDED, "max_new_tokens": NEW}
    call |= {"return_dict_in_generate": True, "output_logits": True}
    found, wanted = (model.generate(**call, use_cache=cached).logits for cached in (False, True))
    assert len(found) == NEW
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_prefix_of_an_encoder_decoder_is_in_the_cache_from_the_first_call() -> None:
    model = prompted(bart, METHODS[0]).eval()
    with inlay.disabled(model):
        plain = cache_of(model(input_ids=IDS, decoder_input_ids=IDS, use_cache=True))
    with pytest.raises(AdapterError, match="behind no prompt, and the prompt 'default' acts now"):
        model(input_ids=IDS, decoder_input_ids=IDS, **over(plain))


def test_a_cache_is_that_of_the_prompt_that_acts() -> None:
    model = built("llama", METHODS[1]).eval()
    with inlay.disabled(model):
        plain = cache_of(model(input_ids=IDS, use_cache=True))
        again = cache_of(model(input_ids=IDS[:, :2], **over(plain)))
    assert again.get_seq_length() == 8
    with pytest.raises(AdapterError, match="behind no prompt, and the prompt 'default' acts now"):
        model(input_ids=IDS, **over(plain))
    prompted = cache_of(model(input_ids=IDS, use_cache=True))
    with (
        inlay.disabled(model),
        pytest.raises(AdapterError, match="behind the prompt 'default', and no prompt acts now"),
    ):
        model(input_ids=IDS, **over(prompted))
    inlay.use(inlay.attach(model, inlay.PromptTuning(tokens=3), name="other"), "other")
    with pytest.raises(AdapterError, match="behind the prompt 'default', and the prompt 'other'"):
        model(input_ids=IDS, **over(prompted))
    inlay.use(model, "default")
    assert model(input_ids=IDS, **over(prompted)).logits.shape[1] == IDS.shape[1]
