"""As much of the Hugging Face hub as a stream asks for, on this machine: one data set, `me/set`, at one commit."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "a" * 40


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.bytes_sent = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any  # a _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if re.fullmatch(r"/api/datasets/me/set(/revision/[^/]+)?", path):
            files = [{"rfilename": entry["path"]} for entry in self._below(self.server.root, True)]
            return self._json({"id": "me/set", "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        tree = re.match(r"/api/datasets/me/set/tree/[^/]+/?(.*)", path)
        if tree and (self.server.root / tree[1]).is_dir():
            return self._json(self._below(self.server.root / tree[1], "recursive=true" in self.path.lower()))
        file = re.match(r"/datasets/me/set/resolve/[^/]+/(.*)", path)
        if file and (self.server.root / file[1]).is_file():
            return self._range((self.server.root / file[1]).read_bytes())
        self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        """Facts of the paths that are named in the body."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._json([self._entry(self.server.root / name) for name in names if (self.server.root / name).exists()])

    def _below(self, folder: Path, deep: bool) -> list[dict[str, Any]]:
        return [self._entry(path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]

    def _entry(self, path: Path) -> dict[str, Any]:
        kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
        return {"type": kind, "oid": "b" * 40, "size": size, "path": path.relative_to(self.server.root).as_posix()}

    def _range(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, {"ETag": '"e"'})
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        self._send(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.bytes_sent += len(body)


@contextmanager
def hub_with(root: Path) -> Iterator[_Server]:
    """A hub whose set `me/set` has the files of a folder."""
    server = _Server(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
