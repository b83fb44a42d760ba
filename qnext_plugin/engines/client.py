"""Ask a running server over HTTP."""

import json
import os
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 600.0
KEY = "OPENAI_API_KEY"
"""The environment variable with the key that the server expects, if it expects one."""


class ServerFailed(OSError):
    """Raised if a server cannot be reached, does not answer in time, or answers something unusable."""


class Refused(ServerFailed):
    """Raised if a server refuses a request, with a status from 400 to 499."""


@dataclass(frozen=True)
class Client:
    """A server at the root ``url``. ``timeout`` limits, in seconds, how long it may stay silent."""

    url: str
    timeout: float = TIMEOUT

    @classmethod
    def at(cls, url: str) -> "Client":
        """Return the client for an address as users write it, with or without the API's ``/v1``."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is not the address of a server; expected something like http://127.0.0.1:8000")
        return cls(url.rstrip("/").removesuffix("/v1"))

    def open(self, path: str, body: Any = None) -> HTTPResponse:
        """Return the response to a GET of ``path``, or to a POST of ``body`` as JSON, when its headers are there."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as e:
            hint = f"; the key is read from {KEY}" if e.code in (401, 403) else ""
            kind = Refused if 400 <= e.code < 500 else ServerFailed
            raise kind(f"{self.url}{path}: status {e.code}: {_message(e)}{hint}") from None
        except (OSError, HTTPException) as e:
            raise ServerFailed(f"{self.url}: no answer: {getattr(e, 'reason', e) or type(e).__name__}") from None
        return response

    def text(self, path: str, body: Any = None) -> str:
        """Return the text of the response; arguments as for ``open``."""
        with self.open(path, body) as response:
            try:
                return response.read().decode(errors="replace")
            except (OSError, HTTPException) as e:
                raise ServerFailed(f"{self.url}{path}: the answer broke off: {e or type(e).__name__}") from None

    def json(self, path: str, body: Any = None) -> dict[str, Any]:
        """Return the object in the response; arguments as for ``open``."""
        text = self.text(path, body)
        with suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(text), dict):
                return found
        raise ServerFailed(f"{self.url}{path}: expected a JSON object, the answer is {text[:60]!r}")

    def ask(self, path: str) -> dict[str, Any] | None:
        """Return the object at ``path``; None from a server that has none there."""
        try:
            return self.json(path)
        except Refused:
            return None


def _message(error: urllib.error.HTTPError) -> str:
    """Return the reason in an error's body, in the forms in which servers give it."""
    with error:
        try:
            text = error.read().decode(errors="replace").strip()
        except (OSError, HTTPException):
            text = ""
    with suppress(json.JSONDecodeError, AttributeError):
        found = json.loads(text)
        inner = found.get("error", found)
        text = inner if isinstance(inner, str) else str(inner.get("message", text))
    return text[:300] or str(error.reason)
