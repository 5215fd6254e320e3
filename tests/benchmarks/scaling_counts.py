"""What can be counted exactly of a training step, and what can be timed without a GPU.

`count_stages(recipe)` runs a real step of each stage on two procedural images on the CPU and returns a `StageCounts` for each stage: FLOPs of
convolutions and matrix products (`torch.utils.flop_counter`; Fourier transforms and elementwise work have none),
operators dispatched, when each gradient is ready, and the bytes that the stage's parts hold.
`measure(photos, ...)` times decoding, a checkpoint's way to the disk and a number's way through gloo.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import smoke
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

from cluster.checkpoint import CheckpointStore
from cluster.local_workers import run_workers
from cluster.metrics import StepMeter
from cluster.runtime import LocalRuntime, Runtime
from data_pipeline.build import build_dataset
from data_pipeline.loader import CanvasDataset
from data_pipeline.manifest import Manifest
from data_pipeline.scenes import write_scenes
from pretrain.codec.tiles import STRIP_POSITIONS
from pretrain.config import PretrainConfig, StageConfig
from pretrain.run import resolve
from pretrain.ssl.methods.moco import MoCo
from pretrain.stages import Stage
from pretrain.trainer import Trainer

IMAGES = 2  # of the step that is counted; batch norm of the heads needs more than one
STEPS, SCENES = 2, 8  # of a stage; to train on
PRODUCTS = {
    getattr(torch.ops.aten, name) for name in ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
}
FREE = ("empty", "detach", "_unsafe_view", "_reshape_alias", "lift_fresh")  # besides views: operators without a kernel


@dataclass(frozen=True)
class StageCounts:
    """A stage of a recipe; bytes are of one rank's copy.

    Attributes:
        forward_flops, backward_flops: of an image, all of its views; the heatmap and the keys are forward.
        launches: operators that run a kernel, in one step of any batch.
        gradients: (share of the backward's FLOPs done, bytes) of each, in the order in which they are ready.
        buffer_bytes: what DDP broadcasts before each step, in `buffer_dtypes` broadcasts.
        shuffled_bytes: of an image's views, gathered by every rank to shuffle the key batches; 0 without.
        key_bytes: of an image's keys, gathered to restore their order and to fill the queue.
    """

    name: str
    batch_size: int
    epochs: float
    num_parameters: int
    forward_flops: float
    backward_flops: float
    launches: int
    gradients: tuple[tuple[float, int], ...]
    buffer_bytes: int
    buffer_dtypes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    shuffled_bytes: int
    key_bytes: int
    canvas_size: int

    @property
    def flops(self) -> float:
        """Of an image, forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def gradient_bytes(self) -> int:
        """All gradients, float32."""
        return sum(size for _, size in self.gradients)


def count_stages(recipe: str, *overrides: str) -> list[StageCounts]:
    """A `StageCounts` for each stage of a recipe."""
    wanted = resolve(recipe, ["data=unread", "workers=1", *overrides])
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "scenes"
        with smoke.light_processes():
            write_scenes(data, train=SCENES, val=1, size=64)
        small = [
            option
            for stage in wanted.stages
            for option in (
                f"stages.{stage.name}.batch_size={IMAGES}",
                f"stages.{stage.name}.epochs={STEPS * IMAGES / SCENES}",
            )
        ]
        options = [f"data={data}", f"run={scratch}/run", "workers=1", "launcher=local", "ssl.heatmap.warmup=0",
                   "num_workers=0", "knn_samples=0", "log_every=1000000", "picture_every=1000000", *overrides, *small]  # fmt: skip
        # Count what a GPU is asked for, bfloat16 where the recipe wants it.
        STRIP_POSITIONS.clear()
        with patch("pretrain.codec.precision.has_bfloat16", return_value=True), ProductsInFloat():
            trainer = Trainer(LocalRuntime(), resolve(recipe, options))
            trainer.meter = meter = CountingMeter(trainer)
            trainer.store = store = MeasuringStore(Path(scratch) / "none")
            trainer.train()
        trainer.close()
    return [
        count_stage(trainer, stage, counted, ready, checkpoint_bytes, plan)
        for (stage, counted, ready), checkpoint_bytes, plan in zip(
            meter.stages, store.sizes, wanted.stages, strict=True
        )
    ]


class CountingMeter(StepMeter):
    """Counts the second step of every stage; the first one draws a picture and makes the optimizer's state.

    Attributes:
        stages: each one's counts and, as its gradients were ready, (FLOPs of the backward done, bytes).
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.runtime)
        self.trainer = trainer
        self.stages: list[tuple[Stage, StepCounter, list[tuple[int, int]]]] = []
        self.counting = ExitStack()

    def data_arrived(self) -> None:
        """A step begins."""
        super().data_arrived()
        if self.trainer.progress.stage_step != STEPS - 1:
            return
        stage, counter, ready = self.trainer.stage, StepCounter(), []
        assert stage is not None

        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            ready.append((counter.backward_flops, parameter.grad.nbytes))

        for parameter in stage.parameters:
            self.counting.callback(parameter.register_post_accumulate_grad_hook(note).remove)
        self.counting.enter_context(counter)
        self.stages.append((stage, counter, ready))

    def step_done(self, num_samples: int) -> None:
        """It has ended."""
        self.counting.close()
        super().step_done(num_samples)


class MeasuringStore(CheckpointStore):
    """Notes how large checkpoints are, and writes none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.sizes: list[int] = []

    def save_soon(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Note the bytes of its tensors."""
        self.sizes.append(tensor_bytes(state))


def count_stage(
    trainer: Trainer,
    stage: Stage,
    counter: StepCounter,
    ready: list[tuple[int, int]],
    checkpoint_bytes: int,
    plan: StageConfig,
) -> StageCounts:
    """What was counted of a stage, with the length and the batch of the plan."""
    buffers = broadcast_buffers(stage, trainer.method)
    shuffled, keys = gathered_bytes(trainer.config, stage, trainer.method)
    return StageCounts(
        stage.name,
        plan.batch_size,
        plan.epochs,
        sum(parameter.numel() for parameter in stage.parameters),
        counter.forward_flops / IMAGES,
        counter.backward_flops / IMAGES,
        counter.launches,
        tuple((done / counter.backward_flops, size) for done, size in ready),
        sum(buffer.nbytes for buffer in buffers),
        len({buffer.dtype for buffer in buffers}),
        tensor_bytes(stage.optimizer.state_dict()),
        checkpoint_bytes,
        shuffled,
        keys,
        trainer.config.canvas_size,
    )


class ProductsInFloat(TorchDispatchMode):
    """Computes bfloat16 products in float32, which processors without bfloat16 do many times as fast; modes within see
    bfloat16.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs or {}))
        return tree_map_only(Tensor, Tensor.bfloat16, func(*args, **kwargs))


class StepCounter(TorchDispatchMode):
    """Counts FLOPs, forward and backward, and operators while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops = self.backward_flops = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry:
            with self:  # without autograd, convolutions arrive whole
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if not func.is_view and not func._opname.startswith(FREE):
            self.launches += 1
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.backward_flops += convolution_backward_flops(*args)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            flops = formula(*args, **kwargs, out_val=out)
            if torch._C._current_graph_task_id() == -1:
                self.forward_flops += flops
            else:
                self.backward_flops += flops
        return out


def convolution_backward_flops(gradient: Tensor, inputs: Tensor, weight: Tensor, *options: Any) -> int:
    """The forward's FLOPs for each of the two gradients that are wanted.

    torch's own formula takes a depthwise convolution's gradient of its weight for that of a dense one.
    """
    _, _, _, _, transposed, _, _, wanted = options
    forward = conv_flop_count(inputs.shape, weight.shape, gradient.shape, transposed)
    return forward * (wanted[0] + wanted[1])


def broadcast_buffers(stage: Stage, method: nn.Module) -> list[Tensor]:
    """The buffers that DDP sends from rank 0 to all before a step of several ranks."""
    names = {f"method.{name}" for name in method.replicated_buffers} if stage.contrastive else set()
    return [buffer for name, buffer in stage.module.named_buffers() if name not in names]


def gathered_bytes(config: PretrainConfig, stage: Stage, method: nn.Module) -> tuple[int, int]:
    """Bytes of an image that every rank gathers for MoCo: of its two views, and of its two keys."""
    if not (stage.contrastive and isinstance(method, MoCo)):
        return 0, 0
    gathers = 2  # of the keys: to restore their order, and for the queue
    return 2 * 3 * stage.image_size**2 * 4, 2 * config.ssl.dim * gathers * 4


def tensor_bytes(state: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def measure(photos: Path, checkpoint_bytes: int, canvas_size: int, repeats: int = 5) -> dict[str, float]:
    """Inputs of the model that this machine can tell; the shortest of `repeats` counts, or the median for gloo."""
    with tempfile.TemporaryDirectory() as scratch:
        root, result = Path(scratch) / "shards", Path(scratch) / "hop"
        with smoke.light_processes():
            build_dataset("imagefolder", photos, root, num_processes=1)
        name, split = next(iter(Manifest.load(root).splits.items()))
        dataset = CanvasDataset(root, name, canvas_size)
        torch.set_num_threads(1)
        decoding = [clocked(lambda: dataset.__getitems__(list(range(len(dataset))))) for _ in range(repeats)]
        state = {"weights": torch.rand(checkpoint_bytes // 4)}
        store = CheckpointStore(Path(scratch) / "checkpoints", keep=1)
        writing = [clocked(lambda: store.save(0, state), time.perf_counter) for _ in range(2)]
        run_workers(ask_to_stop, result, 2)
        hop = float(result.read_text())
    return {
        "sample_bytes": sum(shard.bytes for shard in split.shards) / split.num_samples,
        "decode": min(decoding) / len(dataset),
        "checkpoint_write": checkpoint_bytes / min(writing),
        "control_hop": hop,
    }


def clocked(function: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds that `function` takes by `clock`."""
    start = clock()
    function()
    return clock() - start


def ask_to_stop(runtime: Runtime, result: Path) -> None:
    """A worker: writes the median time of a hop of the question that ranks put to each other after every step."""
    times = [clocked(lambda: runtime.should_stop, time.perf_counter) for _ in range(2000)]
    if runtime.rank == 0:
        result.write_text(str(statistics.median(times) / math.ceil(math.log2(runtime.world))))
