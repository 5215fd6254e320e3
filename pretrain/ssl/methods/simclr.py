"""SimCLR: contrast the two views of an image against all other views in the batch, of all ranks.

Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning" (2020); head and
loss are lightly's.
"""

from __future__ import annotations

from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor

from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods.base import Method, Outputs, Views, full_precision


class SimCLR(Method):
    """See the module's text."""

    def __init__(self, config: SSLConfig, encoder: Encoder, distributed: bool):
        super().__init__(config, encoder, distributed)
        self.head = SimCLRProjectionHead(encoder.backbone.num_features, config.hidden_dim, config.dim)
        self.criterion = NTXentLoss(config.temperature, memory_bank_size=0, gather_distributed=distributed)

    def loss(self, outputs: Outputs, views: Views) -> Tensor:
        """NT-Xent of both views' embeddings."""
        embedding0, embedding1 = (self.head(output.features) for output in outputs)
        with full_precision(embedding0):
            return self.criterion(embedding0.float(), embedding1.float())
