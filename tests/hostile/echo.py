"""A server of objects that refuses everything, and in its answers says all that it was sent: path, query, headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TypeAlias
from xml.sax.saxutils import escape

Answer: TypeAlias = Callable[[str], tuple[str, str]]
"""From what is to be said to the type and the text of an answer."""


def in_json(said: str) -> tuple[str, str]:
    """As Google's service answers."""
    return "application/json", json.dumps({"error": {"code": 403, "message": said}})


def in_xml(said: str) -> tuple[str, str]:
    """As Amazon's and Microsoft's do."""
    text = f"<Error><Code>AccessDenied</Code><Message>{escape(said)}</Message></Error>"
    return "application/xml", f"<?xml version='1.0' encoding='utf-8'?>{text}"


@contextmanager
def answering(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """Serve on a free port of the loopback interface until the block ends: (its URL, all that it has said so far)."""
    said: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # as clients need that ask whether to go on before they send

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            said.append(" ".join([self.command, self.path, *(f"{n}: {v}" for n, v in self.headers.items())]))
            kind, text = answer(said[-1])
            self.send_response(403)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.send_header("Connection", "close")  # so no thread is left when the block ends
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

        do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="echo")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", said
        finally:
            server.shutdown()
            thread.join()
