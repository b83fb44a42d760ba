"""A hub on this machine with one model, which counts what it is asked."""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, COMMIT = "someone/a-model", "0" * 40


class FakeHub(ThreadingHTTPServer):
    """``asked`` counts requests by method, kind (``api``, ``file``, or ``range`` of one) and name; ``sent`` bytes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory, self.asked = directory, Counter[tuple[str, str, str]]()
        self.sent = 0

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that asks this hub and keeps what it gets in ``home``."""
        asks = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        patient = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        return os.environ | {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"} | asks | patient


@contextmanager
def started(directory: Path) -> Iterator[FakeHub]:
    with FakeHub(directory) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        files = sorted(file.name for file in self.server.directory.iterdir())
        if match := re.fullmatch(f"/{NAME}/resolve/(main|{COMMIT})/(.+)", path):
            self._file(match[2])
        elif re.fullmatch(f"/api/models/{NAME}/tree/(main|{COMMIT})", path):
            sizes = {file: (self.server.directory / file).stat().st_size for file in files}
            self._json([{"type": "file", "path": file, "size": size, "oid": COMMIT} for file, size in sizes.items()])
        elif re.fullmatch(f"/api/models/{NAME}(/revision/(main|{COMMIT}))?", path):
            self._json({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, "api")

    do_HEAD = do_POST = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, "api")

    def _file(self, name: str) -> None:
        file = self.server.directory / name
        if not file.exists():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, "file")
            return
        content = file.read_bytes()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._answer(206, content[first : last + 1], headers, "range")
        else:
            self._answer(200, content, headers, "file")

    def _answer(self, status: int, body: bytes, headers: dict[str, str], kind: str) -> None:
        self.server.asked[self.command, kind, self.path.partition("?")[0].rpartition("/")[2]] += 1
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(body)
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
