"""Storage that does not answer, and checkpoints of which none is of use: nothing is deleted, nothing begins anew."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from cluster.checkpoint import CheckpointStore
from cluster.errors import CheckpointError, UnreadableError

STATE = {"model": torch.ones(1000)}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.checkpoint_faults.RETRY_SECONDS", (0.0, 0.0))


@contextmanager
def unreadable(*steps: Path) -> Iterator[None]:
    """The kernel answers reads of these checkpoints' manifests with an I/O error (EIO), as a failing disk does."""
    for step in steps:
        (step / "manifest.json").rename(step / "aside")
        (step / "manifest.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error"):
        (steps[0] / "manifest.json").read_bytes()
    yield
    for step in steps:
        (step / "aside").replace(step / "manifest.json")


def saved(folder: Path, *steps: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(folder, keep=keep)
    for step in steps:
        store.save(step, STATE)
    return store


def test_newest__a_read_error_is_told_and_no_older_one_taken(tmp_path: Path):
    saved(tmp_path, 10, 20, 30)
    store = CheckpointStore(tmp_path)
    with unreadable(tmp_path / "step_00000020", tmp_path / "step_00000030"):
        with pytest.raises(UnreadableError, match=r"step_00000030: cannot be read \(Input/output error\)") as caught:
            store.newest()
        assert "\n" not in str(caught.value)
    assert store.newest() == 30


def test_newest__a_read_error_that_passes_is_not_even_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, 10, 20)
    with unreadable(tmp_path / "step_00000020"):
        link = tmp_path / "step_00000020" / "manifest.json"

        def recover(_: float) -> None:
            link.unlink()
            link.write_bytes((link.parent / "aside").read_bytes())

        monkeypatch.setattr("time.sleep", recover)
        assert CheckpointStore(tmp_path).newest() == 20


def test_save__a_checkpoint_that_cannot_be_read_now_is_not_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = saved(tmp_path, 10, 20, 30)
    store.keep = 1
    with unreadable(tmp_path / "step_00000020", tmp_path / "step_00000030"):
        store.save(40, STATE)
    assert CheckpointStore(tmp_path).steps() == [20, 30, 40]
    assert "step_00000030: cannot be read (Input/output error)" in caplog.text


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"version": 1, "files": {"../../mine": {"bytes": 4, "sha256": "0"}}}']
)
def test_newest__a_manifest_names_files_beside_it_alone(tmp_path: Path, content: str):
    store = saved(tmp_path / "checkpoints", 10, 20)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "checkpoints" / "step_00000020" / "manifest.json").write_text(content)
    assert store.newest() == 10


def test_save__a_checkpoint_of_another_version_is_not_deleted(tmp_path: Path):
    store = saved(tmp_path, 10, 20, keep=1)
    path = tmp_path / "step_00000020" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2, "files": "laid out otherwise"}))
    named: list[str] = []
    store = CheckpointStore(tmp_path, keep=1, on_broken=lambda _, fault: named.append(fault))
    with pytest.raises(CheckpointError, match="has version 2, this program reads 1"):
        store.newest()
    store.save(30, STATE)
    assert path.is_file()
    assert store.newest() == 30


def test_save__damaged_ones_are_deleted(tmp_path: Path):
    store = saved(tmp_path, 10, 20)
    os.truncate(tmp_path / "step_00000010" / "state.pt", 100)
    store.save(30, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_newest__where_none_can_be_used_a_run_does_not_begin_anew(tmp_path: Path):
    saved(tmp_path, 10, 20)
    for step in (10, 20):
        os.truncate(tmp_path / f"step_{step:08d}" / "state.pt", 1000)
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints there can be used.*remove the folder"
    ) as caught:
        CheckpointStore(tmp_path).newest()
    for word in (str(tmp_path), "step_00000020: state.pt has 1000 bytes instead of"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


class Busy(MemoryFileSystem):
    """A store in memory whose library has errors of its own, and whose keys may not delete."""

    protocol = "busy"
    store: dict = {}  # noqa: RUF012  # as fsspec's own
    pseudo_dirs = [""]  # noqa: RUF012
    slow_down = False

    def cat_file(self, path: str, *arguments: object, **options: object) -> bytes:
        if Busy.slow_down:
            raise ClientError("An error occurred (SlowDown) when calling GetObject")
        return super().cat_file(path, *arguments, **options)

    def rm_file(self, path: str) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")


class ClientError(Exception):
    """As in botocore: of no class that Python has."""


@pytest.fixture
def busy() -> Iterator[type[Busy]]:
    fsspec.register_implementation("busy", Busy, clobber=True)
    yield Busy
    Busy.store.clear()
    Busy.slow_down = False


def test_newest__a_stores_own_error_is_one_line(busy: type[Busy]):
    CheckpointStore("busy://run").save(1, STATE)
    busy.slow_down = True
    store = CheckpointStore("busy://run")
    for read in (store.newest, store.steps, lambda: store.load(1)):
        with pytest.raises(UnreadableError, match=r"busy://run/step_00000001: cannot be read .*SlowDown") as caught:
            read()
        assert "\n" not in str(caught.value)
    busy.slow_down = False
    assert store.newest() == 1


@pytest.mark.usefixtures("busy")
def test_save__where_nothing_may_be_deleted_a_run_goes_on_and_is_told_once(caplog: pytest.LogCaptureFixture):
    store = CheckpointStore("busy://run", keep=1)
    for step in (1, 2, 3):
        store.save_soon(step, STATE)
        store.wait()
    assert store.steps() == [1, 2, 3]
    assert caplog.text.count("busy://run/step_00000001: could not be removed (Access Denied)") == 1


def test_on_saved__refused_by_the_disk_is_one_line_and_the_checkpoint_is_complete(tmp_path: Path):
    def note(_: int) -> None:
        Path("/dev/full").write_text("as a full disk answers")

    store = CheckpointStore(tmp_path, on_saved=note)
    store.save_soon(1, STATE)
    with pytest.raises(CheckpointError, match=r"step_00000001: is complete, .*No space left.*free some space"):
        store.wait()
    assert CheckpointStore(tmp_path).newest() == 1
