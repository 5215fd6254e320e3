"""Numbers of a run for Prometheus: which key of a row of metrics.jsonl is exported under which name.

Ray puts `ray_` before the names. `manifests/grafana_dashboard.json` shows them.
"""

from __future__ import annotations

from typing import NamedTuple


class GaugeFacts(NamedTuple):
    """Name and meaning of a metric."""

    name: str
    meaning: str


GAUGES = {
    "step": GaugeFacts("dicm_step", "Optimizer steps of the run."),
    "loss": GaugeFacts("dicm_loss", "Training loss."),
    "bpp": GaugeFacts("dicm_bpp", "Estimated bits per pixel."),
    "images_per_second": GaugeFacts("dicm_images_per_second", "Training images a second, all workers."),
    "images_per_second_per_worker": GaugeFacts("dicm_images_per_second_per_worker", "The same, of one worker."),
    "step_seconds": GaugeFacts("dicm_step_seconds", "Seconds of a step."),
    "data_wait": GaugeFacts("dicm_data_wait", "Share of time spent waiting for data, 0 to 1."),
    "world": GaugeFacts("dicm_world", "Number of workers."),
    "lr": GaugeFacts("dicm_learning_rate", "Learning rate."),
    "gpu_memory": GaugeFacts("dicm_gpu_memory_bytes", "Most memory that rank 0 had allocated on its GPU."),
    "recoveries": GaugeFacts("dicm_recoveries", "How often another group of workers took over."),
    "seconds": GaugeFacts("dicm_recovery_seconds", "Seconds from the last interruption's notice to the next step."),
}
