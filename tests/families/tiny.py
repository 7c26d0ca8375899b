"""Configurations of transformers, shrunk by what their fields mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from repairs import REPAIRS, REQUIRED
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V = 128
"""Tokens of a vocabulary."""
LENGTH = 128
"""Positions of a text model."""
WIDTH, HEADS, HEAD, INNER, PIXELS = 64, 4, 16, 96, 32
EXACT: dict[str, Any] = {}
"""Fields whose value is this one, whatever else would follow."""
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "cls": 1, "mask": 3, "decoder_start": 0}
"""What a special token's id is where its own lies outside the vocabulary."""
MISSING = {"head_dim": HEAD, "num_key_value_heads": 2, "pad_token_id": 0}
"""Values of fields that are left open, where most classes need one."""
OWN_TOKENS = 100
"""The first id of tokens that stand for images, sounds and the like."""

DERIVED = (
    "transformers_version", "dtype", "architectures", "name_or_path", "id2label", "label2id",
    "ignore_keys_at_rope_validation",
)  # fmt: skip
"""What a configuration makes by itself."""

Rule = Callable[[Any], Any]


def at_most(limit: int) -> Rule:
    """Return what bounds a number, or every number of a list; zeros and less stay."""
    return lambda value: each(value, lambda v: min(v, limit))


def exactly(size: int) -> Rule:
    """Return what sets a number above zero, or every number of a list."""
    return lambda value: each(value, lambda v: size if v > 0 else v)


def each(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(each(v, change) for v in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def fewer_wide(value: Any) -> Any:
    """Widths of stages keep their order: an eighth, in steps of 16."""
    return each(value, lambda v: max(16, min(64, v // 8 // 16 * 16)) if v > 16 else v)


def kv_heads(value: Any) -> Any:
    return each(value, lambda v: 1 if v == 1 else 2)


RULES: tuple[tuple[str, Rule], ...] = (
    (r".*vocab_size(_per_layer_input|_base)?|vocab_sizes?", lambda v: V),
    (r"(num_)?(embed_dims|hidden_sizes|stage_\w*channels|neck_hidden_sizes|conv_dim|tdnn_dim)"
     r"|out_channels|decoder_hidden_sizes|base_attn_unit_dims|output_channels", fewer_wide),
    (r"depths|block_repeats|stage_num_blocks|stage_numb_of_layers|n_attn_blocks", at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|num_hidden_groups", at_most(1)),
    (r"num_nextn_predict_layers|num_mtp_layers", at_most(0)),
    (r"(num_|n_)?(\w*_)?layers?|depth|n_layers?|num_encoder_blocks|resampler_depth", at_most(2)),
    (r"(num_|n_|moe_)*(routed_|local_)?experts|moe_num_experts|zero_expert_num", at_most(4)),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k|num_selected\w*", at_most(2)),
    (r"n_group|topk_group|num_expert_group|n_groups|\w*ngroups|mamba_n_groups", at_most(1)),
    (r"\w*shared_experts?", at_most(1)),
    (r"(\w*_)?(kv|key_value)_heads|num_kv_heads|num_query_groups|num_global_key_value_heads",
     kv_heads),
    (r"(num_|n_)?(\w*_)?heads(_per_layer)?|n_head", exactly(HEADS)),
    (r"qk_rope_head_dim|rotary_dim|indexer_rope_head_dim", at_most(8)),
    (r"qk_head_dim", exactly(24)),
    (r"mamba_(d_head|head_dim)|mamba_headdim", exactly(2 * WIDTH // HEADS)),
    (r"mamba_d_ssm", exactly(2 * WIDTH)),
    (r"(\w*_)?head_(dim|size)|d_kv|kv_channels|(\w*_)?d_head|dim_head|key_dim|\w*headdim"
     r"|attention_head_dim|global_head_dim", exactly(HEAD)),
    (r"q_lora_rank", at_most(24)),
    (r"\w*(lora_rank|_rank|lowrank)", at_most(16)),
    (r"moe_\w*intermediate\w*|expert\w*(hidden|intermediate|ffn)\w*|shared_\w*intermediate\w*"
     r"|moe_hidden_size", at_most(32)),
    (r"(\w*_)?(intermediate|ffn|inner|feed_forward)\w*(size|dim)?\w*|d_ff|dff|dim_ff|mlp_dim"
     r"|d_inner|n_inner|decoder_ffn_dim|alignment_intermediate_size", at_most(INNER)),
    (r"sliding_window(_size)?|window_size|local_attention|attention_window(_size)?"
     r"|attention_chunk_size|index_topk", at_most(8)),
    (r"(\w*_)?max_(\w*_)?(position(s|_embeddings)|seq_len(gth)?)|n_positions|n_ctx|seq_length"
     r"|context_length|max_seq_len|seq_len|model_max_length|num_position_embeddings",
     lambda v: each(v, lambda n: min(n, LENGTH + (2 if n % 8 == 2 else 0)))),
    (r"image_size|img_size|input_size|resolution|max_image_size|crop_size", at_most(PIXELS)),
    (r"patch_size", at_most(8)),
    (r"(\w*_)?(hidden|embed|embedding|projection|projector|proj|output|word_embed_proj|emb|pooler"
     r"|out_hidden|model|state|conv)_?(\w*)(size|dim)|d_model|n_embd|dim|hidden_dim|embed_dim"
     r"|lru_width|projection_dim|\w*_dim|\w*hidden_size\w*|num_filters|\w*channels"
     r"|attention_hidden_size|latent_channels", at_most(WIDTH)),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel", at_most(16)),
    (r"num_conv_pos_embeddings", at_most(8)),
    (r"num_conv_pos_embedding_groups|groups_width|\w*groups", at_most(2)),
    (r"mask_(time|feature)_length|mask_(time|feature)_min_masks", at_most(1)),
    (r"chunk_size|\w*_chunk_size|block_size", at_most(8)),
    (r"num_query_tokens|\w*num_latents|resampler_n_latents|prompt_length|latent_query_num",
     at_most(4)),
)  # fmt: skip
"""What a field's name means for its size; the first that fits the whole name counts."""
COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)
KEPT = re.compile(
    r"\w*(sampling_rate|stride|kernel|ratio|scale|index|indices|indexes|num_labels)\w*"
    r"|num_feat_extract_layers|num_channels|image_channels|in_channels"
)


def tiny(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a small configuration of a model type."""
    cls = CONFIG_MAPPING[model_type]
    tokens: dict[str, int] = {}
    found = shrunk(cls, cls(**REQUIRED.get(model_type, {})), tokens, **changes)
    if found.is_encoder_decoder and getattr(found, "decoder_start_token_id", None) is None:
        found.decoder_start_token_id = SPECIAL["decoder_start"]
    return found


def shrunk(
    cls: type[PreTrainedConfig], default: PreTrainedConfig, tokens: dict[str, int], **changes: Any
) -> PreTrainedConfig:
    """Return a configuration of this class with the default's kinds of layers, but small."""
    known = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    fields = {k: v for k, v in vars(default).items() if k in known and k not in DERIVED}
    small = {name: field(name, value, tokens) for name, value in fields.items()}
    small |= layers(fields, small)
    small |= same_heads(fields)
    small |= dropouts(fields)
    small |= {n: v for n, v in MISSING.items() if n in fields and fields[n] is None}
    small |= {k: v for k, v in EXACT.items() if k in fields}
    repair = REPAIRS.get(cls.model_type, {})
    small |= repair
    small |= changes
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = rope(small["rope_parameters"], small)
    return cls(**small)


def field(name: str, value: Any, tokens: dict[str, int]) -> Any:
    """Return the small value of one field."""
    if isinstance(value, PreTrainedConfig):
        return shrunk(type(value), value, tokens).to_dict()
    if re.fullmatch(
        r"\w*(token|pad|bos|eos|eod)_(id|index)s?|\w*_token_ids|mask_index|unk_index", name
    ):
        return token(name, value, tokens)
    if isinstance(value, bool | str) or value is None or KEPT.fullmatch(name):
        return value
    for pattern, rule in COMPILED:
        if pattern.fullmatch(name):
            return rule(value)
    return value


def token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    """Return an id inside the vocabulary, the same for the same name everywhere."""
    if isinstance(value, list | tuple):
        return type(value)(token(f"{name}{i}", v, tokens) for i, v in enumerate(value))
    if not isinstance(value, int) or value < min(OWN_TOKENS // 10, V):
        return value
    stem = re.sub(r"_(index|id)$", "", name).removesuffix("_token")
    if stem in SPECIAL:
        return SPECIAL[stem]
    return tokens.setdefault(stem, OWN_TOKENS + len(tokens))


def same_heads(fields: dict[str, Any]) -> dict[str, int]:
    """Return as many key/value heads as heads, where the default has as many."""
    heads = fields.get("num_attention_heads")
    alike = isinstance(heads, int) and fields.get("num_key_value_heads") == heads
    return {"num_key_value_heads": HEADS} if alike else {}


def dropouts(fields: dict[str, Any]) -> dict[str, Any]:
    """Return zeros for everything random, so that values can be compared."""
    random = re.compile(
        r"\w*(drop|dropout|pdrop|layerdrop|jitter|mask_time_prob|mask_feature_prob)\w*"
    )
    return {
        name: each_float(value)
        for name, value in fields.items()
        if random.fullmatch(name) and not isinstance(value, bool)
    }


def each_float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(each_float(v) for v in value)
    return 0.0 if isinstance(value, float) else 0 if isinstance(value, int) else value


def layers(fields: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Return fewer layers, one of each kind that the lists with an entry a layer know."""
    count_name = next(
        (n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") if n in fields), None
    )
    if count_name is None or not isinstance(fields[count_name], int):
        return {}
    count = fields[count_name]
    lists = {
        n: v for n, v in fields.items()
        if isinstance(v, list | tuple) and len(v) == count and n not in ("conv_dim",)
    }  # fmt: skip
    kinds = [repr(kind) for kind in zip(*lists.values(), strict=True)] if lists else []
    first: dict[str, int] = {}
    for i, kind in enumerate(kinds):
        first.setdefault(kind, i)
    chosen = sorted(first.values())[:4]
    while 0 < len(chosen) < min(2, count):
        chosen.append(chosen[-1])
    taken = {n: type(v)(small[n][i] for i in chosen) for n, v in lists.items()}
    return taken | ({count_name: len(chosen)} if chosen else {})


def rope(parameters: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return rotary parameters whose lists fit a small head."""
    if any(isinstance(v, dict) for v in parameters.values()):
        return {k: rope(v, fields) if isinstance(v, dict) else v for k, v in parameters.items()}
    found = dict(parameters)
    width = fields.get("head_dim") or WIDTH // HEADS
    half = int(width * (found.get("partial_rotary_factor") or 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if name in found:
            found[name] = list(found[name])[:half]
    if "mrope_section" in found:
        found["mrope_section"] = sections(found["mrope_section"], half)
    return found


def sections(old: Sequence[int], whole: int) -> list[int]:
    """Return as many sections, of this sum."""
    part = max(1, whole // len(old))
    return [whole - part * (len(old) - 1), *[part] * (len(old) - 1)]
