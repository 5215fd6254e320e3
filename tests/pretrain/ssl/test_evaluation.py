from __future__ import annotations

import pytest
import torch

from pretrain.errors import CodecError
from pretrain.ssl.evaluation import knn_accuracy


def clusters(num_samples: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (num_samples,), generator=generator)
    centres = 10 * torch.eye(5, 16)
    return centres[labels] + noise * torch.randn(num_samples, 16, generator=generator), labels


def test_knn_accuracy__separate_classes_are_all_found():
    assert knn_accuracy(*clusters(100, 0.1, 0), *clusters(50, 0.1, 1)) == 1.0


def test_knn_accuracy__noise_is_near_chance():
    features, labels = clusters(1000, 0.1, 0)
    accuracy = knn_accuracy(features, labels, torch.randn_like(features), torch.randint(5, (1000,)))
    assert 0.1 < accuracy < 0.3


def test_knn_accuracy__does_not_depend_on_scale_or_on_how_queries_are_split(monkeypatch: pytest.MonkeyPatch):
    train, (features, labels) = clusters(80, 8.0, 0), clusters(60, 8.0, 1)
    accuracy = knn_accuracy(*train, features, labels)
    assert 0.2 < accuracy < 1
    monkeypatch.setattr("pretrain.ssl.evaluation.QUERIES_AT_ONCE", 7)
    assert knn_accuracy(*train, 100 * features, labels) == accuracy


def test_knn_accuracy__fewer_samples_than_k_and_classes_seen_in_val_alone():
    features = torch.eye(4)
    assert knn_accuracy(features[:2], torch.tensor([0, 1]), features[:3], torch.tensor([0, 1, 9])) == pytest.approx(
        2 / 3
    )


def test_knn_accuracy__unlabelled_samples_do_not_count():
    train, (features, labels) = clusters(100, 0.1, 0), clusters(50, 0.1, 1)
    labels = torch.where(torch.arange(50) < 25, labels, -1)
    assert knn_accuracy(*train, features, labels) == 1.0
    with pytest.raises(CodecError, match="0 to classify"):
        knn_accuracy(*train, features, torch.full((50,), -1))
