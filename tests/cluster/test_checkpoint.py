from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.checkpoint import CheckpointStore
from cluster.errors import CheckpointError

REPOSITORY = Path(__file__).parents[2]


def state(value: float = 1.0, size: int = 1000) -> dict:
    return {
        "version": 1,
        "progress": {"step": 3, "rate": 0.5, "name": "ssl", "done": False, "none": None},
        "model": OrderedDict(weight=torch.full((size,), value), count=torch.tensor(7)),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }


def damage(path: Path, position: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_load__returns_what_was_saved(tmp_path: Path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert Path(store.save(200, state(2.5))) == tmp_path / "checkpoints" / "step_00000200"
    loaded = CheckpointStore(tmp_path / "checkpoints").load(200)
    assert torch.equal(loaded["model"]["weight"], torch.full((1000,), 2.5))
    assert loaded["progress"] == state()["progress"]
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.99)}]


def test_save__manifest_lists_size_and_sha256_of_what_is_on_disk(tmp_path: Path):
    import hashlib

    folder = Path(CheckpointStore(tmp_path).save(1, state()))
    data = (folder / "state.pt").read_bytes()
    entry = json.loads((folder / "manifest.json").read_text())["files"]["state.pt"]
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_steps__ascending_and_the_newest_is_kept(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 100_000_000, 99_999_999):
        store.save(step, state())
    assert store.steps() == [5, 99_999_999, 100_000_000]
    assert store.newest() == 100_000_000


def test_save__keeps_the_newest_and_drops_the_rest(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        store.save(step, state())
    assert store.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_save__a_damaged_newer_checkpoint_takes_no_other_ones_place(tmp_path: Path):
    """After going on from step 1, because 2 is damaged, the new step 1.5 must survive its own retention."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(20, state())
    damage(tmp_path / "step_00000020" / "state.pt")
    store.save(15, state())
    assert CheckpointStore(tmp_path).newest() == 15


def test_save__again_replaces(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1.0))
    store.save(1, state(2.0))
    assert store.load(1)["model"]["weight"][0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_newest__none_without_a_folder(tmp_path: Path):
    store = CheckpointStore(tmp_path / "nowhere")
    assert store.newest() is None
    assert store.steps() == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda folder: damage(folder / "state.pt"), "state.pt is damaged"),
        (lambda folder: os.truncate(folder / "state.pt", 100), "state.pt has 100 bytes instead of"),
        (lambda folder: (folder / "state.pt").unlink(), "state.pt cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda folder: os.truncate(folder / "manifest.json", 20), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_newest__a_broken_checkpoint_is_named_and_passed_over(tmp_path: Path, harm, word: str):
    CheckpointStore(tmp_path).save(1, state())
    harm(Path(CheckpointStore(tmp_path).save(2, state())))
    named: list[tuple[str, str]] = []
    store = CheckpointStore(tmp_path, on_broken=lambda name, fault: named.append((name, fault)))
    assert store.newest() == 1
    assert store.newest() == 1
    assert [Path(name).name for name, _ in named] == ["step_00000002"]
    assert word in named[0][1]
    with pytest.raises(CheckpointError, match="step_00000002"):
        store.load(2)


def test_newest__damage_after_it_was_verified_is_seen(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.save(1, state())
    store.save(2, state())
    assert store.newest() == 2
    damage(tmp_path / "step_00000002" / "state.pt")
    assert store.newest() == 1


def test_newest__says_so_in_the_log_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    CheckpointStore(tmp_path).save(1, state())
    damage(Path(CheckpointStore(tmp_path).save(2, state())) / "state.pt")
    assert CheckpointStore(tmp_path).newest() == 1
    assert "step_00000002" in caplog.text
    assert "passed over" in caplog.text


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("kind", ["torch", "pickle", "garbage", "list"])
def test_load__foreign_content_is_refused_and_not_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """Even with a manifest that fits: only tensors and plain values are read."""
    import hashlib

    monkeypatch.chdir(tmp_path)
    folder = Path(CheckpointStore(tmp_path).save(1, state()))
    path = folder / "state.pt"
    if kind == "torch":
        torch.save({"model": Harmful()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(pickle.dumps({"model": Harmful()}) if kind == "pickle" else b"\x80\x02" + bytes(range(256)))
    data = path.read_bytes()
    files = {"state.pt": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "step": 1, "files": files}))
    with pytest.raises(CheckpointError, match=r"remove .*step_00000001") as caught:
        CheckpointStore(tmp_path).load(1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_load__missing_step_names_those_there_are(tmp_path: Path):
    store = CheckpointStore(tmp_path)
    store.save(3, state())
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there are: 3"):
        store.load(4)


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("x"), Harmful()])
def test_save__what_could_not_be_loaded_again_is_refused_at_once(tmp_path: Path, value: object):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        CheckpointStore(tmp_path).save(1, {"a": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_save__file_too_large_leaves_earlier_ones_whole(tmp_path: Path):
    """The kernel refuses the bytes past a limit in mid-write (EFBIG)."""
    CheckpointStore(tmp_path).save(1, state())
    program = (
        "import resource, signal, sys, torch\n"
        "from cluster.checkpoint import CheckpointStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try: CheckpointStore(sys.argv[1]).save(2, {'model': torch.zeros(1_000_000)})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    out, err = python(program, tmp_path).communicate(timeout=100)
    assert out.startswith("CheckpointError"), out + err
    for word in (str(tmp_path), "step 2", "earlier ones are whole", "free some space"):
        assert word in out
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert CheckpointStore(tmp_path).newest() == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of 1 MB needs root")
@pytest.mark.parametrize("size", [400_000, 250_000])  # full in the middle, full near the end
def test_save__full_file_system_leaves_earlier_ones_whole(tmp_path: Path, size: int):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("this container may not mount")
    try:
        store = CheckpointStore(disk / "checkpoints")
        store.save(1, {"model": torch.zeros(15_000)})
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*free some space"):
            store.save(2, {"model": torch.zeros(size)})
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_00000001"]
        assert store.newest() == 1
        store.save(3, {"model": torch.zeros(15_000)})
        assert CheckpointStore(disk / "checkpoints").newest() == 3
    finally:
        subprocess.run(["umount", disk], check=True)


def test_save__folder_that_refuses(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoints: the checkpoint of step 1 could not be written"):
        CheckpointStore(tmp_path / "checkpoints").save(1, state())


def test_save__killed_at_any_moment_leaves_a_whole_newest(tmp_path: Path):
    """SIGKILL while checkpoints are written one after another, at several moments."""
    program = (
        "import sys, torch\n"
        "from cluster.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1], keep=2)\n"
        "first = (store.newest() or 0) + 1\n"
        "print('ready', flush=True)\n"
        "for step in range(first, 10**6): store.save(step, {'step': step, 'model': torch.full((500_000,), step)})\n"
    )
    last = 0
    for delay in (0.137, 0.053):
        process = python(program, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while not (store := CheckpointStore(tmp_path)).steps():
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        named: list[str] = []
        store = CheckpointStore(tmp_path, on_broken=lambda path, fault, named=named: named.append(fault))  # type: ignore[misc]
        step = store.newest()
        assert step is not None
        assert step >= last
        assert named == []
        assert store.load(step)["step"] == step
        last = step
    store.save(last + 1, state())
    assert not list(tmp_path.glob(".step_*"))


def test_save_soon__what_is_written_is_the_state_of_that_moment(tmp_path: Path):
    store, weights = CheckpointStore(tmp_path), torch.zeros(3_000_000)
    store.save_soon(1, {"model": weights})
    weights.fill_(1.0)  # training goes on
    store.wait()
    assert not CheckpointStore(tmp_path).load(1)["model"].any()


def test_save_soon__an_error_comes_with_the_next_call_and_earlier_ones_stay(tmp_path: Path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, state())
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    (tmp_path / "checkpoints").write_text("in the way")
    store.save_soon(2, state())
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 could not be written.*earlier ones are whole"):
        store.save_soon(3, state())
    assert CheckpointStore(tmp_path / "aside").newest() == 1


def test_on_saved__called_once_the_checkpoint_is_complete(tmp_path: Path):
    there: list[tuple[int, list[int]]] = []
    store = CheckpointStore(tmp_path, on_saved=lambda step: there.append((step, CheckpointStore(tmp_path).steps())))
    store.save_soon(1, state())
    store.save_soon(2, state())
    store.wait()
    assert there == [(1, [1]), (2, [1, 2])]


def test_save__keeps_the_newest_one_in_so_many_steps_and_the_best(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2, keep_every=100, keep_best=True)
    for step in range(10, 260, 10):
        store.save(step, state(), score=0.9 if step == 70 else 0.5)
    assert store.steps() == [10, 70, 100, 200, 240, 250]


def test_note_score__a_better_one_takes_its_place(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=True)
    for step, score in ((1, 0.2), (2, 0.7), (3, 0.4), (4, 0.6)):
        store.save(step, state())
        store.note_score(step, score)
    assert store.steps() == [2, 4]
    assert CheckpointStore(tmp_path).newest() == 4


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch):
    """A bucket on an S3 server of this machine."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    files = s3fs.S3FileSystem(use_listings_cache=False)
    yield files
    files.rm("bucket", recursive=True)
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_store__on_s3_as_in_a_folder(s3):
    url = "s3://bucket/runs/one/checkpoints"
    store = CheckpointStore(url, keep=2)
    assert store.newest() is None
    for step in (1, 2, 3):
        store.save_soon(step, state(float(step)))
    store.wait()
    other = CheckpointStore(url)
    assert other.steps() == [2, 3]
    assert other.newest() == 3
    assert other.load(3)["model"]["weight"][0] == 3.0
    assert sorted(s3.ls("bucket/runs/one/checkpoints/step_00000003")) == [
        "bucket/runs/one/checkpoints/step_00000003/manifest.json",
        "bucket/runs/one/checkpoints/step_00000003/state.pt",
    ]


def test_store__on_s3_removes_what_a_dead_writer_left_once_it_is_old(s3, monkeypatch: pytest.MonkeyPatch):
    """A state without its manifest, and the parts of one whose upload was not completed."""

    def uploads() -> list[str]:
        return [upload["Key"] for upload in s3.call_s3("list_multipart_uploads", Bucket="bucket")["Uploads"]]

    dead, other = "checkpoints/step_00000001/state.pt", "others/step_00000001/state.pt"
    s3.pipe_file(f"bucket/{dead}", b"of a dead writer")
    s3.pipe_file("bucket/checkpoints/notes/state.pt", b"of someone else")
    for key in (dead, other):
        s3.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    assert uploads() == [dead, other]
    store = CheckpointStore("s3://bucket/checkpoints")
    store.save(2, {"model": torch.zeros(3)})
    assert uploads() == [other]  # this server says of every upload that it was begun in 2010
    assert s3.exists(f"bucket/{dead}")  # young: its writer may be alive
    monkeypatch.setattr("cluster.checkpoint_folders.LEFTOVER_SECONDS", -5.0)
    store.save(3, {"model": torch.zeros(3)})
    assert not s3.exists(f"bucket/{dead}")
    assert s3.exists("bucket/checkpoints/notes/state.pt")
    assert store.steps() == [2, 3] and store.newest() == 3


def test_store__on_s3_names_what_is_damaged_and_takes_no_half(s3):
    url = "s3://bucket/checkpoints"
    store = CheckpointStore(url)
    store.save(1, state())
    store.save(2, state())
    data = bytearray(s3.cat_file("bucket/checkpoints/step_00000002/state.pt"))
    data[-40] ^= 1
    s3.pipe_file("bucket/checkpoints/step_00000002/state.pt", bytes(data))
    s3.pipe_file("bucket/checkpoints/step_00000003/state.pt", b"as far as the node got")
    named: list[tuple[str, str]] = []
    again = CheckpointStore(url, on_broken=lambda name, fault: named.append((name, fault)))
    assert again.newest() == 1
    assert [name for name, _ in named] == [f"{url}/step_00000002"]
    assert "sha256" in named[0][1]


def test_store__that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match=r"s3://bucket/checkpoints: cannot be read.*check the address") as caught:
        CheckpointStore("s3://bucket/checkpoints").newest()
    assert "\n" not in str(caught.value)


def test_store__of_an_unknown_kind_is_refused():
    with pytest.raises(CheckpointError, match="checkpoints=ftps3://bucket cannot be opened"):
        CheckpointStore("ftps3://bucket")
