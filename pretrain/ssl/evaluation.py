"""kNN accuracy: how much of the classes frozen features hold, without training anything (Wu et al. 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import CodecError

QUERIES_AT_ONCE = 1024  # bounds the matrix of similarities


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Share, in 0..1, of val features (M, D) that their k nearest train features (N, D) classify right.

    Neighbours by cosine, weighted by exp(cosine / temperature), as lightly does it. Labels are int64;
    samples with a negative one have no label and are left out. k is cut to N.

    Raises:
        CodecError: no labelled sample on one side.
    """
    # On first use: lightly's package of benchmarks brings in PyTorch Lightning.
    from lightly.utils.benchmarking.knn import knn_predict

    train_features, train_labels = train_features[train_labels >= 0], train_labels[train_labels >= 0]
    val_features, val_labels = val_features[val_labels >= 0], val_labels[val_labels >= 0]
    if not len(train_labels) or not len(val_labels):
        raise CodecError(
            f"kNN has {len(train_labels)} labelled training samples and {len(val_labels)} to classify; it needs both"
        )
    bank = F.normalize(train_features.float(), dim=1).T.contiguous()
    queries = F.normalize(val_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    num_correct = 0
    for query, label in zip(queries.split(QUERIES_AT_ONCE), val_labels.split(QUERIES_AT_ONCE), strict=True):
        ranked = knn_predict(query, bank, train_labels, num_classes, knn_k=min(k, len(train_labels)), knn_t=temperature)
        num_correct += int((ranked[:, 0] == label).sum())
    return num_correct / len(val_labels)
