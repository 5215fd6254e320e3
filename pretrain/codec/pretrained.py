"""Codecs on disk: `model.safetensors` (weights, coder tables) and `config.json`; nothing that can run code.

CODEC/
  model.safetensors   state dict, and tables.{z,y2}.{cdf,lengths,offsets}
  config.json         {"schema_version", "config", "fingerprint", "extra"}
  README.md           written by the export; not read
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cluster.files import write_whole
from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import CoderTables
from pretrain.errors import CodecError

if TYPE_CHECKING:
    from pretrain.codec.feature_codec import FeatureCodec

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def save(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write both files, each whole or not at all (CodecError where that fails).

    A crash between the two leaves weights and fingerprint of different codecs, which loading notices.
    """
    try:
        write_whole(folder / WEIGHTS, to_safetensors(tensors))
        write_whole(
            folder / CONFIG,
            json.dumps({"schema_version": SCHEMA_VERSION, **facts}, indent=2).encode() + b"\n",
        )
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{folder}: cannot be written ({error}); free space or name another folder") from error


def locate(source: Path | str) -> Path:
    """The folder of a codec; a hub id is downloaded (CodecError where it is neither)."""
    folder = Path(source)
    if folder.is_dir():
        return _check_folder(folder)
    if folder.exists() or folder.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise CodecError(f"{source}: no such codec folder; write one with `dicm export RUN {source}`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _check_folder(Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CONFIG])))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CodecError(
            f"{source}: no such folder, and not fetched from the hub ({type(error).__name__}); "
            "check the name and the connection, or write a folder with `dicm export`"
        ) from error


def _check_folder(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.suffix in PICKLES:
            raise CodecError(f"{folder}: holds {path.name}, a pickle, which can run code; remove it")
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise CodecError(f"{folder}: {name} is missing; write the folder with `dicm export RUN {folder}`")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands (CodecError: damaged or newer)."""
    path = folder / CONFIG
    try:
        facts = json.loads(path.read_text())
        version = int(facts["schema_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CodecError(f"{path}: damaged ({type(error).__name__}: {error}); export the codec again") from error
    if version > SCHEMA_VERSION:
        raise CodecError(f"{path}: schema version {version} is newer than this dicm reads; update dicm")
    return facts


def codec_config(folder: Path, facts: dict[str, Any]) -> CodecConfig:
    """The sizes in config.json (CodecError: unknown keys or impossible values); weights are never fetched."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(CodecConfig), dict(facts["config"]), {"pretrained": False})
        config: CodecConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
        config.validate()
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        what = str(error).splitlines()[0]
        raise CodecError(f"{folder / CONFIG}: damaged, config: {what}; export the codec again") from error
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors (CodecError: damaged)."""
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise CodecError(f"{folder / WEIGHTS}: damaged ({error}); export the codec again") from error


def take_tables(folder: Path, tensors: dict[str, Tensor]) -> CoderTables:
    """Remove the coder's tables from `tensors` and return them."""
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith("tables.")}
    try:
        if not all(table.dtype == torch.int32 for table in found.values()):
            raise ValueError("a coder table is not int32")
        return CoderTables.from_tensors(found)
    except (KeyError, ValueError, TypeError) as error:
        raise CodecError(f"{folder / WEIGHTS}: coder tables: {error}; export the codec again") from error


def load_weights(codec: FeatureCodec, tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill `codec` with `tensors` (CodecError naming the first that do not fit its configuration)."""
    expected = {name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = sorted(expected.keys() | found.keys())
    different = [name for name in names if expected.get(name) != found.get(name)]
    if different:
        shown = "; ".join(
            f"{name} is {found.get(name, 'missing')}, {expected.get(name, 'unknown')} by {CONFIG}"
            for name in different[:2]
        )
        raise CodecError(f"{folder}: weights of another configuration: {shown} ({len(different)} differ); export again")
    codec.load_state_dict(tensors)
