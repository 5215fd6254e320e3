from __future__ import annotations

import pytest
import torch

from downstream.tasks.classification import Classifier, count_correct
from pretrain.codec.backbone import Backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18")


def test_classifier__starts_from_a_copy_of_the_tail_and_leaves_the_original_alone(backbone: Backbone):
    model = Classifier(backbone, 5, probe=False).train()
    f3 = torch.randn(4, backbone.channels, 16, 16)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    tail = {name: tensor.clone() for name, tensor in model.tail.named_parameters()}
    assert torch.equal(tail["0.0.conv1.weight"], backbone.layer2[0].conv1.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the head starts at zero, so the tail moves from the second step on
        model.loss(model(f3), torch.tensor([0, 1, 2, 3]), 0.1).backward()
        optimizer.step()
    assert any(not torch.equal(tail[name], tensor) for name, tensor in model.tail.named_parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_classifier__probe_keeps_the_tail_and_its_statistics(backbone: Backbone):
    model = Classifier(backbone, 5, probe=True).train()
    before = {name: tensor.clone() for name, tensor in model.tail.state_dict().items()}
    model.loss(model(torch.randn(4, backbone.channels, 16, 16)), torch.tensor([0, 1, 2, 3]), 0.0).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tail.state_dict().items())


def test_count_correct__top1_and_top5():
    logits = torch.arange(7.0).flip(0).repeat(3, 1)  # ranked 0, 1, 2, ...
    assert count_correct(logits, torch.tensor([0, 4, 5])).tolist() == [1, 2]


def test_count_correct__fewer_than_five_classes():
    assert count_correct(torch.tensor([[0.0, 1.0]]), torch.tensor([0])).tolist() == [0, 1]
