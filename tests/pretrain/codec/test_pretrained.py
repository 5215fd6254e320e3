from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.codec.pretrained import is_hub_id, keep, kept, locate
from pretrain.errors import CodecError

COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """A hub with one codec, me/codec, of which there is the revision v1; what of the hub's protocol a download needs."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:  # the library's name
        self.do_GET()

    def do_GET(self) -> None:  # the library's name
        self.server.requests.append(self.path)
        path, files = self.path.partition("?")[0], self.server.files
        if path == "/api/models/me/codec/revision/v1":
            entries = [{"rfilename": name} for name in files]
            self._answer(json.dumps({"id": "me/codec", "sha": COMMIT, "siblings": entries}).encode())
        elif path == f"/api/models/me/codec/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith(f"/me/codec/resolve/{COMMIT}/") and path.rpartition("/")[2] in files:
            self._answer(files[path.rpartition("/")[2]])
        else:
            self.send_error(404)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(folder)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_is_hub_id__owner_and_name_with_or_without_a_revision(tmp_path: Path):
    assert all(map(is_hub_id, ("me/codec", "me/codec@v1", "me/codec@refs/pr/1", f"me/codec@{COMMIT}")))
    assert not any(map(is_hub_id, (str(tmp_path), "codec", "./codec", "../me/codec", "me/codec@", "a/b/c", "me/../x")))


def test_keep__a_pinned_codec_is_fetched_once_a_run(hub: Hub, folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    keep("me/codec@v1", run)
    asked = len(hub.requests)
    shutil.rmtree(tmp_path / "hub")  # another machine's cache holds nothing
    keep("me/codec@v1", run)
    found = locate(kept("me/codec@v1", run))
    assert len(hub.requests) == asked > 0 and found.is_relative_to(run)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == hub.files
    assert [path.name for path in (run / "codecs").iterdir()] == ["me--codec@v1"]


def test_keep__a_folder_stays_where_it_is(folder: Path, tmp_path: Path):
    keep(str(folder), tmp_path)
    assert list(tmp_path.iterdir()) == [] and kept(str(folder), tmp_path) == str(folder)


def test_keep__a_revision_that_there_is_not_is_named(hub: Hub, tmp_path: Path):
    with pytest.raises(CodecError, match="me/codec@v2: no such folder, and not fetched from the hub"):
        keep("me/codec@v2", tmp_path / "run")
    assert not (tmp_path / "run").exists()
