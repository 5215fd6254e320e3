"""Two processes over gloo: what they compute together is what one process computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from pretrain.codec.backbone import Backbone
from pretrain.ssl.config import SSLConfig
from pretrain.ssl.encoder import Encoder
from pretrain.ssl.methods import METHODS, Method, create_method

pytestmark = pytest.mark.slow

WORLD = 2
BATCH = 8
STEPS = 2


def small_method(name: str, distributed: bool) -> Method:
    torch.manual_seed(0)
    config = SSLConfig(method=name, dim=16, hidden_dim=32, queue=64, momentum=0.9)
    return create_method(config, Encoder(Backbone("resnet10t")), distributed)


def views(step: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return images, 0.8 * images.flip(3)


def train(method: Method, rank: int, world: int) -> dict[str, Any]:
    """Two steps with fixed batch statistics, each rank on its share of the batch."""
    method.eval()
    wrapped = DistributedDataParallel(method) if world > 1 else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(STEPS):
        loss, _ = wrapped(*(view.chunk(world)[rank] for view in views(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.update_momentum(step / STEPS)
        losses.append(loss.item())
    return {"losses": losses, "state": method.state_dict()}


def train_with_batch_statistics(rank: int) -> dict[str, Any]:
    """One step of MoCo in training mode under DDP, and the mean of the ranks' gradients computed by hand."""
    gradients = []
    for by_hand in (True, False):
        method = small_method("moco", distributed=True)
        wrapped: torch.nn.Module = method
        if not by_hand:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, list(method.replicated_buffers))
            wrapped = DistributedDataParallel(method)
        torch.manual_seed(rank)
        share = [view.chunk(WORLD)[rank].contiguous(memory_format=torch.channels_last) for view in views(0)]
        wrapped(*share)[0].backward()
        gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
        if by_hand:
            distributed.all_reduce(gradient)
            gradient /= WORLD
        gradients.append(gradient)
    return {"by_hand": gradients[0], "ddp": gradients[1], "queue": method.queue}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {name: train(small_method(name, distributed=True), rank, WORLD) for name in METHODS}
    results["statistics"] = train_with_batch_statistics(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_forward__two_ranks_train_as_one_does_on_the_whole_batch(results: list[dict[str, Any]], name: str):
    alone = train(small_method(name, distributed=False), 0, 1)
    together = [result[name] for result in results]
    for step in range(STEPS):
        mean = sum(result["losses"][step] for result in together) / WORLD
        assert mean == pytest.approx(alone["losses"][step], rel=1e-4)
    for key, value in alone["state"].items():
        if not key.endswith("memory_bank.bank"):  # the same keys in another order
            torch.testing.assert_close(together[0]["state"][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_forward__all_ranks_hold_the_same_state(results: list[dict[str, Any]], name: str):
    states = [result[name]["state"] for result in results]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_queue__holds_the_keys_of_all_ranks_and_those_alone(results: list[dict[str, Any]]):
    alone = train(small_method("moco", distributed=False), 0, 1)["state"]["criterion.memory_bank.bank"]
    together = results[0]["moco"]["state"]["criterion.memory_bank.bank"]
    distances = torch.cdist(alone, together)
    assert distances.amin(dim=1).max() < 1e-3
    assert distances.amin(dim=0).max() < 1e-3


def test_forward__gradients_are_the_mean_over_ranks(results: list[dict[str, Any]]):
    for result in results:
        statistics = result["statistics"]
        torch.testing.assert_close(statistics["ddp"], statistics["by_hand"], rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0]["statistics"]["ddp"], results[1]["statistics"]["ddp"])


def test_queue__equal_on_all_ranks_though_ddp_does_not_broadcast_it(results: list[dict[str, Any]]):
    assert torch.equal(results[0]["statistics"]["queue"], results[1]["statistics"]["queue"])
