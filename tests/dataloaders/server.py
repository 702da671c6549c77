"""A local HTTP server that misbehaves as told."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers request n for a path with the n-th of its behaviours, the last one from then on.

    Behaviours: ``ok``; ``slow``: bit by bit; ``drop N``: closes after N bytes; ``short N``: says that N
    bytes are all; ``corrupt``: another first byte; ``page``: an HTML page; ``stall``: no byte; a number: that
    status.
    """

    behaviours: dict[str, list[str]] = {}
    content: dict[str, bytes] = {}
    requests: list[tuple[str, str | None]] = []
    ranges = True

    def do_GET(self) -> None:
        kind = type(self)
        kind.requests.append((self.path, self.headers.get("Range")))
        behaviours = kind.behaviours.get(self.path, ["404"])
        behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        action, _, number = behaviour.partition(" ")
        if action.isdigit():
            self.send_error(int(action))
            return
        body = kind.content[self.path]
        if action == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif action == "page":
            body = b"<!DOCTYPE html><html>please log in</html>"
        elif action == "short":
            body = body[: int(number)]
        start = 0
        if kind.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self._send(body[start:], action, number)

    def _send(self, body: bytes, action: str, number: str) -> None:
        if action == "drop":
            self.wfile.write(body[: int(number)])
            self.close_connection = True
        elif action == "stall":
            time.sleep(1.0)
        elif action == "slow":
            for position in range(0, len(body), len(body) // 8 + 1):
                self.wfile.write(body[position : position + len(body) // 8 + 1])
                time.sleep(0.03)
        else:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that leave early are what is tested


@contextmanager
def serve(
    content: dict[str, bytes], behaviours: dict[str, list[str]], *, ranges: bool = True
) -> Iterator[tuple[str, list]]:
    """Serve ``content`` (path -> bytes); gives the address and the list of (path, Range header) asked for."""
    handler = type(
        "Handler",
        (Handler,),
        {
            "content": content,
            "behaviours": {path: list(actions) for path, actions in behaviours.items()},
            "requests": [],
            "ranges": ranges,
        },
    )
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
