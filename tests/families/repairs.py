"""What the shrinker cannot know of some model types: the fields that must fit one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
"""Configurations that leave their kinds of layers open."""
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}

REQUIRED: dict[str, dict[str, Any]] = {"gemma4_assistant": {}}
"""Arguments without which a configuration cannot be made at all."""

REPAIRS: dict[str, Mapping[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "canine": {"num_hash_buckets": 64, "num_hash_functions": 4},
    "cohere_compass_text": TWO_KINDS | {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "cvt": {
        "drop_path_rate": (0.0, 0.0, 0.0), "embed_dim": (16, 32, 64), "num_heads": (1, 2, 4),
        "depth": (1, 1, 2),
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "donut-swin": {"window_size": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"num_key_value_heads": 4},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_hidden_layers": 2,
    },
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 32},
    "mobilebert": {"intra_bottleneck_size": 64},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "swin": {"window_size": 2},
    "swinv2": {"window_size": 2},
    "wav2vec2-bert": {"vocab_size": 128},
    "wav2vec2-conformer": {"vocab_size": 128},
    "xlstm": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 32, "attention_hidden_size": 128,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 32},
}  # fmt: skip

OF_CLASS: dict[str, dict[str, Any]] = {
    "ReformerForMaskedLM": {"is_decoder": False},
    "ReformerForSequenceClassification": {"is_decoder": False},
}
"""What only some classes of a type need."""
