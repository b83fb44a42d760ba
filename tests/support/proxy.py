"""A proxy in front of a server, which changes its answers."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.listening import listening


@contextmanager
def in_front_of(url: str, change: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """Yield the URL of a proxy that passes each answer to a POST through ``change``, which writes into it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.forward(None)

        def do_POST(self) -> None:
            self.forward(self.rfile.read(int(self.headers["Content-Length"])))

        def forward(self, body: bytes | None) -> None:
            request = urllib.request.Request(url + self.path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=180) as response:
                    status, content = response.status, response.read()
            except urllib.error.HTTPError as e:
                status, content = e.code, e.read()
            if body is not None and status == 200 and b'"stream": true' not in body:
                answer = json.loads(content)
                change(answer)
                content = json.dumps(answer).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with listening(Handler) as at:
        yield at
