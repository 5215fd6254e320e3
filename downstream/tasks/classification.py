"""Classification: the backbone's tail and a linear head on f3 (N, C1, H/4, W/4)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.codec.backbone import Backbone


class Classifier(nn.Module):
    """Logits (N, num_classes) of f3; the tail starts as a copy of the pretrained one.

    Args:
        probe: train the head alone; the tail stays frozen, its batch norms on their running statistics.
    """

    def __init__(self, backbone: Backbone, num_classes: int, probe: bool):
        super().__init__()
        self.tail = nn.Sequential(*(copy.deepcopy(getattr(backbone, f"layer{i}")) for i in (2, 3, 4)))
        self.tail.requires_grad_(not probe)
        self.probe = probe
        # Without affine parameters: it brings features of any codec to one scale, so one learning rate fits all.
        self.norm = nn.BatchNorm1d(backbone.num_features, affine=False)
        self.head = nn.Linear(backbone.num_features, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        """Training mode of what is trained."""
        super().train(mode)
        if self.probe:
            self.tail.eval()
        return self

    def pooled(self, f3: Tensor) -> Tensor:
        """(N, num_features) of f3, before norm and head."""
        return self.tail(f3).mean(dim=(2, 3))

    def forward(self, f3: Tensor) -> Tensor:
        return self.head(self.norm(self.pooled(f3).float()))

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Cross-entropy, float32."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(2,): how many labels (N,) are the best, and among the five best, of logits (N, classes)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum()]).float()
