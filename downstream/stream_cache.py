"""The training set as streams, encoded once: `cache=bitstreams`.

    FOLDER/                          RUN/streams, or `cache_folder`
      streams.json                   what the streams were made of and with
      parts/view0-000003.json        a finished part: its shards; what is there is not encoded again
      view0-part000003-000000.tar    KEY.dicm KEY.json [KEY.mask.png KEY.png]
      dataset.json                   splits view0, view1, ...: sample i of each is the i-th usable training sample

Each view is one drawing of what training does to an image before it is encoded: a crop, a mirroring. An epoch takes
them in turn, each image beginning at another one. Ranks share the parts among them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.files import write_whole
from data_pipeline.errors import DataError, SampleError
from data_pipeline.loader import MOST_IN_A_ROW
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.quarantine import BadSample, Quarantine
from data_pipeline.samples import SampleDataset
from data_pipeline.shards import ShardReader, ShardWriter
from downstream.config import FREE_KEYS, FinetuneConfig
from downstream.errors import TaskError
from downstream.latent_config import LatentConfig
from downstream.tasks.task import Task

FACTS, PARTS, STREAM = "streams.json", "parts", "dicm"
PART, MOST_PARTS = 128, 1000  # samples that are encoded at one go, and into how many parts a view falls at most
LEFTOVER_SECONDS = 3600
# Options on which no stream depends.
FREE = FREE_KEYS | {
    "data", "codec", "init", "epochs", "teacher_epochs", "transform_epochs", "batch_size", "optimizer", "lr",
    "weight_decay", "warmup", "drop_at", "precision", "cache_folder", "checkpoints", "teacher", "num_channels",
    "channels", "chosen", "transform", "backbone", "start", "val_split", "classes", "fpn_channels", "hidden", "anchors",
    "proposals", "rois", "voc07", "label_smoothing", "gate", "feature_weight", "train_head",
}  # fmt: skip


def stream_folder(config: FinetuneConfig) -> Path:
    """Where the streams of a run are."""
    return Path(config.cache_folder or Path(config.run) / "streams")


def prepare_folder(config: FinetuneConfig, inputs: dict[str, str]) -> None:
    """Make the folder of a run's streams, or see that what it holds can serve.

    Args:
        inputs: of the run (`inputs_of`).

    Raises:
        TaskError: it holds streams that were made otherwise, or something else; it cannot be written.
    """
    if config.cache != "bitstreams":
        return
    folder, wanted = stream_folder(config), _facts(config, inputs)
    try:
        if not (folder / FACTS).is_file():
            if folder.exists() and (not folder.is_dir() or any(map(_is_strange, folder.iterdir()))):
                raise TaskError(f"{folder} holds something other than streams; name another cache_folder")
            with suppress(FileExistsError):  # ranks, and other runs, may begin at the same moment
                write_whole(folder / FACTS, json.dumps(wanted, indent=2), new=True)
        found = dict(json.loads((folder / FACTS).read_text()))
    except TaskError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise TaskError(f"{folder / FACTS}: cannot be read or written ({error}); name another cache_folder") from error
    different = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if different:
        key = different[0]
        raise TaskError(
            f"{folder} holds streams that were made otherwise ({key}: {found.get(key)} there, {wanted.get(key)} here); "
            "name another cache_folder, or remove it"
        )


def _is_strange(path: Path) -> bool:
    """Whether it is neither the facts of a folder of streams nor what they are written to first."""
    return path.name.removeprefix(".").partition(".")[0] != Path(FACTS).stem


def build_streams(task: Task[Any, Any], on_part: Callable[[int, int], None] = lambda *_: None) -> bool:
    """Encode what is missing, on all ranks together; False where the run was told to stop before all was done.

    Args:
        on_part: gets the number of parts done by this rank and of all its parts.

    Raises:
        TaskError: the folder cannot be written. DataError: too many samples that cannot be used.
    """
    config, runtime = task.config, task.runtime
    folder, count = stream_folder(config), task.found.num_samples
    size = max(PART, -(-count // MOST_PARTS))
    starts = range(0, count, size)
    parts = [(view, number) for view in range(task.num_views) for number in range(len(starts))]
    quarantine = Quarantine(config.run, config.train_split, runtime.rank)
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        if runtime.rank == 0:
            _remove_leftovers(folder)
        for turn in range(0, len(parts), runtime.world):
            if turn + runtime.rank < len(parts):
                view, number = parts[turn + runtime.rank]
                if _finished(folder, view, number) is None:
                    numbers = range(starts[number], min(count, starts[number] + size))
                    shards = _encode_part(task, folder, f"view{view}-part{number:06d}", numbers, view, quarantine)
                    write_whole(_record(folder, view, number), json.dumps([asdict(shard) for shard in shards]))
            on_part(turn // runtime.world + 1, -(-len(parts) // runtime.world))
            if runtime.should_stop:
                return False
        runtime.barrier()
        if runtime.rank == 0:
            splits = {f"view{view}": Split(_shards(folder, view, len(starts))) for view in range(task.num_views)}
            Manifest(f"streams of {config.data}", tuple(config.classes), splits).save(folder)
        runtime.barrier()
    except OSError as error:
        raise TaskError(
            f"{folder}: streams cannot be written ({error.strerror or error}); free space or name another cache_folder"
        ) from error
    return True


def _record(folder: Path, view: int, number: int) -> Path:
    return folder / PARTS / f"view{view}-{number:06d}.json"


def _finished(folder: Path, view: int, number: int) -> list[Shard] | None:
    """The shards of a part that is there whole; None where it has to be encoded."""
    try:
        shards = [Shard.from_fields(one) for one in json.loads(_record(folder, view, number).read_text())]
        return shards if all((folder / shard.name).stat().st_size == shard.bytes for shard in shards) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written; another run may be filling the folder now."""
    for path in (*folder.glob(".view*"), *(folder / PARTS).glob(".view*")):
        if path.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)


def _encode_part(
    task: Task[Any, Any], folder: Path, name: str, numbers: range, view: int, quarantine: Quarantine
) -> list[Shard]:
    with ShardWriter(folder, name, max_samples=len(numbers)) as writer:
        for number in numbers:
            quarantine.read(1)
            for tried in range(MOST_IN_A_ROW):
                try:
                    image, fields = task.view((number + tried) % task.found.num_samples, view)
                    break
                except SampleError as error:
                    quarantine.add(BadSample(number + tried, str(number + tried), "", str(error)))
            else:
                raise TaskError(f"{task.config.data}: {MOST_IN_A_ROW} samples in a row from {number} cannot be used")
            writer.write({"__key__": f"{number:09d}", STREAM: task.source.encode(image), "json": {}, **fields})
    return writer.shards


def _shards(folder: Path, view: int, num_parts: int) -> tuple[Shard, ...]:
    found: list[Shard] = []
    for number in range(num_parts):
        part = _finished(folder, view, number)
        if part is None:
            raise TaskError(f"{_record(folder, view, number)}: was taken away meanwhile; run the same command again")
        found += part
    return tuple(found)


def _facts(config: FinetuneConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What streams depend on, as JSON values."""
    options = {key: value for key, value in asdict(config).items() if key not in FREE}
    # A loss that compares with features of pixels needs them beside the streams.
    gated = isinstance(config, LatentConfig) and config.reads_latents
    options["pixels"] = isinstance(config, LatentConfig) and config.distils
    if not gated or options["latents"] == "codec":
        options = {key: value for key, value in options.items() if not key.startswith("latents")}
        options["latents"] = "codec"
    made_of = {key: value for key, value in inputs.items() if key not in ("teacher", "init")}
    return json.loads(json.dumps({**options, **{f"{key} (content)": value for key, value in made_of.items()}}))


class StreamDataset(SampleDataset[dict[str, Any]]):
    """The streams of a training set; a position of the training's order says which view is read.

    Samples are raw, with the stream under `STREAM`.
    """

    def __init__(self, folder: Path, num_views: int, num_samples: int):
        manifest = Manifest.load(folder)
        super().__init__(folder, "view0", np.arange(num_samples))
        self.readers = [ShardReader(folder, manifest.split(f"view{view}")) for view in range(num_views)]

    @classmethod
    def of_task(cls, task: Task[Any, Any]) -> StreamDataset:
        """Those that a task's run trains from."""
        return cls(stream_folder(task.config), task.num_views, task.found.num_samples)

    def raw(self, number: int, position: int | None) -> dict[str, Any]:
        """Files of a sample, of the view whose turn it is."""
        turn = 0 if position is None else position // len(self)
        try:
            return self.readers[(turn + number) % len(self.readers)].read(number)
        except DataError as error:
            raise DataError(
                f"{error}; these are streams of a cache: remove {self.root}, they are made again"
            ) from error

    def load(self, sample: dict[str, Any], index: int, position: int | None) -> dict[str, Any]:
        """The sample as it is."""
        return sample
