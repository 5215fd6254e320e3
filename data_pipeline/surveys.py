"""Surveys: which samples of a split serve a task, and what is left out, counted.

    CACHE/surveys/SHA256.npz   what was found, under the hash of manifest, split and inspection

A survey reads every shard, which takes hours where a data set is large and far away. It depends on the manifest and
the inspection alone, so it is kept in the cache of remote shards; the data set itself may be read-only. A split that
is surveyed in a moment is looked at each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.cache import ShardCache, default_root
from data_pipeline.errors import DataError, SampleError
from data_pipeline.files import Replacing
from data_pipeline.manifest import Manifest, Shard, Split
from data_pipeline.parallel import ordered_map
from data_pipeline.shards import ShardReader

VERSION = 1  # to be raised where an inspection comes to find something else in the same sample
IN_ONE_PROCESS = 500  # samples that are surveyed faster than processes start

Inspection = Callable[[dict[str, Any]], tuple[int, Counter[str]]]

logger = logging.getLogger(__name__)


class UnusableError(SampleError):
    """A sample that says nothing a task could use; its message is the reason, the same for all samples of a kind."""


class Survey(NamedTuple):
    """What a split holds for a task."""

    usable: np.ndarray  # int64 dataset indexes of the samples that serve, ascending
    found: int  # objects, or whatever was counted
    left_out: dict[str, int]  # reason -> count


def survey(root: str | Path, split: str, inspect: Inspection, cache: ShardCache | None = None) -> Survey:
    """Look at every sample of a split, or remember what an earlier look found.

    Args:
        inspect: gets a raw sample and returns how much it holds and what of it is left out, reason -> count; raises
            UnusableError for a sample that does not serve, DataError for one that ends the survey. It travels to
            other processes.
        cache: of the shards of a URL, and of surveys; in the default place if not given.

    Raises:
        DataError: no such split, a damaged shard, or a sample that cannot be read.
    """
    manifest = Manifest.load(root)
    chosen = manifest.split(split)
    if chosen.num_samples <= IN_ONE_PROCESS:
        return _joined(chosen, map(partial(_survey_shard, root=root, inspect=inspect, cache=cache), chosen.shards))
    identity = pickle.dumps((VERSION, manifest.hash, split, inspect), protocol=4)
    folder = (cache.root if cache is not None else default_root()) / "surveys"
    path = folder / f"{hashlib.sha256(identity).hexdigest()}.npz"
    if (known := _load(path, chosen.num_samples)) is not None:
        return known
    look = partial(_survey_shard, root=root, inspect=inspect, cache=cache)
    several = len(chosen.shards) > 1
    parts = ordered_map(look, chosen.shards, chunk=1, preload=[__name__]) if several else map(look, chosen.shards)
    found = _joined(chosen, parts)
    _save(path, found, chosen.num_samples)
    return found


def _joined(split: Split, parts: Any) -> Survey:
    """The survey of a split of those of its shards, in order."""
    usable, found, left_out, start = [], 0, Counter[str](), 0
    for shard, (numbers, count, reasons) in zip(split.shards, parts, strict=True):
        usable += [start + number for number in numbers]
        start += shard.samples
        found += count
        left_out += reasons
    return Survey(np.array(usable, dtype=np.int64), found, dict(left_out))


def _survey_shard(
    shard: Shard, root: str | Path, inspect: Inspection, cache: ShardCache | None
) -> tuple[list[int], int, Counter[str]]:
    reader = ShardReader(root, Split((shard,)), cache)
    usable, found, left_out = [], 0, Counter[str]()
    for number in range(shard.samples):
        sample = reader.read(number)
        try:
            count, reasons = inspect(sample)
        except UnusableError as error:
            left_out[str(error)] += 1
        except DataError as error:
            raise DataError(f"{root}/{shard.name}: sample {sample['__key__']}: {error}") from error
        else:
            usable.append(number)
            found += count
            left_out += reasons
    return usable, found, left_out


def _save(path: Path, survey: Survey, num_samples: int) -> None:
    """Keep a survey, a bit a sample; where the cache refuses, say so: the next start looks again."""
    serves = np.zeros(num_samples, dtype=bool)
    serves[survey.usable] = True
    facts = json.dumps({"found": survey.found, "left_out": survey.left_out})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacing(path) as file:
            np.savez(file, serves=np.packbits(serves), facts=np.array(facts))
    except OSError as error:
        logger.warning(
            "%s: the survey of the data set cannot be kept (%s), so the next start makes it again; name a folder that "
            "can be written to by shard_cache=DIR or $DICM_CACHE",
            path.parent,
            error.strerror,
        )


def _load(path: Path, num_samples: int) -> Survey | None:
    """The survey kept in a file; None where there is none that is whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            serves = np.unpackbits(kept["serves"], count=num_samples)
            facts = json.loads(str(kept["facts"]))
        return Survey(np.flatnonzero(serves).astype(np.int64), facts["found"], facts["left_out"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: a survey that cannot be read (%s); the data set is looked at again", path, error)
        return None
