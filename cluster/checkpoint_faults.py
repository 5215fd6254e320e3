"""Whether a checkpoint is whole: damage that is proven, told apart from storage that does not answer.

In: a folder of checkpoints and a step. Out: what is wrong with it, or None. Only what a manifest, a size or a digest
proves counts against a checkpoint. A read error proves nothing: it is tried again, then raised, because to pass over a
checkpoint costs the work since the one before it, and to take an intact one for damaged may cost the file itself.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from cluster.checkpoint_folders import MANIFEST, STATE, CheckpointFolder
from cluster.errors import UnreadableError, reason_of

VERSION = 1
RETRY_SECONDS = (0.5, 2.0)  # waited before a read is tried again
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint cannot be used.

    Attributes:
        what: a few words.
        is_damage: whether it is of no use to anyone; a checkpoint of another version of this program is.
    """

    what: str
    is_damage: bool = True


def find_fault(folder: CheckpointFolder, step: int, name: str, *, hashes: bool) -> Fault | None:
    """What is wrong with the checkpoint of `step`, or None.

    Args:
        name: of the checkpoint, to be shown.
        hashes: also compare contents.

    Raises:
        UnreadableError: it could not be read, several times; nothing is known of it.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return _look(folder, step, hashes)
        except Exception as error:  # the stores' libraries share no class of their own
            if pause is None:
                raise unreadable(name, error) from error
            time.sleep(pause)
    raise AssertionError  # the last turn returns or raises


def unreadable(name: str, error: Exception) -> UnreadableError:
    """The one line for a checkpoint that the storage would not give."""
    return UnreadableError(
        f"{name}: cannot be read ({reason_of(error)}), which does not mean that it is damaged; nothing was removed; "
        "see that its storage answers, and run the same command again"
    )


def read_manifest(folder: CheckpointFolder, step: int) -> dict[str, Any]:
    """The manifest of a step, of any version (ManifestError: damaged; or what the storage raises)."""
    with folder.read(step, MANIFEST) as file:
        content = file.read()
    try:  # the reading stays outside: a store's own ValueError is no damage
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError from error
    if not isinstance(manifest, dict) or "version" not in manifest:
        raise ManifestError
    return manifest


class ManifestError(ValueError):
    """A manifest that is no JSON, or lacks what every manifest has; told as a `Fault`."""


def _look(folder: CheckpointFolder, step: int, hashes: bool) -> Fault | None:
    file = MANIFEST
    try:
        manifest = read_manifest(folder, step)
        if manifest["version"] != VERSION:
            return Fault(f"has version {manifest['version']}, this program reads {VERSION}", is_damage=False)
        expected = _listed(manifest)
        for file, (size, sha256) in expected.items():
            if (found := folder.size(step, file)) != size:
                return Fault(f"{file} has {found} bytes instead of {size}")
            if hashes:
                with folder.read(step, file) as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
                        return Fault(f"{file} is damaged (its sha256 is not that of the manifest)")
    except ABSENT as error:
        return Fault(f"{file} cannot be read ({error.strerror or reason_of(error)})")
    except ManifestError:
        return Fault(f"{MANIFEST} is damaged")
    return None if STATE in expected else Fault(f"its manifest does not list {STATE}")


def _listed(manifest: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file of a manifest; the files lie beside it."""
    try:
        if any("/" in name for name in manifest["files"]):
            raise ManifestError
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError from error
