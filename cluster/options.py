"""How a run is spread over a Ray cluster, and how often it may lose workers; nothing here changes what it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import RunError

ACCELERATORS = ("auto", "cpu", "gpu")
TIMEOUT_SECONDS = 1800.0  # torch's own
PLACEMENTS = ("pack", "spread")


@dataclass
class ClusterConfig:
    """Options of Ray's workers, `cluster.*` in a recipe; plain torch reads `max_failures` and `timeout_seconds`."""

    min_workers: int | None = (
        None  # go on with as few when nodes are missing; none: wait until all workers have a place
    )
    accelerator: str = "auto"  # gpu: one GPU for each worker; cpu; auto: gpu where the cluster has any
    cpus_per_worker: int = 1  # what Ray reserves for each: threads that compute on a CPU, and decoding processes
    placement: str = "pack"  # as few nodes as possible; or spread: as many
    max_failures: int = 3  # lost workers in a row without a new checkpoint, after which the run ends
    resize_seconds: float = 60.0  # how long room for more workers must stand before a group is restarted to grow
    timeout_seconds: float = TIMEOUT_SECONDS  # how long a worker waits for the others, one of which may hang

    def validate(self, workers: int) -> None:
        """Refuse what cannot work (RunError)."""
        for key, valid in (("accelerator", ACCELERATORS), ("placement", PLACEMENTS)):
            if (value := getattr(self, key)) not in valid:
                raise RunError(f"cluster.{key}={value} is unknown; use one of {', '.join(valid)}")
        if self.min_workers is not None and not 1 <= self.min_workers <= workers:
            raise RunError(
                f"cluster.min_workers={self.min_workers} is impossible with workers={workers}; it must lie in "
                f"1..{workers}"
            )
        if self.cpus_per_worker < 1:
            raise RunError(f"cluster.cpus_per_worker={self.cpus_per_worker} is impossible; it must be at least 1")
        if self.max_failures < 0:
            raise RunError(f"cluster.max_failures={self.max_failures} is impossible; it must be at least 0")
        if not self.resize_seconds >= 0:
            raise RunError(f"cluster.resize_seconds={self.resize_seconds:g} is impossible; it must be at least 0")
        if not 1 <= self.timeout_seconds < math.inf:
            raise RunError(
                f"cluster.timeout_seconds={self.timeout_seconds:g} is impossible; it must be at least 1, and finite"
            )

    def workers(self, most: int) -> int | tuple[int, int]:
        """What `cluster.launch.launch` takes: a number of workers, or (least, most)."""
        return most if self.min_workers in (None, most) else (self.min_workers, most)
