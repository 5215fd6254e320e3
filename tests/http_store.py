"""A store of files over HTTP on this machine that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("cut", "busy", "flip", "short", "long", "silent", "slow", "forbidden")


class HttpStore(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        url: of the folder.
        requests: how often each file was asked for.
        faults: by file name, what the next requests for it meet, one after the other.
        always: by file name, what every request for it meets.
        gate: while it is clear, a `silent` answer stays half finished.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}/set"
        self.requests: Counter[str] = Counter()
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.gate = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed hang up; that is no one's fault here."""


class Handler(BaseHTTPRequestHandler):
    server: HttpStore

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:  # the library's name
        name = self.path.rpartition("/")[2]
        store = self.server
        with store.lock:
            store.requests[name] += 1
            fault = store.faults[name].pop(0) if store.faults[name] else store.always.get(name, "")
        path = store.folder / name
        if fault in ("busy", "forbidden") or not path.is_file():
            self.send_error({"busy": 503, "forbidden": 403}.get(fault, 404))
            return
        body = path.read_bytes()
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        elif fault == "short":
            body = body[:half]
        elif fault == "long":
            body += b"more"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[:half])
        elif fault == "silent":
            self.wfile.write(body[:half])
            self.wfile.flush()
            store.gate.wait(60)
            self.wfile.write(body[half:])
        elif fault == "slow":
            for start in range(0, len(body), -(-len(body) // 10)):
                self.wfile.write(body[start : start + -(-len(body) // 10)])
                self.wfile.flush()
                threading.Event().wait(0.02)
        else:
            self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[HttpStore]:
    """A store of `folder` for as long as the block lasts."""
    store = HttpStore(folder)
    thread = threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.gate.set()
        store.shutdown()
        store.server_close()
        thread.join()
