"""What the methods share: a trained encoder, its exponential moving average, and their bookkeeping.

A method adds heads and a loss. Its members:

    heads, criterion             modules; names of parts that follow by averaging start with `momentum_`
    loss(outputs, views)         symmetric in the two views, scalar float32
    momentum(progress)           of the average, in 0..1
    averages()                   (module, its average) pairs
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar, TypeVar

import torch
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder, EncoderOutput

M = TypeVar("M", bound=nn.Module)
Views = tuple[Tensor, Tensor]
Outputs = tuple[EncoderOutput, EncoderOutput]


class Method(nn.Module):
    """Base of the methods.

    The momentum encoder exists in every method, as heatmaps come from it; where the loss does not run it
    (`momentum_in_loss` False) its batch statistics are averaged with its weights.

    Attributes:
        encoder: the trained one; shared with the codec.
        momentum_encoder: its average; without gradients.
        sync_batch_norm: batch statistics span the ranks where the backend can (NCCL).
        replicated_buffers: names of buffers that every rank computes alike, so DDP need not broadcast them.
    """

    momentum_in_loss: ClassVar[bool] = False
    sync_batch_norm: ClassVar[bool] = True
    replicated_buffers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: SSLConfig, encoder: Encoder, distributed: bool):
        super().__init__()
        self.config = config
        self.distributed = distributed
        self.encoder = encoder
        self.momentum_encoder = averaged_copy(encoder)
        # In the state dict, so that a resumed run does not start the average of RE anew.
        self.redundancy_started: Tensor
        self.register_buffer("redundancy_started", torch.zeros((), dtype=torch.int64))

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, Outputs]:
        """Loss of two views (N, 3, H, W) of the same images, and what the encoder made of them."""
        outputs = (self.encoder(view0), self.encoder(view1))
        return self.loss(outputs, (view0, view1)), outputs

    def loss(self, outputs: Outputs, views: Views) -> Tensor:
        """Scalar float32 of both directions."""
        raise NotImplementedError

    def momentum(self, progress: float) -> float:
        """Weight of the average's past at `progress` in 0..1 of the stage."""
        return self.config.momentum

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Modules and their averages."""
        yield self.encoder.backbone, self.momentum_encoder.backbone
        if self.encoder.redundancy_enabled:
            assert self.encoder.redundancy is not None
            assert self.momentum_encoder.redundancy is not None
            yield self.encoder.redundancy, self.momentum_encoder.redundancy

    def update_momentum(self, progress: float) -> None:
        """Move the averages towards the trained weights; call after the optimizer's step."""
        momentum = self.momentum(progress)
        for module, average in self.averages():
            update_momentum(module, average, momentum)
        if not self.momentum_in_loss:
            self._average_statistics(momentum)

    def set_redundancy(self, enabled: bool) -> None:
        """Put RE into the path of encoder and momentum encoder, or take it out; state dict names stay.

        The momentum encoder's RE starts as a copy of RE when it is put in, and then follows it.
        """
        started = bool(self.redundancy_started.item())
        if enabled and not started:
            redundancy, average = self.encoder.redundancy, self.momentum_encoder.redundancy
            assert redundancy is not None
            assert average is not None
            update_momentum(redundancy, average, 0.0)
        self.redundancy_started.fill_(enabled)
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.redundancy_enabled = enabled

    def trains(self, name: str) -> bool:
        """Whether the method's own parameter `name` (of a head) learns by gradients."""
        return not name.startswith("momentum_")

    @torch.no_grad()
    def _average_statistics(self, momentum: float) -> None:
        buffers = zip(self.encoder.backbone.buffers(), self.momentum_encoder.backbone.buffers(), strict=True)
        for buffer, average in buffers:
            if average.is_floating_point():
                average.lerp_(buffer, 1 - momentum)
            else:
                average.copy_(buffer)


def averaged_copy(module: M) -> M:
    """A copy that follows by averaging: no gradients."""
    average = copy.deepcopy(module)
    deactivate_requires_grad(average)
    return average


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context for a loss: autocast off, as near cosines differ by less than bfloat16 resolves."""
    return torch.autocast(tensor.device.type, enabled=False)
