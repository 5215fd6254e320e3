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
from pretrain.evaluation import write_summary
from pretrain.initialize import create_codec
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


def summarize(runtime: Runtime, config: PretrainConfig) -> None:
    """`write_summary` of a codec that was not trained; the number of images that each rank coded, to RUN/RANK.txt."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    codec, coded = create_codec(config).eval(), []
    encode_batch = codec.encode_batch

    def counted(images: torch.Tensor, rate: float | None = None) -> list[bytes]:
        coded.append(len(images))
        return encode_batch(images, rate)

    codec.encode_batch = counted  # type: ignore[assignment, method-assign]
    with torch.no_grad():  # as if the last step had left other statistics on other ranks
        for name, buffer in codec.named_buffers():
            if "running_mean" in name:
                buffer += 0.1 * runtime.rank
    write_summary(runtime, config, codec, {"step": 7})
    Path(config.run, f"{runtime.rank}.txt").write_text(str(sum(coded)))


def pretrain_each(runtime: Runtime, configs: Sequence[PretrainConfig]) -> None:
    """Run after run on the same workers, which take longer to start than these runs do."""
    for config in configs:
        pretrain(runtime, config)
