"""Inlay gives back what it changes in the process, which is compared before and after.

An import of another library may change the process for good; so the libraries are imported before
the first look, and Inlay's own import has a law of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOK = '''
import gc, importlib, logging, os, pkgutil, random, signal, sys, warnings
from pathlib import Path
import accelerate, bitsandbytes, datasets, huggingface_hub, peft, torch, transformers, trl
import transformers.trainer
from huggingface_hub.utils.tqdm import progress_bar_states
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

CLASSES = [
    Trainer, trl.SFTTrainer, PreTrainedModel, transformers.PreTrainedConfig, LlamaConfig,
    transformers.ProcessorMixin, nn.Module, nn.Linear, nn.ModuleList, torch.Tensor,
    *(c for c in vars(modeling_llama).values() if isinstance(c, type)),
    *(c for c in vars(peft).values() if isinstance(c, type)),
]
CACHES = ("_abc_", "__abstractmethods__", "__annotations__", "__slotnames__", "smart_apply",
          "_can_set_experts_implementation_cached_value")
LOGGERS = ["root", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers",
           "torch.distributed.elastic", "accelerate", "trl", "bitsandbytes.backends.cpu.ops"]

def import_all(room="inlay"):
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, room + "."):
        if ".gpu" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)

def look():
    """Everything of the process that Inlay could leave changed, by name."""
    found = {f"environ {k}": v for k, v in os.environ.items()}
    found |= {
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()), "gradient": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "encoder": torch.backends.mha.get_fastpath_enabled(),
        "onednn": torch._C._get_mkldnn_enabled(), "benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "autocast": torch.get_autocast_dtype("cpu"), "random": random.getstate(),
        "torch random": torch.get_rng_state().tolist(),
        "attention": sorted(ALL_ATTENTION_FUNCTIONS), "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS),
        "quantizers": sorted(AUTO_QUANTIZER_MAPPING),
        "quantization": sorted(AUTO_QUANTIZATION_CONFIG_MAPPING),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "datasets' bars": datasets.are_progress_bars_disabled(),
        "hub's bars": dict(progress_bar_states), "filters": [str(f) for f in warnings.filters],
        "showwarning": warnings.showwarning, "hook": sys.excepthook,
        "meta path": [str(finder) for finder in sys.meta_path],
        "SIGTERM": signal.getsignal(signal.SIGTERM), "SIGINT": signal.getsignal(signal.SIGINT),
        "directory": os.getcwd(), "arguments": list(sys.argv), "path": list(sys.path),
        "kept": in_heap(),
    }
    for name in LOGGERS:
        logger = logging.getLogger(name)
        found[f"logger {name}"] = (logger.level, logger.disabled, logger.propagate,
                                   len(logger.handlers), len(logger.filters))
    for cls in CLASSES:
        for name, value in vars(cls).items():
            if not name.startswith(CACHES):
                found[f"{cls.__module__}.{cls.__qualname__}.{name}"] = id(value)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("peft", "trl") and module is not None:
            for key, value in vars(module).items():
                if callable(value):
                    found[f"{name}.{key}"] = id(value)
    if "inlay.kernels.switches" in sys.modules:
        found["switches"] = sys.modules["inlay.kernels.switches"].off
    return found

def in_heap():
    """Whether a new tensor lies in Inlay's heap."""
    if "inlay" not in sys.modules:
        return False
    from inlay.kernels.native import allocator
    if allocator.tensor_heap() is None:
        return "glibc" in allocator.changed
    kept = allocator.tensor_heap().inlay_kept_bytes
    kept.restype = allocator.ctypes.c_int64
    before = kept()
    held = [torch.ones(1 << 20) for _ in range(4)]
    return kept() != before

def same(before, after):
    gone = sorted(before.keys() - after.keys())
    changed = sorted(n for n in before if n in after and before[n] != after[n])
    new = sorted(n for n in after.keys() - before.keys() if not n.startswith(("peft", "trl")))
    for name in [*gone, *changed, *new]:
        print(name, repr(before.get(name))[:300], "->", repr(after.get(name))[:300])
    assert not gone + changed + new

def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
        pad_token_id=0, eos_token_id=None))

IDS = torch.tensor([[1, 5, 9, 2, 7, 30], [3, 3, 60, 11, 2, 8]])

def step(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
'''

ATTACHED = """
import copy, pickle
import inlay
import_all("inlay.model")

def check_changed():
    assert "inlay" in ALL_ATTENTION_FUNCTIONS and "inlay" in ALL_MASK_ATTENTION_FUNCTIONS
    assert hasattr(vars(Trainer)["_load_from_checkpoint"], "__wrapped__")

# Detached.
model = llama()
before = look()
inlay.attach(model, inlay.LoRA(rank=2))
check_changed()
step(model)
inlay.detach(model)
same(before, look())

# Freed: its configuration makes another model.
inlay.attach(model, inlay.LoRA(rank=2))
check_changed()
config = model.config
del model
gc.collect()
same(before, look())
step(LlamaForCausalLM(config))

# Copies need what the original needs.
model = llama()
before = look()
inlay.attach(model, inlay.LoRA(rank=2))
copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
inlay.detach(model)
for each in copies:
    check_changed()
    step(each)
part = copy.deepcopy(copies[0].model)
inlay.detach(copies[0])
del copies, each
gc.collect()
assert "inlay" in ALL_ATTENTION_FUNCTIONS
part.train()(input_ids=IDS)
del part
gc.collect()
same(before, look())

# torch's own encoder layers.
encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True))
before = look()
inlay.attach(encoder, inlay.LoRA(rank=2), targets="linear1")
assert not torch.backends.mha.get_fastpath_enabled()
encoder(torch.ones(1, 3, 16)).sum().backward()
inlay.detach(encoder)
same(before, look())
"""

LOADED = """
import inlay
import_all("inlay.model")
before = look()
for asked in ({"model": "no-such-folder/at/all"}, {"model": "pocket", "storage": "nf5"}):
    try:
        inlay.load(**asked)
    except inlay.InlayError:
        pass
    else:
        raise AssertionError
same(before, look())
packed, _ = inlay.load("pocket", "nf4", device="cpu")
same(before, look())
model, tokenizer = inlay.load("pocket", device="cpu")
same(before, look())
inlay.attach(model, inlay.LoRA(rank=2))
inlay.merge(model, inputs=[{"input_ids": IDS}])
same(before, look())
inlay.quantize(model, "int8")
same(before, look())
"""

TRAINED = """
import inlay
from inlay.train.run import train
import_all("inlay.train")
import_all("inlay.evaluate")
sys.path.insert(0, TESTS)
import train_tiny
config = train_tiny.make_run(Path(FOLDER), threads=2, max_steps=2)
torch.set_num_threads(1)
before = look()
result = train(config)
after = look()
for name in list(after):  # the result's model carries its adapter still
    if name in ("attention", "masks", "kept") or ".Trainer._load_" in name:
        del before[name], after[name]
same(before, after)
"""

TAKEN_OVER = """
import inlay
from trl.trainer import sft_trainer
import_all("inlay.peft")
base = llama()
before = look()
with inlay.peft.take_over():
    assert peft.get_peft_model is inlay.peft.get_peft_model
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    step(model)
del model, base
gc.collect()
torch.set_rng_state(torch.tensor(before["torch random"], dtype=torch.uint8))
same(before, look())
"""

IMPORTED = """
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer, sft_trainer
import accelerate.scheduler, rouge_score.rouge_scorer, sentence_transformers
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl.experimental.orpo
before = look()
import_all()
after = look()
assert after.pop("switches") == frozenset()
same(before, after)
"""

OUTLIVING = """
import inlay
from inlay.kernels.native import allocator, keep_memory, release_memory
if allocator.tensor_heap() is None:
    raise SystemExit
kept = allocator.tensor_heap().inlay_kept_bytes
kept.restype = allocator.ctypes.c_int64
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
assert keep_memory() is None
held = [torch.full((1 << 20,), float(i)) for i in range(16)]
release_memory()
assert not in_heap()
assert [float(x[-1]) for x in held] == list(range(16))
full = resident()
del held[3:9]
assert full - resident() > 6 * (1 << 22) * 0.9
del held
assert kept() == 0 and full - resident() > 16 * (1 << 22) * 0.9
"""

LAWS = {
    "attach": ATTACHED, "load": LOADED, "train": TRAINED, "take over": TAKEN_OVER,
    "import": IMPORTED, "tensors that outlive the heap": OUTLIVING,
}  # fmt: skip


def run(code: str, tmp_path: Path, **env: str) -> None:
    support = Path(__file__).parents[1] / "support"
    given = f"TESTS, FOLDER = {str(support)!r}, {str(tmp_path)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", LOOK + given + code],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("law", LAWS)
def test_the_process_is_what_it_was(law: str, tmp_path: Path) -> None:
    run(LAWS[law], tmp_path)


def test_without_a_compiler_too(tmp_path: Path) -> None:
    run(TAKEN_OVER, tmp_path, CXX="false", XDG_CACHE_HOME=str(tmp_path))
