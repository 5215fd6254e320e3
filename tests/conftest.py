"""Small real things that many tests use: scenes as shards, a run through all stages, its exported codec."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from http_store import HttpStore, serving
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from data_pipeline.manifest import Shard

REPOSITORY = Path(__file__).parent.parent
NARROW = [
    "codec.backbone=test_resnet",  # timm's own for tests: one block a layer, 0.4 M parameters
    "codec.re_channels=16", "codec.re_latent=16", "codec.re_depths=[1,1,1]", "codec.transform_channels=16",
    "codec.latent_channels=16", "codec.hyper_dim=24", "codec.hyper_heads=2", "codec.hyper_head_dim=12",
    "codec.z_channels=8", "ssl.queue=64", "ssl.hidden_dim=32", "ssl.dim=16", "ssl.heatmap.warmup=0",
]  # fmt: skip
SHORT = ["stages.ssl.batch_size=16", "stages.redundancy.batch_size=16", "stages.joint.batch_size=16",
         "stages.codec.batch_size=16", "stages.ssl.epochs=1", "stages.redundancy.epochs=0.5",
         "stages.joint.epochs=0.5", "stages.codec.epochs=0.5", "knn_samples=32", "log_every=1"]  # fmt: skip
FOUR_STAGES = ["codec.redundancy=true", "only=[]"]


# Speed is not what property tests are about; machines are shared.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# Read when OpenMP starts: waiting threads give their core away, and several test processes share two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray gives its workers the lowest share of a core; beside another test process they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_server_of_processes() -> None:
    """What processes are taken from has torch and the trainer, whichever test asks for one first."""
    multiprocessing.set_forkserver_preload(["data_pipeline.decoding", "pretrain.run", "downstream.evaluation.sweep"])
    forkserver.ensure_running()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remote shards go here where a test names no cache: what lies in the user's would hide that they were fetched."""
    os.environ["DICM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the folder that `make(folder)` wrote, once for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    shared = (own if worker_id == "master" else own.parent) / "once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        whole, part = shared / name, shared / f"{name}.part"
        with FileLock(shared / f"{name}.lock"):
            if not whole.is_dir():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                make(part / name)  # under its own name, which some write down
                part.rename(whole)
        return whole / name

    return made


@pytest.fixture(scope="session")
def scenes(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A data set of 48 + 16 procedural scenes of 64 px."""
    from data_pipeline.scenes import write_scenes

    return made_once("scenes", lambda folder: write_scenes(folder, train=48, val=16, size=64, seed=0))


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of random bytes in shards of equal size."""
    from noise_set import write_noise

    folder = tmp_path_factory.mktemp("store") / "set"
    write_noise(folder)
    return folder


@pytest.fixture
def store(noise: Path) -> Iterator[HttpStore]:
    """That data set, served over HTTP."""
    with serving(noise) as running:
        yield running


@pytest.fixture(scope="session")
def shards(noise: Path) -> tuple[Shard, ...]:
    """The shards of that data set."""
    from data_pipeline.manifest import Manifest

    return Manifest.load(noise).split("train").shards


def small_run(data: Path, run: Path, *overrides: str):
    """The options of a run of seconds: recipe `small`, narrow and short, all four stages, plain torch, one worker."""
    from pretrain.run import resolve

    options = [f"data={data}", f"run={run}", "launcher=local", "workers=1", *FOUR_STAGES, *NARROW, *SHORT]
    return resolve("small", [*options, *overrides])


@pytest.fixture(scope="session")
def pretrained_run(scenes: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A complete run through the four stages, with a checkpoint of the end of each."""
    from pretrain.run import run

    options = ["keep_checkpoints=100", "checkpoint_every=100"]
    return made_once("whole", lambda folder: run(small_run(scenes, folder, *options)))


@pytest.fixture(scope="session")
def exported_codec(pretrained_run: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The codec of `pretrained_run`, exported."""
    from pretrain.export import export

    return made_once("codec", lambda folder: export(pretrained_run, folder))


@dataclass
class Result:
    """What a command left: exit code and the two outputs."""

    returncode: int
    stdout: str
    stderr: str


def dicm(*arguments: str | Path) -> Result:
    """Run the console command in this process: starting Python and torch anew takes longer than most commands."""
    import dicm as command

    stdout, stderr, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dicm", *map(str, arguments)]
    os.environ["COLUMNS"] = "200"
    code = 0
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            command.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
    return Result(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """`unreadable(folder)`: the folder cannot be listed, as one without permission; root reads those all the same."""
    closed: set[str] = set()

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def listing(path: Any = ".") -> Any:
            if os.fspath(path) in closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return function(path)

        return listing

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    return lambda folder: closed.add(str(folder))


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2, one line of error at the end of stderr that holds all `words`, no traceback."""
    assert result.returncode == 2, result.stderr + result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
