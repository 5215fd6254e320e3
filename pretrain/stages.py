"""A stage made ready: who learns, who is frozen, the objective, the optimizer and the schedule.

The four stages of DICM run one after another in one run; each trains the parts its `StageConfig.trains` names:
`backbone` (and the heads of the contrastive loss), `redundancy` (RE), `compression` (g_a, g_s, h_a, h_s and the
entropy models). All else is frozen, its batch norms use their running statistics and its rounding is real.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.runtime import Runtime
from pretrain.codec.feature_codec import FeatureCodec
from pretrain.codec.gains import RateGains
from pretrain.config import PretrainConfig, StageConfig
from pretrain.objectives import CompressionObjective, ContrastObjective, RedundancyObjective, compression_modules
from pretrain.ssl.methods import Method

FAST = 10.0
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Stage:
    """One stage over `codec` and `method`; holds nothing that is not derived from the config and the model.

    Attributes:
        objective: the module to call, wrapped for DDP and compiled where the config says so.
        optimizer: over the trained parameters; OSS where `shard_optimizer` is on and there are several ranks.
        num_samples, num_steps: length of the stage.
    """

    def __init__(
        self,
        stage: StageConfig,
        config: PretrainConfig,
        codec: FeatureCodec,
        method: Method,
        runtime: Runtime,
        dataset_size: int,
    ):
        self.config = stage
        self.name = stage.name
        self.image_size = stage.image_size or config.image_size
        self.num_samples = round(stage.epochs * dataset_size)
        self.num_steps = math.ceil(self.num_samples / stage.batch_size)
        self.contrastive = stage.contrast > 0
        self.distributed = runtime.world > 1

        set_trained_parts(stage, codec, method)
        objective = self._objective(codec, method)
        if config.compile:
            objective.compile()
        self.module = objective
        self.objective: nn.Module = objective
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        # Before DDP: OSS moves parameters into flat buffers, and DDP must see the strides that they keep.
        self.optimizer = create_optimizer(stage, objective, config.shard_optimizer and self.distributed)
        if self.distributed:
            if self.contrastive:
                names = [f"method.{name}" for name in method.replicated_buffers]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, names)
            device_ids = [runtime.device] if runtime.device.type == "cuda" else None
            self.objective = DistributedDataParallel(
                objective,
                device_ids=device_ids,
                # Recomputation runs a backward pass inside the backward pass, once a view, and a parameter's gradient
                # is then ready twice; DDP counts that right only where it may learn the graph from the first step.
                static_graph=config.activation_checkpointing,
            )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.num_steps,
            warmup_t=round(stage.warmup * self.num_steps),
            warmup_lr_init=stage.lr * 1e-2,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set_learning_rate(self, step: int) -> float:
        """Set and return the learning rate of step `step` of this stage."""
        if self.config.cosine or step < self.scheduler.warmup_t:
            self.scheduler.step_update(min(step, self.num_steps - 1))
        return float(self.optimizer.param_groups[0]["lr"])

    def _objective(self, codec: FeatureCodec, method: Method) -> nn.Module:
        if self.contrastive:
            return ContrastObjective(method, self.config)
        if "redundancy" in self.config.trains:
            return RedundancyObjective(codec, self.config)
        return CompressionObjective(codec, self.config)


def set_trained_parts(stage: StageConfig, codec: FeatureCodec, method: Method) -> None:
    """Freeze all, then wake what `stage.trains` names: gradients on, training mode on."""
    codec.eval().requires_grad_(False)
    method.eval().requires_grad_(False)
    if stage.contrast > 0:
        method.set_redundancy("redundancy" in stage.trains)
        method.train()
        if codec.redundancy is not None:
            codec.redundancy.eval()
        for name, parameter in method.named_parameters():
            if not name.startswith(("encoder.", "momentum_encoder.")):
                parameter.requires_grad_(method.trains(name))
    for module in trained_modules(stage, codec):
        module.train()
        module.requires_grad_(True)
    for entropy_model in codec.modules():
        # Quantiles are solved by bisection when coder tables are built; no gradient reaches them.
        if isinstance(quantiles := getattr(entropy_model, "quantiles", None), nn.Parameter):
            quantiles.requires_grad_(False)


def trained_modules(stage: StageConfig, codec: FeatureCodec) -> Iterator[nn.Module]:
    """The codec's modules that `stage` trains."""
    if "backbone" in stage.trains:
        yield codec.backbone
    if "redundancy" in stage.trains:
        assert codec.redundancy is not None
        yield codec.redundancy
    if "compression" in stage.trains:
        yield from compression_modules(codec)


def create_optimizer(stage: StageConfig, objective: nn.Module, shard: bool) -> torch.optim.Optimizer:
    """The stage's optimizer over what learns in `objective`.

    Biases, norms and scales of one dimension are not decayed. Under Adam, whose steps have a size of their own,
    factorized priors and gains learn `FAST` times as fast as networks, and are not decayed. Priors begin wide, and
    until they have narrowed every latent that says nothing costs bits in every image; gains have factors to go.
    What a step of that size adds to an output grows with the inputs that the output reads: a weight of more than
    `stage.lr_fan_in` inputs learns as much more slowly (muP; Yang et al. 2022). The others come first.

    `shard` keeps each rank's share of the state only (fairscale OSS; ZeRO stage 1, Rajbhandari et al. 2020).
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    modules = [module for module in objective.modules() if isinstance(module, EntropyBottleneck | RateGains)]
    fast = {parameter for module in modules for parameter in module.parameters()}
    networks = [parameter for parameter in trained if parameter not in fast]
    fast_lr = stage.lr * (1 if stage.optimizer == "sgd" else FAST)
    shares = learning_shares(objective, stage.lr_fan_in)
    groups: list[dict[str, Any]] = [
        *(
            {
                "params": [p for p in networks if p.ndim > 1 and shares.get(p, 1.0) == share],
                "weight_decay": stage.weight_decay,
                "lr": stage.lr * share,
            }
            for share in sorted({1.0, *shares.values()}, reverse=True)
        ),
        {"params": [p for p in networks if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p in fast], "weight_decay": 0.0, "lr": fast_lr},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": stage.lr, "weight_decay": stage.weight_decay, "fused": True}
    if stage.optimizer == "sgd":
        options["momentum"] = 0.9
    if shard:
        from fairscale.optim.oss import OSS

        return OSS(groups, optim=OPTIMIZERS[stage.optimizer], **options)
    return OPTIMIZERS[stage.optimizer](groups, **options)


def learning_shares(network: nn.Module, fan_in: float) -> dict[Tensor, float]:
    """Of the learning rate, the share of each weight of a convolution or linear map with more than `fan_in` inputs.

    Of a transposed convolution an output reads one in stride x stride places of the kernel.
    """
    shares = {}
    for module in network.modules() if fan_in else ():
        if isinstance(module, nn.ConvTranspose2d):
            inputs = module.weight[:, 0].numel() / module.groups / math.prod(module.stride)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
        else:
            continue
        if inputs > fan_in:
            shares[module.weight] = fan_in / inputs
    return shares


def total_steps(config: PretrainConfig, dataset_size: int) -> int:
    """Optimizer steps of a whole run."""
    return sum(math.ceil(round(stage.epochs * dataset_size) / stage.batch_size) for stage in config.stages)
