"""MoCo v2: contrast against a queue of keys from a momentum encoder.

Sources: He, Fan, Wu, Xie, Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning"
(2020) and Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning" (2020); head,
loss, queue and shuffling are lightly's.

The loss is symmetric: both directions meet the same queue, then the keys of both views, of all ranks, enter
it at once. (One direction after the other would put the first direction's keys among the second's
negatives, the query's own image included.) Batch statistics would let a query know its key, as both come
from one batch; with several ranks the key batches are therefore shuffled over the ranks instead of synced.
The queue is full from the first step, with random unit vectors; keys that do not fit before its end are
dropped, so any size works.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle
from torch import Tensor, nn

from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods.base import Method, Outputs, Views, averaged_copy, full_precision


class MoCo(Method):
    """See the module's text."""

    momentum_in_loss: ClassVar[bool] = True
    sync_batch_norm: ClassVar[bool] = False
    replicated_buffers: ClassVar[tuple[str, ...]] = (
        "criterion.memory_bank.bank",
        "criterion.memory_bank.bank_ptr",
    )

    def __init__(self, config: SSLConfig, encoder: Encoder, distributed: bool):
        super().__init__(config, encoder, distributed)
        self.head = MoCoProjectionHead(encoder.backbone.num_features, config.hidden_dim, config.dim)
        self.momentum_head = averaged_copy(self.head)
        self.criterion = NTXentLoss(
            config.temperature, memory_bank_size=(config.queue, config.dim), gather_distributed=distributed
        )
        queue = self.criterion.memory_bank
        for name in ("bank", "bank_ptr"):  # lightly leaves both out of the state dict
            queue.register_buffer(name, getattr(queue, name), persistent=True)

    @property
    def queue(self) -> Tensor:
        """Keys (queue, dim), unit vectors; equal on all ranks."""
        return self.criterion.memory_bank.bank

    def loss(self, outputs: Outputs, views: Views) -> Tensor:
        """InfoNCE of each view's queries with the other's keys."""
        queries = torch.cat([self.head(output.features) for output in outputs])
        keys = torch.cat([self.keys(views[1]), self.keys(views[0])])
        return self._contrast(queries, keys)

    @torch.compiler.disable  # the queue's pointer is a number on the host, which would break the graph
    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        with full_precision(queries):
            return self.criterion(queries.float(), keys.float())

    @torch.no_grad()
    def keys(self, view: Tensor) -> Tensor:
        """Embeddings (N, dim) by the momentum encoder."""
        if not self.distributed:
            return self.momentum_head(self.momentum_encoder(view).features)
        shuffled, order = batch_shuffle(view.contiguous(), distributed=True)
        if view.is_contiguous(memory_format=torch.channels_last):
            shuffled = shuffled.contiguous(memory_format=torch.channels_last)
        # In float32: a rank whose device has no bfloat16 gathers with others that have.
        keys = self.momentum_head(self.momentum_encoder(shuffled).features).float()
        return batch_unshuffle(keys, order, distributed=True)

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Encoder and head."""
        yield from super().averages()
        yield self.head, self.momentum_head
