"""A web server in a thread whose answers can be made to fail."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from disttrain.files import sha256_bytes


class Web(ThreadingHTTPServer):
    """Serves a folder. `faults[name]` says what is wrong with the next answers for a file.

    refuse: status 503; forbid: status 403; cut: half of the bytes, then the line is dropped;
    flip: one byte is another; trickle: a byte now and then; drip: so already within the headers;
    silent: no answer at all.
    """

    daemon_threads = True

    def __init__(self, folder: Path, tags: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.tags = folder, tags
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.asked: list[str] = []
        self.pause = 0.0
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def fetched(self, name: str) -> int:
        """How often the content of a file was asked for."""
        return self.asked.count(name)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no matter."""


class Answer(BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        self._begin()

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        web = self.server
        with web.lock:
            web.asked.append(name)
            fault = web.faults[name].pop(0) if web.faults[name] else ""
        if fault in ("refuse", "forbid"):
            self.send_error({"refuse": 503, "forbid": 403}[fault])
            return
        if fault == "silent":
            web.stopped.wait(20)
            return
        if fault == "drip":
            self._drip(b"HTTP/1.0 200 OK\r\nX-Long: " + b"x" * 1000)
            return
        data = self._begin()
        if data is None:
            return
        time.sleep(web.pause)
        if fault == "cut":
            data = data[: len(data) // 2]
        elif fault == "flip":
            data = data[:-1030] + bytes([data[-1030] ^ 1]) + data[-1029:]
        if fault == "trickle":
            self._drip(data)
        else:
            self.wfile.write(data)
        self.close_connection = True

    def _drip(self, data: bytes) -> None:
        for start in range(len(data)):
            self.wfile.write(data[start : start + 1])
            if self.server.stopped.wait(0.05):
                return

    def _begin(self) -> bytes | None:
        """Send the headers; returns the body."""
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            self.send_error(404)
            return None
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        if self.server.tags:
            self.send_header("ETag", f'"{sha256_bytes(data)[:16]}"')
        self.end_headers()
        return data

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path, tags: bool = True) -> Iterator[Web]:
    """A running server."""
    web = Web(folder, tags)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        web.stopped.set()
        web.shutdown()
        thread.join(10)
        web.server_close()
