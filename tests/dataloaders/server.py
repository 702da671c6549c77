"""A local HTTP server that misbehaves as told."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serve(files: dict[str, bytes], behaviour: str = "ok") -> Iterator[str]:
    """Serve ``files`` by name, and give the address; others are not found.

    Behaviours: ``ok``; ``cut``: closes the connection halfway; ``corrupt``: another first byte; ``page``: HTML.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path[1:])
            if body is None:
                self.send_error(404)
                return
            bodies = {"corrupt": bytes([body[0] ^ 1]) + body[1:], "page": b"<!DOCTYPE html>please log in"}
            body = bodies.get(behaviour, body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if behaviour == "cut" else body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
