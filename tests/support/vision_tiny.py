"""Tiny models that see images, one of each family, random and with all their folder needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from train_tiny import losses_of
from transformers import (
    BaseImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from inlay.data.image_inputs import ImageInputs
from inlay.data.tokens import Encoded
from inlay.run.config import RunConfig
from inlay.tasks.config import load_config
from inlay.train.collate import Padded, WithImages, labels
from inlay.train.output.events import Event
from inlay.train.run import TrainResult, train

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
IMAGE = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<start_of_image>",
}
"""What the chat template of each family writes for an image."""
FAMILIES = tuple(IMAGE)
OF_IDEFICS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)),
)  # fmt: skip
SPECIAL = {
    "llava": ("<image>",),
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "idefics3": OF_IDEFICS,
    "smolvlm": OF_IDEFICS,
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
}
SIDE, PATCH, WIDTH = 8, 2, 64
"""Pixels of an image's side and of a patch's, and the width of both parts."""
SPREAD = WIDTH**-0.5
"""Of random weights: what keeps the size of what goes through, so that a frozen head can answer."""


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the family's own tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [PAD, END, USER, ASSISTANT, *SPECIAL[family]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["Which digit is this?"] * 2,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet),
    )
    named = {}
    if family == "gemma3":
        names = ("image_token", "boi_token", "eoi_token")
        named = {"extra_special_tokens": dict(zip(names, SPECIAL[family], strict=True))}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=END, padding_side="right", **named
    )


def template_of(family: str) -> str:
    """Return a chat template in which messages are lists of images and text."""
    return (
        "{% for message in messages %}"
        "{{ '" + USER + "' if message['role'] == 'user' else '" + ASSISTANT + "' }}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + IMAGE[family] + "{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}" + END + "{% endfor %}"
        "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
    )


@dataclass(frozen=True)
class Tiny:
    """A model's configuration and class, and the parts of its processor."""

    config: Any
    model: type[PreTrainedModel]
    images: BaseImageProcessor
    tokenizer: PreTrainedTokenizerFast
    processor: dict[str, Any] = field(default_factory=dict[str, Any])
    """What processor_config.json says."""


def text_config(tokenizer: PreTrainedTokenizerFast, kind: str, **more: Any) -> dict[str, Any]:
    """Return what the language part of every family has in common."""
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": SPREAD,
        **more,
    }


def llava() -> Tiny:
    """Return a Llava: CLIP, a projector of two layers, Llama."""
    tokenizer = tokenizer_of("llava")
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=SPREAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return Tiny(config, LlavaForConditionalGeneration, images, tokenizer, processor)


def qwen(family: str) -> Tiny:
    """Return a Qwen2.5-VL or Qwen3-VL, whose tower ends in a merger of 2 x 2 patches."""
    tokenizer = tokenizer_of(family)
    vision = {
        "depth": 3,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": WIDTH,
        "initializer_range": SPREAD,
    }
    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL[family]))
    tokens = {f"{name}_token_id": number for name, number in zip(names, ids, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    new = family == "qwen3_vl"
    if new:
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    else:
        vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    kind = "qwen3_vl_text" if new else "qwen2_5_vl_text"
    made_as = Qwen3VLConfig if new else Qwen2_5_VLConfig
    text = text_config(tokenizer, kind, rope_parameters=rope)
    config = made_as(vision_config=vision, text_config=text, **tokens)
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE},
    )
    model = Qwen3VLForConditionalGeneration if new else Qwen2_5_VLForConditionalGeneration
    return Tiny(config, model, images, tokenizer)


def idefics(family: str) -> Tiny:
    """Return an Idefics3 or a SmolVLM: SigLIP, pixels shuffled by 2, Llama."""
    tokenizer = tokenizer_of(family)
    small = family == "smolvlm"
    made_as = SmolVLMConfig if small else Idefics3Config
    config = made_as(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": SPREAD,
        },
        text_config=text_config(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    prepares = SmolVLMImageProcessorPil if small else Idefics3ImageProcessorPil
    images = prepares(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
    )
    model = SmolVLMForConditionalGeneration if small else Idefics3ForConditionalGeneration
    return Tiny(config, model, images, tokenizer, {"image_seq_len": 4})


def gemma3() -> Tiny:
    """Return a Gemma 3: SigLIP, averaged to 4 tokens, images seen in both directions."""
    tokenizer = tokenizer_of("gemma3")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL["gemma3"]))
    names = ("image", "boi", "eoi")
    tokens = {f"{name}_token_index": n for name, n in zip(names, ids, strict=True)}
    config = Gemma3Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": SPREAD,
            "vision_use_head": False,
        },
        text_config=text_config(
            tokenizer, "gemma3_text", sliding_window=64, query_pre_attn_scalar=16
        ),
        mm_tokens_per_image=4,
        **tokens,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = {"image_seq_length": 4}
    return Tiny(config, Gemma3ForConditionalGeneration, images, tokenizer, processor)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    "llava": llava,
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "idefics3": lambda: idefics("idefics3"),
    "smolvlm": lambda: idefics("smolvlm"),
    "gemma3": gemma3,
}


def make_vision_model(folder: Path, family: str) -> Path:
    """Save a random model of a family with its processor."""
    return save_tiny(BUILDERS[family](), family, folder)


def save_tiny(tiny: Tiny, family: str, folder: Path) -> Path:
    """Save a random model of these parts with its processor."""
    torch.manual_seed(0)
    model = tiny.model(tiny.config)
    for name, parameter in model.named_parameters():
        if "projection_weight" in name:  # Gemma 3's projector begins at nothing
            torch.nn.init.normal_(parameter, std=SPREAD)
    model.save_pretrained(folder)
    tiny.images.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template_of(family))
    if tiny.processor:
        (folder / "processor_config.json").write_text(json.dumps(tiny.processor))
    return folder


def silence_projector(folder: Path) -> None:
    """Zero a Llava's projector in its folder, so that no gradient passes through it."""
    weights = folder / "model.safetensors"
    held = load_file(weights)
    for name in held:
        if "multi_modal_projector.linear_2.weight" in name:
            held[name] = torch.zeros_like(held[name])
    save_file(held, weights, metadata={"format": "pt"})


QUESTION = "Which digit is this?"


def make_digits(folder: Path, count: int | None = None) -> Path:
    """Write scikit-learn's scans of digits as files, and a row with a question for each."""
    scans = load_digits()
    images = folder / "scans"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        if count is not None and number >= count:
            break
        name = f"scans/{number:04}.png"
        Image.fromarray((scan * 15.9).astype("uint8")).save(folder / name)
        rows.append({"image": name, "prompt": QUESTION, "completion": str(digit)})
    path = folder / "digits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_answers(folder: Path, digits: Path, many: int = 10) -> None:
    """Write preferences and labelled answers about the digits below `many`, of a file's rows.

    Beside the right answer stands a wrong one, which is another of these digits.
    """
    rows = [json.loads(line) for line in digits.read_text().splitlines()]
    pairs: list[dict[str, Any]] = []
    labelled: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        digit = int(row["completion"])
        if digit >= many:
            continue
        wrong = str((digit + 1 + number % (many - 1)) % many)
        asked = {"image": row["image"], "prompt": row["prompt"]}
        pairs.append({**asked, "chosen": str(digit), "rejected": wrong})
        right = number // 2 % 2 == 0
        answer = str(digit) if right else wrong
        labelled.append({**asked, "completion": answer, "label": right})
    for name, found in (("digit_pairs", pairs), ("labelled_digits", labelled)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text)


DATA = {"sft": "digits.jsonl", "kto": "labelled_digits.jsonl"}
"""The file of each task's rows; pairs for the others."""


def make_vision_run(
    folder: Path,
    family: str = "llava",
    output: str = "out",
    count: int = 30,
    many: int = 10,
    **changes: Any,
) -> RunConfig:
    """Return a short run of a family on digits in this folder, those below `many` if judged."""
    if not (folder / family).is_dir():
        make_vision_model(folder / family, family)
    if not (folder / "digits.jsonl").is_file():
        make_answers(folder, make_digits(folder, count), many)
    run: dict[str, Any] = {
        "model": str(folder / family),
        "data": str(folder / DATA.get(changes.get("task", "sft"), "digit_pairs.jsonl")),
        "output": str(folder / output),
        "dropout": 0.1,
        "rank": 4,
        "targets": ["language", "vision", "projector"],
        "learning_rate": 1e-2,
        "epochs": 2.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "log_every": 2,
        "save_every": 4,
        "generate_rows": 2,
        "generate_tokens": 4,
        "threads": 1,
    }
    if family == "gemma3":
        run["targets"] = ["language", "vision"]
    run |= changes
    return load_config(None, {key: value for key, value in run.items() if value is not None})


def notes_of(config: RunConfig) -> tuple[TrainResult, str]:
    """Train; return the run's result and all that it told."""
    told: list[Event] = []
    result = train(config, on_event=told.append)
    return result, "\n".join(str(event.message) for event in told)


def check_kept_features(make: Callable[[str, Any], RunConfig], phrase: str) -> None:
    """Raise unless runs with the tower's output kept and seen anew train the same.

    make: `(output, cache_vision)` -> a run; phrase: what the first of them tells of what it kept.
    """
    runs: dict[str, dict[str, torch.Tensor]] = {}
    losses: list[list[Any]] = []
    for name, wanted in (("kept", "auto"), ("seen", False)):
        config = make(name, wanted)
        _, told = notes_of(config)
        assert (phrase in told) == (name == "kept")
        runs[name] = load_file(Path(config.output) / "adapter/adapter_model.safetensors")
        assert not list(Path(config.output).rglob("*.tmp"))
        losses.append([x.get("loss", x.get("eval_loss")) for x in losses_of(config.output)])
    for key, tensor in runs["seen"].items():
        torch.testing.assert_close(runs["kept"][key], tensor, rtol=1e-3, atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def image_batch(rows: Sequence[Encoded], inputs: ImageInputs, multiple: int) -> dict[str, Any]:
    """Return rows with images as one batch, as a supervised run has it."""
    items = [{"row": n, "input_ids": r.input_ids, "labels": labels(r)} for n, r in enumerate(rows)]

    def seen(numbers: Sequence[int], batch: dict[str, Any]) -> dict[str, Any]:
        return inputs([rows[n] for n in numbers], width=batch["input_ids"].shape[1])

    return WithImages(Padded(multiple), seen)(items)
