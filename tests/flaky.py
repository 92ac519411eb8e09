"""An S3 server that fails: moto's, behind a proxy that answers 500 or 503, stalls, or hangs up half way.

Faults are by request, so that a test says which ones go wrong, and how often.
"""

from __future__ import annotations

import http.client
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Fault = Literal["500", "503", "stall", "cut"]
# Of a request that it is asked for: method, path with its query, and how many requests came before it.
Faults = Callable[[str, str, int], Fault | None]
LENGTHS = ("content-length", "transfer-encoding")
# Nothing is held up when a test is over.
STALL_S = 60.0


class _Handler(http.server.BaseHTTPRequestHandler):
    """Passes a request on and its answer back, or does what the fault says."""

    protocol_version = "HTTP/1.1"
    server: FlakyStore

    def _answer(self) -> None:
        body = self._body()
        fault = self.server.next_fault(self.command, self.path)
        if fault in ("500", "503"):
            self._send(int(fault), b"", {})
            return
        if fault == "stall":
            self.server.over.wait(STALL_S)
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=STALL_S)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in LENGTHS}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        self._send(answer.status, answer.read(), dict(answer.getheaders()), fault == "cut")
        upstream.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while length := int(self.rfile.readline().strip(), 16):
            chunks.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815 - http.server calls them so

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(content))) if self.command == "HEAD" else len(content)
        for name, value in headers.items():
            if name.lower() not in (*LENGTHS, "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *words: object) -> None:
        """Silent."""


class FlakyStore(http.server.ThreadingHTTPServer):
    """The proxy. `faults` may be changed at any time; `requests` are those that came since then."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.over = upstream, threading.Event()
        self._lock = threading.Lock()
        self._faults: Faults = lambda method, path, before: None
        self.requests: list[tuple[str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is what is tested here."""

    def fail(self, faults: Faults) -> None:
        """Let requests go wrong from now on."""
        with self._lock:
            self._faults, self.requests = faults, []

    def heal(self) -> None:
        """Let all requests pass."""
        self.fail(lambda method, path, before: None)

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            return self._faults(method, path, len(self.requests) - 1)

    def uri(self, path: str) -> str:
        """The URI of a path in the store, `bucket/...`."""
        port = self.server_address[1]
        return f"s3://{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@contextmanager
def flaky_store(bucket: str) -> Iterator[FlakyStore]:
    """A store with one bucket; credentials go to the environment."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs as pafs

    os.environ |= {"AWS_ACCESS_KEY_ID": "dmx", "AWS_SECRET_ACCESS_KEY": "dmx"}  # nothing is asked of them
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    pafs.FileSystem.from_uri(f"s3://{bucket}/{options}")[0].create_dir(bucket)
    store = FlakyStore(port)
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.over.set()
        store.shutdown()
        server.stop()
