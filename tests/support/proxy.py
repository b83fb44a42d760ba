"""A proxy in front of a server, which changes its answers."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
