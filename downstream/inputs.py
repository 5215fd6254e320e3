"""What a run reads from outside, by content: RUN/inputs.json.

    {"codec": fingerprint, "data": sha256 of the manifest, "init": sha256 of its options,
     "teacher", "latents_weights", "anchor_weights": sha256 of the file}

Options name these by their paths, under which something else may lie another day. A run goes on, is evaluated and
predicts only with what it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.manifest import Manifest
from downstream.config import FinetuneConfig
from downstream.errors import TaskError
from downstream.files import write_file
from pretrain.codec.feature_codec import FeatureCodec

INPUTS = "inputs.json"
WEIGHTS = ("latents_weights", "anchor_weights")  # options that name a file, or `zoo`; what encodes the network's input


def inputs_of(config: FinetuneConfig, codec: FeatureCodec | None, manifest: Manifest) -> dict[str, str]:
    """What the options of a run stand for now."""
    found = {"data": manifest.hash, **encoder_of(config, codec), **_file_hashes(config, ("teacher",))}
    if config.init is not None and (options := Path(config.init) / "config.yaml").is_file():
        found["init"] = _hash(options)  # a run with the same options ends in the same network
    return found


def encoder_of(config: FinetuneConfig, codec: FeatureCodec | None) -> dict[str, str]:
    """The part of `inputs_of` that encodes what the network reads; data set, teacher and `init` may be gone."""
    found = {} if codec is None else {"codec": codec.fingerprint.hex()}
    return {**found, **_file_hashes(config, WEIGHTS)}


def _file_hashes(config: FinetuneConfig, keys: Sequence[str]) -> dict[str, str]:
    """sha256 by option, of those that name a file."""
    files = {key: Path(getattr(config, key, None) or "") for key in keys}
    return {key: _hash(path) for key, path in files.items() if path.is_file()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Write RUN/inputs.json (TaskError where the disk refuses)."""
    write_file(folder / INPUTS, json.dumps(inputs, indent=2) + "\n")


def read_inputs(folder: Path) -> dict[str, str]:
    """What `write_inputs` wrote for a run, nothing where it wrote none (TaskError where that cannot be read)."""
    try:
        return dict(json.loads((folder / INPUTS).read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(f"{folder / INPUTS}: cannot be read ({error}); use another run folder") from error


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """See that a run's inputs, as far as `inputs` tells them, are what they were (TaskError)."""
    before = read_inputs(folder)
    for key, value in inputs.items() if before else ():
        if before.get(key) != value:
            raise TaskError(
                f"{folder}: its {key} is another one now ({str(before.get(key))[:12]} then, {value[:12]} now); put "
                "back what was there, or use another run folder"
            )
