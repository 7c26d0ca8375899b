"""Vision-language models for the plan's table: their shapes, and a row with images for each."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""The language part: the shape of the table's other cases."""
IMAGE, START, END, VIDEO = 31_000, 31_001, 31_002, 31_003
SIDE, PATCH = 336, 14
IMAGES, WORDS = 2, 128
"""Images in the row, and tokens of text behind them, of which three quarters train."""


def image_shape(family: str, dtype: str) -> Any:
    """Return the configuration of a vision-language model whose tower has 8 blocks."""
    from transformers import LlavaConfig, Qwen2_5_VLConfig

    if family == "llava":
        return LlavaConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 8,
                "num_attention_heads": 16,
                "image_size": SIDE,
                "patch_size": PATCH,
            },
            text_config={**TEXT, "model_type": "llama"},
            image_token_id=IMAGE,
            image_seq_length=(SIDE // PATCH) ** 2,
            tie_word_embeddings=True,
            dtype=dtype,
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 8,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "fullatt_block_indexes": [3, 7],
        },
        text_config={**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def image_batch(family: str, dtype: str) -> dict[str, Any]:
    """Return one row with images before its words, as the family's processor gives it."""
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    side = SIDE // PATCH
    if family == "llava":
        tokens, start, end = side**2, [], []
        seen = {"pixel_values": torch.rand(IMAGES, 3, SIDE, SIDE, dtype=kind)}
    else:
        tokens, start, end = side**2 // 4, [START], [END]
        seen = {
            "pixel_values": torch.rand(IMAGES * side**2, 3 * 2 * PATCH**2, dtype=kind),
            "image_grid_thw": torch.tensor([[1, side, side]] * IMAGES),
        }
    image = [*start, *[IMAGE] * tokens, *end]
    ids = torch.tensor([[*image * IMAGES, *range(100, 100 + WORDS)]])
    if family != "llava":
        seen["mm_token_type_ids"] = (ids == IMAGE).long()
    labels = ids.clone()
    labels[:, : ids.shape[1] - WORDS * 3 // 4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), **seen}
