"""What processes of tests do with runs: importable by name from any of them."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.runtime import Runtime
from pretrain.config import PretrainConfig
from pretrain.run import run
from pretrain.trainer import pretrain


class HiddenRay:
    """An importer before all others, to which Ray is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "ray":
            raise ImportError("ray is hidden")


def run_without_ray(config: PretrainConfig) -> None:
    """An import of Ray anywhere ends the run."""
    assert "ray" not in sys.modules
    torch.set_num_threads(1)  # as in the tests' own processes: sums of several threads round otherwise
    sys.meta_path.insert(0, HiddenRay())  # type: ignore[arg-type]
    run(config)


def dicm_with_small_files(largest: int, words: Sequence[str], said: Path) -> None:
    """The console command `dicm WORDS`, whose files the system lets grow to `largest` bytes; its errors go to `said`."""
    import dicm

    sys.stderr = said.open("w")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["dicm", *words]
    dicm.main()


def pretrain_each(runtime: Runtime, configs: Sequence[PretrainConfig]) -> None:
    """Run after run on the same workers, which take longer to start than these runs do."""
    for config in configs:
        pretrain(runtime, config)
