"""The self-supervised methods by name; each in its own file with the same few members (`base.Method`)."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm

from pretrain.errors import CodecError
from pretrain.ssl.config import SSLConfig, nearest
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods.base import Method
from pretrain.ssl.methods.byol import BYOL
from pretrain.ssl.methods.moco import MoCo
from pretrain.ssl.methods.simclr import SimCLR
from pretrain.ssl.methods.simsiam import SimSiam

__all__ = ["METHODS", "Method", "create_method"]

METHODS: dict[str, type[Method]] = {"moco": MoCo, "simsiam": SimSiam, "byol": BYOL, "simclr": SimCLR}


def create_method(config: SSLConfig, encoder: Encoder, distributed: bool) -> Method:
    """The method that `config.method` names, around `encoder`.

    Heads and queue are drawn from torch's global generator: seed it alike on all ranks before.
    `distributed` says that losses, queue and batch statistics span the ranks of torch.distributed's default
    group.

    Raises:
        CodecError: there is no such method.
    """
    if config.method not in METHODS:
        raise CodecError(f"method {config.method} is unknown; use {nearest(config.method, list(METHODS))}")
    method = METHODS[config.method](config, encoder, distributed)
    if distributed and method.sync_batch_norm and torch.distributed.get_backend() == "nccl":
        convert_sync_batchnorm(method)  # in place; gloo has no synced statistics
    return method
