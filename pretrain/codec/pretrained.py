"""Codecs on disk: `model.safetensors` (weights, coder tables) and `config.json`; nothing that can run code.

A folder may come from anyone. What `config.json` says is checked for type and range, is not interpolated, and has to
fit the weights before a network of its sizes takes memory.

CODEC/
  model.safetensors   state dict, and tables.{z,y2}.{cdf,lengths,offsets}
  config.json         {"schema_version", "config", "fingerprint", "extra"}
  README.md           written by the export; not read

RUN/codecs/OWNER--NAME@REVISION/    the same two files, of a hub id that a run reads
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from cluster.commands import HUB_ID
from cluster.files import beside, write_whole
from pretrain.codec.config import CodecConfig
from pretrain.codec.entropy import CoderTables
from pretrain.codec.network import CodecNetwork
from pretrain.errors import CodecError

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGEST_CONFIG = 2**20  # bytes
LONGEST_NAME = 100  # characters
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
    """The folder of a codec; a hub id, OWNER/NAME or OWNER/NAME@REVISION, is downloaded (CodecError: neither)."""
    folder = Path(source)
    if folder.is_dir():
        return _check_folder(folder)
    if not is_hub_id(source):
        raise CodecError(f"{source}: no such codec folder; write one with `dicm export RUN {source}`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        name, _, revision = str(source).partition("@")
        found = snapshot_download(name, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG])
        return _check_folder(Path(found))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CodecError(
            f"{source}: no such folder, and not fetched from the hub ({type(error).__name__}); "
            "check the name and the connection, or write a folder with `dicm export`"
        ) from error


def is_hub_id(source: Path | str) -> bool:
    """Whether `source` is OWNER/NAME or OWNER/NAME@REVISION, and nothing on this disk."""
    return not Path(source).exists() and HUB_ID.fullmatch(str(source)) is not None


def keep(source: str | None, run: Path) -> None:
    """Put the codec of a hub id into the folder of a run, where it is not there yet; nothing to do for a folder.

    All ranks and every resume then read what the run began with, and ask the hub no more.

    Raises:
        CodecError: it cannot be fetched or written.
    """
    if source is None or not is_hub_id(source) or _place(source, run).is_dir():
        return
    found, target = locate(source), _place(source, run)
    temporary = beside(target)
    try:
        temporary.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(found / name, temporary / name)
        temporary.rename(target)
    except OSError as error:
        if target.is_dir():  # another process was faster
            return
        raise CodecError(f"{target}: cannot be written ({error.strerror}); free space or name another run") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def kept(source: str, run: Path) -> str:
    """The folder into which `keep` put the codec `source` of a run, or `source` where it did not."""
    return str(_place(source, run)) if is_hub_id(source) and _place(source, run).is_dir() else source


def _place(source: str, run: Path) -> Path:
    return run / "codecs" / source.replace("/", "--")


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
        if (size := path.stat().st_size) > LARGEST_CONFIG:
            raise ValueError(f"{size} bytes are more than {LARGEST_CONFIG}")
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise TypeError(f"{shown(facts)} is not a set of named facts")
        version = facts["schema_version"]
        if not _is_count(version):
            raise TypeError(f"schema_version={shown(version)} is not a whole number of at least 1")
        if version <= SCHEMA_VERSION:
            _check_extra(facts.get("extra", {}))
    # RecursionError: brackets without end.
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CodecError(f"{path}: damaged ({type(error).__name__}: {error}); export the codec again") from error
    if version > SCHEMA_VERSION:
        raise CodecError(f"{path}: schema version {version} is newer than this dicm reads; update dicm")
    return facts


def _check_extra(extra: Any) -> None:
    """TypeError where the facts that tasks take sizes from are none."""
    if not isinstance(extra, dict):
        raise TypeError(f"extra={shown(extra)} is not a set of named facts")
    for key in ("image_size", "canvas_size"):
        if key in extra and not _is_count(extra[key]):
            raise TypeError(f"extra.{key}={shown(extra[key])} is not a whole number of at least 1")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def codec_config(folder: Path, facts: dict[str, Any]) -> CodecConfig:
    """The sizes in config.json (CodecError: unknown keys or impossible values); weights are never fetched."""
    config = CodecConfig()
    try:
        values = facts["config"]
        if not isinstance(values, dict):
            raise TypeError(f"{shown(values)} is not a set of named sizes")
        for key, value in values.items():
            if key not in vars(config):
                raise KeyError(f"unknown key {shown(key)}")
            if not _is_like(value, getattr(config, key)):
                raise TypeError(f"{key}={shown(value)} is not like {getattr(config, key)!r}")
            setattr(config, key, value)
        config.pretrained = False
        config.validate()
    except (KeyError, TypeError, ValueError) as error:
        what = error.args[0] if isinstance(error, KeyError) else error
        raise CodecError(f"{folder / CONFIG}: damaged, config: {what}; export the codec again") from error
    return config


def _is_like(value: Any, default: Any) -> bool:
    """Whether `value` has the type of `default`: a whole number is a float, too, no bool is one; texts are short."""
    if isinstance(value, str) and not (value.isprintable() and len(value) <= LONGEST_NAME):
        return False
    if isinstance(default, list):
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


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


def check_weights(config: CodecConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """CodecError naming the first of `tensors` that do not fit `config`, before a codec of its sizes takes memory."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CodecNetwork(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = sorted(expected.keys() | found.keys())
    different = [name for name in names if expected.get(name) != found.get(name)]
    if different:
        shapes = "; ".join(
            f"{shown(name)} is {found.get(name, 'missing')}, {expected.get(name, 'unknown')} by {CONFIG}"
            for name in different[:2]
        )
        raise CodecError(
            f"{folder}: weights of another configuration: {shapes} ({len(different)} differ); export again"
        )
