"""A Hugging Face hub of one model on this machine: what `huggingface_hub` asks for a snapshot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret


@contextmanager
def hub_of(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as the model `name`.

    Yields:
        The endpoint for HF_ENDPOINT, and the paths asked for so far.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(path)
            if path.startswith(f"/api/models/{name}/tree/"):
                self._json([_entry(file) for file in sorted(folder.iterdir())])
            elif path.startswith(f"/api/models/{name}"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self._json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files})
            elif path.startswith(f"/{name}/resolve/") and (folder / path.split("/")[-1]).is_file():
                self._send(folder.joinpath(path.split("/")[-1]).read_bytes(), "application/octet-stream")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _json(self, content: object) -> None:
            self._send(json.dumps(content).encode(), "application/json")

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Not on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def _entry(file: Path) -> dict[str, object]:
    digest = sha256(file.read_bytes()).hexdigest()[:40]
    return {"type": "file", "oid": digest, "size": file.stat().st_size, "path": file.name}
