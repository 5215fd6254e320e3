"""SimSiam: predict one view's embedding from the other's; no negatives, no momentum encoder in the loss.

Source: Chen, He, "Exploring Simple Siamese Representation Learning" (2021); heads and loss are lightly's.
The authors' sizes are dim 2048, hidden_dim 2048; the prediction head's bottleneck is a quarter of dim.
"""

from __future__ import annotations

from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from torch import Tensor

from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods.base import Method, Outputs, Views, full_precision


class SimSiam(Method):
    """See the module's text."""

    def __init__(self, config: SSLConfig, encoder: Encoder, distributed: bool):
        super().__init__(config, encoder, distributed)
        self.head = SimSiamProjectionHead(encoder.backbone.num_features, config.hidden_dim, config.dim)
        self.prediction_head = SimSiamPredictionHead(config.dim, max(config.dim // 4, 1), config.dim)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, outputs: Outputs, views: Views) -> Tensor:
        """Mean negative cosine of predictions and the other view's embeddings, in -1..1."""
        embedding0, embedding1 = (self.head(output.features) for output in outputs)
        prediction0, prediction1 = self.prediction_head(embedding0), self.prediction_head(embedding1)
        with full_precision(embedding0):
            return 0.5 * (
                self.criterion(prediction0.float(), embedding1.detach().float())
                + self.criterion(prediction1.float(), embedding0.detach().float())
            )
