from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from pretrain.codec.backbone import Backbone
from pretrain.codec.config import CodecConfig
from pretrain.codec.redundancy import RedundancyElimination
from pretrain.errors import CodecError
from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods import METHODS, Method, create_method

ALL = sorted(METHODS)


def small_method(name: str, seed: int = 0, distributed: bool = False, **options: float) -> Method:
    torch.manual_seed(seed)
    backbone = Backbone("resnet10t")
    config = CodecConfig(backbone="resnet10t", re_channels=8, re_latent=8, re_depths=[1, 1, 1], re_kernel=3)
    encoder = Encoder(backbone, RedundancyElimination(backbone.channels, config))
    options = {"momentum": 0.9, "queue": 20, **options}
    return create_method(SSLConfig(method=name, dim=16, hidden_dim=32, **options), encoder, distributed)


def views(num: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, 32, 32, generator=generator)
    return images, images + 0.2 * torch.randn(num, 3, 32, 32, generator=generator)


def trained(method: Method) -> list[torch.nn.Parameter]:
    """Parameters that a stage without RE trains."""
    method.encoder.redundancy.requires_grad_(False)
    return [p for name, p in method.named_parameters() if p.requires_grad and method.trains(name)]


@pytest.mark.parametrize("name", ALL)
def test_forward__a_few_steps_lower_the_loss(name: str):
    method = small_method(name)
    state = {key: value.clone() for key, value in method.named_buffers() if "memory_bank" in key}
    optimizer = torch.optim.SGD(trained(method), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        method.load_state_dict(state, strict=False)  # the same negatives each time
        loss, outputs = method(*views(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update_momentum(0.5)
        losses.append(loss.item())
    assert loss.ndim == 0
    assert outputs[0].features.shape == outputs[1].features.shape == (8, method.encoder.backbone.num_features)
    assert min(losses[-2:]) < losses[0] - 0.02


@pytest.mark.parametrize("name", ALL)
def test_forward__gradients_reach_all_that_is_trained_and_nothing_else(name: str):
    method = small_method(name)
    names = {n for n, p in method.named_parameters() if any(p is q for q in trained(method))}
    loss, _ = method(*views())
    loss.backward()
    assert {n for n, p in method.named_parameters() if p.grad is not None} == names
    assert not any(n.startswith("momentum_") for n in names)


@pytest.mark.parametrize("name", ALL)
def test_forward__is_symmetric_in_the_views(name: str):
    method = small_method(name).eval()
    view0, view1 = views()
    with torch.no_grad():
        assert method(view0, view1)[0].item() == pytest.approx(method(view1, view0)[0].item(), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_forward__loss_is_float32_under_autocast_and_near_the_exact_one(name: str):
    method = small_method(name).eval()
    with torch.no_grad():
        exact, _ = method(*views())
        with torch.autocast("cpu", torch.bfloat16):
            loss, outputs = method(*views())
    assert outputs[0].f1.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.05)


@pytest.mark.parametrize("name", ALL)
def test_update_momentum__is_the_exponential_average_of_the_weights(name: str):
    method = small_method(name)
    before = {n: p.clone() for n, p in method.momentum_encoder.backbone.named_parameters()}
    with torch.no_grad():
        for parameter in method.encoder.backbone.parameters():
            parameter.add_(1.0)
    method.update_momentum(0.0)
    for n, average in method.momentum_encoder.backbone.named_parameters():
        torch.testing.assert_close(average, before[n] + 0.1)


@pytest.mark.parametrize("name", ALL)
def test_update_momentum__momentum_encoder_gets_batch_statistics_to_see_by(name: str):
    method = small_method(name, momentum=0.5)
    for norm in method.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 0.5  # soon forgets what it began with
    for seed in range(6):
        with torch.no_grad():
            method(*(3 + view for view in views(seed=seed)))
        method.update_momentum(0.0)
    for key in ("running_mean", "running_var"):
        own = method.encoder.backbone.get_buffer(f"stem.1.{key}")
        torch.testing.assert_close(
            method.momentum_encoder.backbone.get_buffer(f"stem.1.{key}"), own, rtol=0.2, atol=0.02
        )


def test_momentum__byol_rises_to_one_the_others_stay():
    byol = small_method("byol")
    assert [byol.momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.95, 1.0])
    assert all(byol.momentum(p) <= byol.momentum(p + 0.1) for p in (0.0, 0.3, 0.6, 0.9))
    assert small_method("moco").momentum(0.7) == 0.9


@pytest.mark.parametrize("name", ALL)
def test_set_redundancy__images_pass_through_it_in_both_encoders(name: str):
    method = small_method(name)
    keys = set(method.state_dict())
    with torch.no_grad():
        for parameter in method.encoder.redundancy.parameters():
            parameter.add_(0.01)  # trained since the method was made
    method.set_redundancy(True)
    pairs = zip(method.encoder.redundancy.parameters(), method.momentum_encoder.redundancy.parameters(), strict=True)
    assert all(torch.equal(own, average) for own, average in pairs)
    loss, outputs = method(*views())
    loss.backward()
    assert outputs[0].f2 is not None
    assert method.encoder.redundancy.encoder[0].weight.grad.abs().sum() > 0
    assert method.momentum_encoder(views()[0]).f2 is not None
    assert set(method.state_dict()) == keys
    method.set_redundancy(False)
    assert method(*views())[1][0].f2 is None


def test_set_redundancy__asking_again_or_after_a_restart_keeps_the_average():
    method = small_method("moco")
    method.set_redundancy(True)
    with torch.no_grad():
        for parameter in method.encoder.redundancy.parameters():
            parameter.add_(1.0)
    method.update_momentum(0.0)
    average = method.momentum_encoder.redundancy.encoder[0].weight.clone()
    own = method.encoder.redundancy.encoder[0].weight
    torch.testing.assert_close(average, own - 0.9)
    method.set_redundancy(True)
    restarted = small_method("moco", seed=1)
    restarted.load_state_dict(method.state_dict())
    restarted.set_redundancy(True)
    for same in (method, restarted):
        assert torch.equal(same.momentum_encoder.redundancy.encoder[0].weight, average)


@pytest.mark.parametrize("name", ALL)
def test_state_dict__holds_everything_a_resumed_run_needs(name: str):
    def step(method: Method, optimizer: torch.optim.Optimizer, seed: int) -> float:
        torch.manual_seed(seed)
        loss, _ = method(*views(seed=seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update_momentum(0.3)
        return loss.item()

    method = small_method(name)
    optimizer = torch.optim.SGD(trained(method), lr=0.05)
    for seed in range(3):
        step(method, optimizer, seed)
    state = copy.deepcopy(method.state_dict())
    expected = [step(method, optimizer, seed) for seed in range(3, 6)]
    resumed = small_method(name, seed=99)
    resumed.load_state_dict(state)
    optimizer = torch.optim.SGD(trained(resumed), lr=0.05)
    assert [step(resumed, optimizer, seed) for seed in range(3, 6)] == expected


def test_queue__is_full_of_unit_vectors_that_follow_from_the_seed():
    queues = [small_method("moco", seed=seed).queue for seed in (3, 3, 4)]
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(20))
    assert torch.equal(queues[0], queues[1])
    assert not torch.equal(queues[0], queues[2])


@pytest.mark.parametrize(("queue", "num"), [(20, 4), (16, 4), (5, 4), (8, 4)])
def test_queue__takes_both_views_keys_at_once_and_any_size_works(queue: int, num: int):
    method = small_method("moco", queue=queue)
    before = method.queue.clone()
    view0, view1 = views(num)
    method.momentum_encoder.eval()
    keys = torch.cat([method.keys(view1), method.keys(view0)])
    method(view0, view1)
    taken = min(2 * num, queue)
    torch.testing.assert_close(method.queue[:taken], torch.nn.functional.normalize(keys, dim=1)[:taken])
    assert torch.equal(method.queue[taken:], before[taken:])
    for seed in range(5):
        method(*views(num, seed))
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(queue))


def test_queue__is_left_alone_without_gradients():
    method = small_method("moco")
    before = method.queue.clone()
    with torch.no_grad():
        method(*views())
    assert torch.equal(method.queue, before)


@torch.no_grad()
def test_moco__loss_is_info_nce_of_both_directions_against_the_same_queue():
    method = small_method("moco", temperature=0.2).eval()
    view0, view1 = views()

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)

    negatives = method.queue.clone()
    expected = 0.0
    for query_view, key_view in ((view0, view1), (view1, view0)):
        query, key = unit(method.head(method.encoder(query_view).features)), unit(method.keys(key_view))
        for i in range(len(query)):
            positive = math.exp(float(query[i] @ key[i]) / 0.2)
            expected -= math.log(positive / (positive + float((query[i] @ negatives.T / 0.2).exp().sum()))) / 8
    assert method(view0, view1)[0].item() == pytest.approx(expected, rel=1e-4)


def test_create_method__unknown_name_is_refused_with_the_nearest():
    with pytest.raises(CodecError, match=r"mocco.*moco"):
        small_method("mocco")
