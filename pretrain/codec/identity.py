"""What tells one codec from another, and whether weights have changed since they were last looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pretrain.codec.config import CodecConfig

# Options that came later, at the values that codecs had before: they leave the fingerprints of those as they were.
LATER = {"redundancy": True, "hyperprior": "vit"}
# Layers of the backbone that read f3; no symbol and no feature of a stream depends on them.
TAIL = ("backbone.layer2.", "backbone.layer3.", "backbone.layer4.")


def weights_hash(config: CodecConfig, weights: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of a codec's options and of the weights that its streams depend on."""
    options = {**asdict(config), "pretrained": False}
    for name, value in LATER.items():
        if options[name] == value:
            del options[name]
    return hash_of(options, {name: tensor for name, tensor in weights.items() if not name.startswith(TAIL)})


def hash_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of facts and tensors, whatever their order, devices and strides."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def stamp_of(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Where tensors lie and how often each was written to; None where inference mode kept no count."""
    stamp: list[int] = []
    for tensor in tensors:
        if tensor.is_inference():
            return None
        stamp += (tensor.data_ptr(), tensor._version)
    return tuple(stamp)
