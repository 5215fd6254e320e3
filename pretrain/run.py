"""The driver of a pretraining run: checks everything that can be checked, then launches the workers.

Nothing is started, and nothing written, before the recipe, the data and an earlier run in the same folder agree.
"""

from __future__ import annotations

from pathlib import Path

from cluster import runtime
from cluster.metrics import ProgressFollower
from cluster.recipes import config_diff, load_config, load_saved, save_config
from cluster.run_folder import check_folder, held_run
from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from pretrain.codec.pretrained import keep
from pretrain.config import PretrainConfig
from pretrain.errors import ConfigError
from pretrain.stages import total_steps
from pretrain.trainer import pretrain

RECIPES = Path(__file__).parent / "recipes"

# What may change between a run and its continuation: how it runs, not what it computes.
FREE_KEYS = {
    "run", "workers", "launcher", "cluster", "num_workers", "shard_cache", "shard_cache_limit", "accumulate",
    "micro_batch", "compile", "shard_optimizer", "activation_checkpointing", "log_every", "picture_every",
    "checkpoint_every", "keep_checkpoints", "keep_every", "keep_best", "knn_every", "knn_samples",
}  # fmt: skip


def resolve(recipe: str, overrides: list[str]) -> PretrainConfig:
    """The options of `dicm pretrain RECIPE key=value ...`, checked (RecipeError, ConfigError)."""
    return load_config(PretrainConfig, recipe, overrides, RECIPES)


def run(config: PretrainConfig) -> Path:
    """Pretrain on the workers that `config` asks for, or go on with the run in `config.run`; returns that folder.

    Raises:
        DataError: the data set is missing, damaged, or smaller than a batch.
        ConfigError, RunError: the run folder holds a run with other options, is in use or cannot be made; a worker
            failed.
    """
    folder = Path(config.run)
    check_folder(folder)
    num_samples = check_data(config)
    check_earlier_run(config, folder)
    if (folder / "summary.json").is_file():
        return folder
    with held_run(folder):
        keep(config.init, folder)
        save_config(config, folder / "config.yaml")
        with ProgressFollower(folder, total_steps(config, num_samples)):
            runtime.run(
                pretrain,
                config,
                workers=config.workers,
                launcher=config.launcher,
                run_dir=config.run,
                cluster=config.cluster,
            )
    return folder


def check_data(config: PretrainConfig) -> int:
    """Number of training samples; DataError where a batch does not fit into the data set."""
    num_samples = Manifest.load(config.data).split(config.split).num_samples
    for stage in config.stages:
        if stage.batch_size > num_samples:
            raise DataError(
                f"stages.{stage.name}.batch_size={stage.batch_size} is larger than the data set: {config.data} has "
                f"{num_samples} samples in {config.split}; use a batch of at most {num_samples} or more data"
            )
    return num_samples


def check_earlier_run(config: PretrainConfig, folder: Path) -> None:
    """Refuse to continue a run under other options (ConfigError with the difference)."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    differences = [
        line
        for line in config_diff(load_saved(PretrainConfig, path), config)
        if line.key.partition(".")[0] not in FREE_KEYS
    ]
    if differences:
        shown = "; ".join(f"{line.key}: {line.before} there, {line.after} here" for line in differences[:3])
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ConfigError(f"run={folder} holds a run with other options ({shown}{more}); use another run folder")
