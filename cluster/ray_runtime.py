"""The `Runtime` of a Ray Train worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.train
import ray.train.torch

from cluster.runtime import Runtime


class RayRuntime(Runtime):
    """Rank, world and device as Ray Train assigned them; its process group is up when a worker starts."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        super().__init__(
            context.get_world_rank(),
            context.get_world_size(),
            context.get_local_rank(),
            ray.train.torch.get_device(),
        )

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Tell Ray Train; a barrier for all ranks."""
        ray.train.report(dict(metrics))
