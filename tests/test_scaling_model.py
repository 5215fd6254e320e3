"""The plan for scale: its formulas against figures by hand, simulation and the real network; its page against its script."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import FOUR_STAGES, NARROW, REPOSITORY, small_run
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(REPOSITORY / "tests" / "benchmarks"))

import scaling_costs as costs
import scaling_model
from scaling_counts import StageCounts, StepCounter, broadcast_buffers, count_stages

from cluster.runtime import LocalRuntime, Runtime
from data_pipeline.order import SampleOrder
from pretrain.errors import ConfigError
from pretrain.run import resolve
from pretrain.stages import Stage
from pretrain.trainer import Trainer

INPUTS = costs.Inputs()
RECIPE = "dicm_resnet50"
WORLDS = st.sampled_from([2, 4, *scaling_model.WORLDS])
SIZES = st.floats(1, 1e10)


# Collectives


def test_ring_all_reduce__two_ranks_by_hand():
    """Each sends half of its bytes, then the sum of the other half."""
    two = replace(INPUTS, gpus_per_node=2, intra_bandwidth=100.0, intra_latency=3.0)
    assert costs.ring_all_reduce(1000.0, 2, two) == 2 * (500 / 100 + 3)
    apart = replace(two, gpus_per_node=1, inter_bandwidth=50.0, inter_latency=7.0)
    assert costs.all_gather(1000.0, 2, apart) == 500 / 50 + 7


@given(SIZES, SIZES, WORLDS, WORLDS)
def test_collectives__more_bytes_or_more_gpus_never_take_less(size: float, more: float, world: int, other: int):
    small, large = sorted((world, other))
    for seconds in (costs.ring_all_reduce, costs.tree_all_reduce, costs.all_reduce, costs.all_gather, costs.broadcast,
                    costs.all_to_all):  # fmt: skip
        assert 0 < seconds(size, small, INPUTS) <= seconds(size + more, small, INPUTS)
        assert seconds(size, small, INPUTS) <= seconds(size, large, INPUTS) * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**8)), min_size=1), st.floats(1e-3, 1))
def test_exposed__between_nothing_and_all_of_the_traffic(gradients: list[tuple[float, int]], backward: float):
    gradients.sort()
    total = sum(size for _, size in gradients) / 1e9
    seconds = costs.exposed(gradients, backward, lambda size: size / 1e9)
    assert 0 <= seconds <= total * (1 + 1e-9) + 1e-15  # times of about `backward` are subtracted
    assert costs.exposed([(1.0, size) for _, size in gradients], backward, lambda size: size / 1e9) == pytest.approx(
        total
    )
    assert costs.exposed(gradients, backward, lambda size: 0.0) == 0


def test_model_step__names_what_holds_it_up():
    stage = StageCounts("ssl", 256, 1, 10**6, 2e10, 4e10, 2000, ((1.0, 4 * 10**6),), 0, 1, 0, 10**9, 10**6, 1000, 288)
    plain = replace(INPUTS, launch=0.0, control_hop=0.0)
    assert costs.model_step(stage, 8, 256, plain, 0.4, 0.0).bottleneck == "compute"
    assert costs.model_step(stage, 8, 256, replace(plain, launch=1e-3), 0.4, 0.0).bottleneck == "launches"
    assert costs.model_step(stage, 8, 256, replace(plain, decode=1.0), 0.4, 0.0).bottleneck == "decoding"
    assert costs.model_step(stage, 8, 256, replace(plain, storage_node=1e6), 0.4, 1.0).bottleneck == "storage"
    assert costs.model_step(stage, 1024, 32768, plain, 0.4, 0.0).bottleneck == "key shuffle"
    assert costs.model_step(stage, 1024, 32768, replace(plain, exchange=True), 0.4, 0.0).bottleneck != "key shuffle"


# Shards


def test_shards_touched__reduced_as_at_full_size():
    fewer = replace(INPUTS, num_images=300_167)
    reader = costs.NodeReader.in_the_middle(8, fewer, fewer.shard_samples, room=1)
    touched: set[int] = set()
    for _ in range(reader.batches_an_epoch):
        touched.update(reader.next_shards())
    assert costs.shards_touched(8, fewer) == pytest.approx(len(touched) / fewer.num_shards, rel=0.05)


@pytest.mark.parametrize("nodes", [4, 128])
def test_shards_fetched__by_the_room_of_the_cache(nodes: int):
    touched = costs.shards_touched(nodes, INPUTS)
    assert 1 / nodes <= touched <= 1.15 / nodes
    everything = 1.01 * INPUTS.num_shards * INPUTS.shard_bytes
    assert costs.shards_fetched(nodes, INPUTS, everything) == 0
    assert 0 < costs.shards_fetched(nodes, INPUTS, everything / 2 + touched * everything / 2) <= touched


def test_shards_fetched__a_cache_below_what_a_node_touches_fetches_over_and_over():
    few = replace(INPUTS, num_images=200_000)
    assert costs.shards_fetched(1, few, 0.5 * few.num_shards * few.shard_bytes) > 20


def test_node_reader__as_the_real_cache():
    """tests/benchmarks/cache.py: 64 shards of 32 images through a cache of 16, ten epochs; 9,232 were evicted."""
    order = SampleOrder([32] * 64, seed=0, shuffle_shards=4, num_lanes=8)
    reader = costs.NodeReader(order, 0, 1, room=16, batch=64)
    for _ in range(10 * reader.batches_an_epoch):
        reader.read()
    assert reader.fetched - 16 == pytest.approx(9232, rel=0.01)


# Failures


def simulated_goodput(
    interval: float, cost: float, between: float, restart: float, delay: float, failures: int
) -> float:
    """Work kept over time that passed, event by event."""
    draw = random.Random(0)
    clock, kept, failure = 0.0, 0.0, draw.expovariate(1 / between)
    pending: list[tuple[float, float]] = []  # (when a checkpoint counts, the work in it)
    work = 0.0
    for _ in range(failures):
        while clock + interval + cost <= failure:
            clock += interval + cost
            work += interval
            pending.append((clock + delay, work))
        kept = max([kept, *(saved for when, saved in pending if when <= failure)])
        pending, work, clock = [], kept, failure
        failure = clock + draw.expovariate(1 / between)
        while clock + restart > failure:  # the next one comes before training goes on
            clock, failure = failure, failure + draw.expovariate(1 / between)
        clock += restart
    return kept / clock


@pytest.mark.parametrize(
    ("between", "cost", "restart", "delay"), [(10_000, 5, 40, 0), (2_000, 30, 100, 0), (3_000, 0.1, 60, 10)]
)
def test_goodput__as_simulated(between: float, cost: float, restart: float, delay: float):
    best = max(costs.best_interval(cost, between), delay)
    for interval in (best / 3, best, 3 * best):
        simulated = simulated_goodput(interval, cost, between, restart, delay, failures=20_000)
        assert costs.goodput(interval, cost, between, restart, delay) == pytest.approx(simulated, rel=0.01)


@given(st.floats(0.01, 300), st.floats(1_000, 10**7))
def test_best_interval__no_other_is_better(cost: float, between: float):
    best = costs.best_interval(cost, between)
    most = costs.goodput(best, cost, between, 60.0)
    for factor in (0.25, 0.5, 0.8, 1.25, 2, 4):
        assert costs.goodput(factor * best, cost, between, 60.0) <= most * (1 + 1e-3)


# Counts, beside the real network


@pytest.fixture(scope="module")
def narrow_counts() -> list[StageCounts]:
    return count_stages("small", *FOUR_STAGES, *NARROW)


@pytest.fixture
def _group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
def test_counts__gradients_and_buffers_are_those_of_ddp(narrow_counts, scenes: Path, tmp_path: Path):
    config = small_run(scenes, tmp_path / "run", "num_workers=0")
    trainer = Trainer(LocalRuntime(), config)
    for options, counts in zip(config.stages, narrow_counts, strict=True):
        stage = Stage(options, config, trainer.codec, trainer.method, Runtime(0, 2, 0, torch.device("cpu")), 48)
        ddp = stage.objective
        assert (
            counts.gradient_bytes
            == 4 * counts.num_parameters
            == ddp._get_ddp_logging_data()["total_parameter_size_bytes"]
        )
        assert counts.buffer_bytes == sum(buffer.nbytes for buffer in ddp.modules_buffers)
        assert {id(buffer) for buffer in broadcast_buffers(stage, trainer.method)} == {
            id(b) for b in ddp.modules_buffers
        }
    trainer.logger.close()


def test_counts__checkpoints_are_files_of_that_size(narrow_counts, scenes: Path, tmp_path: Path):
    config = small_run(scenes, tmp_path / "run")
    trainer = Trainer(LocalRuntime(), config)
    for index, counts in enumerate(narrow_counts):
        stage = trainer._enter_stage(index)
        trainer._train_step(stage, next(iter(trainer._batches(stage))))
        trainer._save(stage)
        trainer.store.wait()
        written = (tmp_path / "run" / "checkpoints" / f"step_{index + 1:08d}" / "state.pt").stat().st_size
        num_tensors = len(trainer.codec.state_dict()) + len(trainer.method.state_dict()) + 4 * len(stage.parameters)
        assert counts.checkpoint_bytes <= written <= counts.checkpoint_bytes + 512 * num_tensors
    trainer.logger.close()


@pytest.mark.usefixtures("_group_of_one")
def test_counts__a_step_gathers_these_bytes(narrow_counts, scenes: Path, tmp_path: Path, monkeypatch):
    config = small_run(scenes, tmp_path / "run")
    trainer = Trainer(LocalRuntime(), config)
    trainer.method.distributed = trainer.method.criterion.memory_bank.gather_distributed = True
    gathered: list[tuple[int, int]] = []
    real = dist.all_gather

    def watched(parts, tensor, **options):
        gathered.append((tensor.ndim, tensor.nbytes))
        return real(parts, tensor, **options)

    monkeypatch.setattr(dist, "all_gather", watched)
    monkeypatch.setattr("lightly.utils.dist.world_size", lambda: 2)  # the queue gathers in groups of two and more
    stage = trainer._enter_stage(0)
    trainer._train_step(stage, next(iter(trainer._batches(stage))))
    batch, counts = config.stages[0].batch_size, narrow_counts[0]
    assert sum(size for ndim, size in gathered if ndim == 4) == counts.shuffled_bytes * batch
    assert sum(size for ndim, size in gathered if ndim == 2) == counts.key_bytes * batch
    trainer.logger.close()


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (8, False), (1, True)])
def test_step_counter__a_backward_is_two_forwards(groups: int, transposed: bool):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv, images = kind(8, 8, 3, padding=1, groups=groups), torch.zeros(2, 8, 6, 6, requires_grad=True)
    with StepCounter() as counter:
        conv(images).sum().backward()
    macs = 2 * 6 * 6 * 8 * (8 // groups) * 9
    assert counter.forward_flops == 2 * macs
    assert counter.backward_flops == 4 * macs


# The page


def test_page__lists_the_inputs():
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    listed = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| `")]
    assert listed == [[f"| `{name}`", f"{value:.4g}"] for name, value in asdict(INPUTS).items()]


@pytest.fixture(scope="module")
def recipe_counts() -> list[StageCounts]:
    return count_stages(RECIPE)


@pytest.mark.slow
def test_page__its_tables_are_what_the_script_prints(recipe_counts: list[StageCounts]):
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    assert "\npython tests/benchmarks/scaling_model.py\n" in page
    assert scaling_model.create_parser().parse_args([]).recipe == RECIPE
    tables = scaling_model.tables(RECIPE, INPUTS, recipe_counts)
    assert len(tables) == 6
    for title, rows in tables.items():
        assert scaling_model.markdown(rows) in page, title


@pytest.mark.slow
def test_page__a_resnet50_has_the_flops_it_is_known_for(recipe_counts: list[StageCounts]):
    """4.09 G multiply-adds at 224 px: two queries, two keys, and the heatmap at 128 px."""
    counts = recipe_counts[0]
    assert counts.name == "ssl"
    assert counts.forward_flops == pytest.approx(2 * 4.09e9 * (4 + (128 / 224) ** 2), rel=0.02)
    assert counts.backward_flops == pytest.approx(2 * 4.09e9 * 4, rel=0.02)


def test_recipe__is_refused_where_the_page_says():
    config = resolve(RECIPE, ["data=unread", "workers=8"])
    for stage in config.stages:
        most = stage.batch_size // scaling_model.LEAST_IMAGES
        assert resolve(RECIPE, ["data=unread", f"only=[{stage.name}]", f"workers={most}"])
        with pytest.raises(ConfigError, match="less than two images"):
            resolve(RECIPE, ["data=unread", f"only=[{stage.name}]", f"workers={most + 1}"])
