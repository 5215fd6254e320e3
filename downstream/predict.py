"""What a fine-tuned run sees in images or streams: a picture and a JSON file for each.

    OUT/
      NAME.png      the image, or the features where only a stream is there, with what was found drawn on it
      NAME.json     {"source", "task", "height", "width", "bytes", "bpp", and what the task tells: "objects", ...}

An image goes through a real stream first, as in evaluation. The run's data set is not needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import encode_png

from cluster.checkpoint import open_checkpoints
from cluster.runtime import alone
from data_pipeline.decoding import decode_image
from data_pipeline.errors import DataError
from data_pipeline.files import read_file
from data_pipeline.folders import IMAGE_SUFFIXES
from downstream.errors import TaskError
from downstream.inputs import check_inputs, encoder_of
from downstream.results import RESULTS
from downstream.runs import load_run
from downstream.tasks import task_class
from downstream.tasks.task import Task
from pretrain.coding import STREAM_SUFFIX, none_left, targets_of, unread_images, write_file
from pretrain.errors import CodecError


@dataclass
class Predicted:
    """What `predict_files` wrote: counts, and the files that could not be read, each with its reason."""

    num_files: int = 0
    num_bytes: int = 0
    num_pixels: int = 0
    rejected: list[str] = field(default_factory=list)

    @property
    def bits_per_pixel(self) -> float:
        """Mean rate over all pixels."""
        return 8 * self.num_bytes / max(self.num_pixels, 1)


def predict_files(
    task: str, run: Path, sources: list[Path], out: Path, score: float = 0.5, codec: str | None = None
) -> Predicted:
    """Write a picture and a JSON file for every image and stream of `sources`.

    Args:
        task: the run's task.
        run: folder of a complete fine-tune.
        sources: images, `.dicm` streams, or folders of them.
        out: folder, made where it is missing.
        score: 0..1, least score of what is drawn; JSON holds everything.
        codec: the run's codec, where it is no longer where it was.

    Raises:
        TaskError: another task, no such run.
        DataError, CodecError: no file found, two of one name, `out` cannot be written; the only file cannot be read,
            or is a stream of another codec.
    """
    if not 0 <= score <= 1:
        raise TaskError(f"--score={score:g} is impossible; it must lie in 0..1")
    files = targets_of(sources, {*IMAGE_SUFFIXES, STREAM_SUFFIX}, out, ".json")
    own = {path for target in files.values() for path in (target, target.with_suffix(".png"))}
    if twice := [source for source in files if source.resolve() in {path.resolve() for path in own}]:
        raise TaskError(f"{twice[0]} would be overwritten by what is found in it; name another folder with -o")
    model = load_task(task, run, codec)
    result = Predicted(rejected=unread_images(sources))
    for source, target in files.items():
        try:
            prediction, picture = _predict(model, source)
        except (CodecError, DataError, TaskError) as error:
            if len(files) == 1:
                raise
            result.rejected.append(str(error))
            continue
        drawn = model.draw(picture, prediction, score)
        write_file(target.with_suffix(".png"), encode_png(drawn.contiguous()).numpy().tobytes())
        write_file(target, json.dumps(prediction, indent=2).encode() + b"\n")
        result.num_files += 1
        result.num_bytes += prediction["bytes"]
        result.num_pixels += prediction["height"] * prediction["width"]
    if result.rejected and not result.num_files:
        raise TaskError(none_left(result.rejected))
    return result


def load_task(name: str, run: Path, codec: str | None = None) -> Task[Any, Any]:
    """The network of a complete run, ready to predict.

    Raises:
        TaskError: no complete run; one of another task; its codec or weights of latents or anchor are other ones now.
    """
    kind = task_class(name)
    config = load_run(run)
    if config.task != name:
        raise TaskError(f"{run} is a run of {config.task}, not of {name}; write `dicm predict {config.task} {run} ...`")
    store = open_checkpoints(config, run)
    step = store.newest()
    if step is None or not (run / RESULTS).is_file():
        raise TaskError(f"{run}: the run is not complete; finish it with `dicm finetune {config.task} ... run={run}`")
    loaded = kind.load_codec(config, codec)
    check_inputs(run, encoder_of(config, loaded))
    task = kind(config, loaded, alone())
    task.enter(list(config.stages(0))[-1])
    task.model.load_state_dict(store.load(step)["model"])
    task.model.eval()
    return task


def _predict(task: Task[Any, Any], source: Path) -> tuple[dict[str, Any], Tensor]:
    """What the task tells of a file, and the picture (3, H, W) uint8 that it is drawn on."""
    try:
        data = read_file(source)
        if source.suffix.lower() == STREAM_SUFFIX:
            if task.config.input == "pixels":
                raise TaskError("this run reads pixels (input=pixels), not streams; give it images")
            received, height, width = task.receive_stream(data)
            picture = task.picture(received, height, width)
            num_bytes = len(data)
        else:
            picture = task.prepare(torch.from_numpy(decode_image(data)).permute(2, 0, 1).contiguous())
            height, width = picture.shape[-2:]
            received, num_bytes = task.receive_image(picture)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error
    except (CodecError, DataError, TaskError) as error:
        raise type(error)(f"{source}: {error}") from error
    facts = {
        "source": str(source), "task": task.config.task, "height": height, "width": width, "bytes": num_bytes,
        "bpp": 8 * num_bytes / (height * width),
    }  # fmt: skip
    return {**facts, **task.predict(received, height, width)}, picture
