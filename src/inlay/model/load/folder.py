"""A model's folder: embedded, local or fetched from the hub, its safetensors files whole."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from inlay.errors import ModelError, did_you_mean
from inlay.model.load.libraries import quiet_hub

EMBEDDED = {"pocket": Path(__file__).parents[1] / "pocket"}
"""Names of the base models that come with Inlay -> their folder."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FETCHED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def located(model: str, revision: str | None = None) -> Path:
    folder = EMBEDDED[model] if model in EMBEDDED else Path(model).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{model} is a file; a model is a folder with config.json in it")
    if not folder.is_dir():
        folder = fetched(model, revision)
    check_folder(folder)
    return folder


def fetched(model: str, revision: str | None) -> Path:
    if not looks_like_hub_id(model):
        raise ModelError(f"there is no folder {model!r}.{did_you_mean(model, EMBEDDED)}")
    with quiet_hub():
        try:
            return Path(snapshot_download(model, revision=revision, allow_patterns=FETCHED))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ModelError(
                f"{model!r} is neither a folder nor reachable on the hub "
                f"({type(error).__name__}); check the spelling and the connection, or give a "
                f"local folder.{did_you_mean(model, EMBEDDED)}"
            ) from error


def looks_like_hub_id(model: str) -> bool:
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " It holds an adapter; give the model it was trained on." if adapter else ""
        raise ModelError(f"{folder} has no config.json, which every model folder has.{hint}")
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    files = weight_files(folder)
    if not files and pickles:
        raise ModelError(
            f"{folder} holds its weights as {pickles[0]}, and only safetensors is read, because "
            "the other formats can run code; convert it with transformers' save_pretrained"
        )
    if not files:
        raise ModelError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: no weights to load")
    for file in files:
        check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        shards = {str(s) for s in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}; fetch the model again") from error
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which {INDEX} names; fetch it again")
    return sorted(folder / name for name in shards)


def check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged: {error}; fetch it again") from error
