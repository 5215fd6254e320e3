"""Run folders of fine-tunes: what a run was begun with, and the networks of complete ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.checkpoint import open_checkpoints
from cluster.recipes import config_diff, load_saved, read_recipe
from downstream.config import FREE_KEYS, FinetuneConfig
from downstream.errors import TaskError
from downstream.inputs import check_inputs
from downstream.results import RESULTS
from downstream.tasks import task_class

RECIPES = Path(__file__).parent / "recipes"


def check_earlier_run(config: FinetuneConfig, folder: Path, inputs: dict[str, str]) -> None:
    """Refuse to continue a run under other options or with other inputs (TaskError with the difference).

    A run that never came to a checkpoint may be begun anew with other ones: they may be what stopped it.

    Raises:
        CheckpointError: it has checkpoints, of which none can be used.
    """
    if not (folder / "config.yaml").is_file():
        return
    earlier = load_run(folder)
    # Its checkpoints lie where its own options say. Damaged ones are an earlier run's, too.
    if not (folder / RESULTS).is_file() and open_checkpoints(earlier, folder).newest() is None:
        return
    differences = [item for item in config_diff(earlier, config) if item.key.partition(".")[0] not in FREE_KEYS]
    if differences:
        shown = "; ".join(f"{item.key}: {item.before} there, {item.after} here" for item in differences[:3])
        raise TaskError(f"run={folder} holds a run with other options ({shown}); use another run folder")
    check_inputs(folder, inputs)


def load_run(folder: Path) -> FinetuneConfig:
    """The options of the run in `folder`, which is its `run` (TaskError where it holds none)."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise TaskError(f"{folder}: not a run folder (no config.yaml); name one that `dicm finetune` wrote")
    config = load_saved(task_class(str(read_recipe(path, RECIPES).get("task"))).Config, path)
    config.run = str(folder)
    return config


def check_init(config: FinetuneConfig) -> None:
    """See that `config.init` is a complete run whose network fits (TaskError)."""
    if config.init is None:
        return
    earlier = load_run(Path(config.init))
    if not (Path(config.init) / RESULTS).is_file():
        raise TaskError(
            f"init={config.init}: the run is not complete; finish it with `dicm finetune {earlier.task} ...`"
        )
    for key in ("task", "classes"):
        if (there := getattr(earlier, key)) != (here := getattr(config, key)):
            raise TaskError(f"init={config.init} has {key} {there}, not {here}; name a run of the same {key}")


def trained_weights(folder: Path) -> dict[str, Any]:
    """The network of the complete run in `folder` (TaskError where there is none)."""
    store = open_checkpoints(load_run(folder), folder)
    step = store.newest()
    if step is None:
        raise TaskError(f"{folder}: no checkpoint is left of this run; finish it with `dicm finetune`, or name another")
    return store.load(step)["model"]
