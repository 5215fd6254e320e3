from __future__ import annotations

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from pretrain.codec.gains import RateGains
from pretrain.config import StageConfig
from pretrain.stages import FAST, create_optimizer


class Objective(nn.Module):
    """A network, a norm, a part that is frozen, a factorized prior, and gains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.prior = EntropyBottleneck(4)
        self.gains = RateGains(3, 4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_create_optimizer__every_trained_parameter_once_at_its_rate(optimizer: str):
    objective = Objective()
    stage = StageConfig(name="codec", trains=["compression"], epochs=1, optimizer=optimizer, lr=1e-3, weight_decay=0.1)
    groups = create_optimizer(stage, objective, shard=False).param_groups
    fast = [*objective.prior.parameters(), *objective.gains.parameters()]
    assert [len(group["params"]) for group in groups] == [1, 3, len(fast)]
    assert {id(each) for each in groups[2]["params"]} == {id(each) for each in fast}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-3 if optimizer == "sgd" else FAST * 1e-3]


def test_create_optimizer__weights_of_many_inputs_learn_more_slowly():
    objective = nn.Sequential(
        nn.Linear(8, 2), nn.Conv2d(2, 4, 5), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 6, 4, stride=2)
    )
    stage = StageConfig(name="codec", trains=["compression"], epochs=1, optimizer="adam", lr=1e-3, lr_fan_in=10)
    groups = create_optimizer(stage, objective, shard=False).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    weights = [rates[module.weight] for module in objective]
    # 8 inputs, 2 x 5 x 5, 3 x 3, and 4 x 4 x 4 of which one in four meets an output.
    assert weights == pytest.approx([1e-3, 1e-3 * 10 / 50, 1e-3, 1e-3 * 10 / 16])
    assert all(rates[module.bias] == 1e-3 for module in objective)


def test_create_optimizer__a_latent_that_says_nothing_is_soon_cheap():
    torch.manual_seed(0)
    prior = EntropyBottleneck(4)
    stage = StageConfig(name="codec", trains=["compression"], epochs=1, optimizer="adam", lr=1e-3)
    optimizer = create_optimizer(stage, prior, shard=False)
    for _ in range(150):
        bits = -prior(0.05 * torch.randn(32, 4, 1, 1))[1].log2().mean()
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
    assert float(bits.detach()) < 0.3  # 3.7 at the rate of networks
