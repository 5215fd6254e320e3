"""BYOL: predict the momentum encoder's embedding of the other view; no negatives.

Source: Grill et al., "Bootstrap your own latent" (2020); heads and loss are lightly's. The momentum rises
from `config.momentum` to 1 along a cosine. The authors' sizes are dim 256, hidden_dim 4096, momentum 0.996.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor, nn

from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods.base import Method, Outputs, Views, averaged_copy, full_precision


class BYOL(Method):
    """See the module's text."""

    momentum_in_loss: ClassVar[bool] = True

    def __init__(self, config: SSLConfig, encoder: Encoder, distributed: bool):
        super().__init__(config, encoder, distributed)
        self.head = BYOLProjectionHead(encoder.backbone.num_features, config.hidden_dim, config.dim)
        self.momentum_head = averaged_copy(self.head)
        self.prediction_head = BYOLPredictionHead(config.dim, config.hidden_dim, config.dim)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, outputs: Outputs, views: Views) -> Tensor:
        """Mean negative cosine of predictions and the other view's targets, in -1..1."""
        prediction0, prediction1 = (self.prediction_head(self.head(output.features)) for output in outputs)
        target0, target1 = self.target(views[0]), self.target(views[1])
        with full_precision(prediction0):
            return 0.5 * (
                self.criterion(prediction0.float(), target1.float())
                + self.criterion(prediction1.float(), target0.float())
            )

    @torch.no_grad()
    def target(self, view: Tensor) -> Tensor:
        """Embeddings (N, dim) by the momentum encoder."""
        return self.momentum_head(self.momentum_encoder(view).features)

    def momentum(self, progress: float) -> float:
        """From `config.momentum` to 1 along half a cosine."""
        return 1 - (1 - self.config.momentum) * (math.cos(math.pi * min(max(progress, 0.0), 1.0)) + 1) / 2

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Encoder and head."""
        yield from super().averages()
        yield self.head, self.momentum_head
