"""A small HTTP proxy before an S3 server, which does what networks and servers do to clients."""

from __future__ import annotations

import http.client
import re
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from shardckpt.testing.servers.certificate import Certificate


class Harm(Enum):
    """What is done to a request."""

    SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
    BUSY = (503, "ServiceUnavailable", "Please try again.")
    BROKEN = (500, "InternalError", "We encountered an internal error.")
    DENIED = (403, "AccessDenied", "Access Denied")
    FULL = (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold.")
    QUOTA = (403, "QuotaExceeded", "The quota set for the bucket is exceeded.")
    EXPIRED = (400, "ExpiredToken", "The provided token has expired.")
    RESET = "in the middle of what the client sends"
    TRUNCATED = "in the middle of the answer"
    LOST = "done by the server, but the client gets no answer"
    LATE = "done by the server at once, and answered after `LATE_S`"
    STALL = "the server never hears of it, and no answer ever comes"
    STUCK = "done by the server; half of the answer comes, and then nothing more"
    TWICE = "reaches the server twice, and the client gets the second answer"
    ERROR_INSIDE = "not done, but the answer is 200, and an error is in it, as S3 does when an upload is completed"
    GARBAGE = "not done, but the answer is 200, with a page for people in it, as gateways and login pages do"
    CUT_LISTING = "done by the server; the answer, a listing, has lost its second half, and does not say how to go on"


LATE_S = 2.5
"""Longer than a client waits that is told to wait for a second or two."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """With the query."""

    @property
    def kind(self) -> str:
        """As S3 names it; of those that are told apart here."""
        query = urlsplit(self.path).query
        if self.method == "POST":
            return "delete_objects" if "delete" in query else "complete" if "uploadId=" in query else "create_upload"
        if self.method == "PUT":
            return "part" if "uploadId=" in query else "put"
        if self.method == "GET":
            return "list" if "list-type" in query or "uploads" in query else "get"
        return {"HEAD": "head", "DELETE": "abort" if "uploadId=" in query else "delete"}[self.method]


@dataclass
class Proxy:
    """Where it is, and what it is to do."""

    endpoint: str
    upstream: str
    _rules: list[tuple[Harm, Callable[[Request], bool], list[int]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: list[Request] = field(default_factory=list)
    _given: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)
    """Set when it serves no longer."""

    @property
    def seen(self) -> list[Request]:
        with self._lock:
            return list(self._seen)

    def harm(self, harm: Harm, *kinds: str, key: str = "", times: int = 1) -> None:
        """Do this to the next requests of these kinds (any, if none is named) whose path contains `key`."""

        def matches(request: Request) -> bool:
            return (not kinds or request.kind in kinds) and key in request.path

        with self._lock:
            self._rules.append((harm, matches, [times]))

    @property
    def given(self) -> Counter[str]:
        """Bytes that were got of objects, by path."""
        with self._lock:
            return Counter(self._given)

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()
            self._seen.clear()
            self._given.clear()

    def note(self, request: Request, nbytes: int) -> None:
        """An answer of so many bytes has come from the server."""
        if request.kind == "get":
            with self._lock:
                self._given[urlsplit(request.path).path] += nbytes

    def due(self, request: Request) -> Harm | None:
        with self._lock:
            self._seen.append(request)
            for harm, matches, left in self._rules:
                if left[0] and matches(request):
                    left[0] -= 1
                    return harm
        return None


@contextmanager
def before(endpoint: str, *, certificate: Certificate | None = None) -> Iterator[Proxy]:
    """Serve on a free port of the loopback interface until the block ends; by https, if there is a certificate."""
    server = _Server(("127.0.0.1", 0), _Handler)
    if certificate is not None:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(certificate.certificate, certificate.key)
    scheme = "http" if server.tls is None else "https"
    server.proxy = Proxy(f"{scheme}://127.0.0.1:{server.server_address[1]}", endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="proxy", daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.proxy.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    proxy: Proxy
    daemon_threads = True
    block_on_close = False
    """Its clients keep connections open; they end with the client."""
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.tls is not None:  # they come to terms in the connection's own thread, as soon as it reads
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self._due: list[Harm | None] = []

    def handle_expect_100(self) -> bool:
        """The client waits for a word before it sends what it puts. A server that stalls does not give it."""
        harm = self.server.proxy.due(Request(self.command, self.path))
        if harm is Harm.STALL:
            self._wait_for_hanging_up()
            return False
        self._due.append(harm)
        return super().handle_expect_100()

    def do_GET(self) -> None:
        request = Request(self.command, self.path)
        harm = self._due.pop() if self._due else self.server.proxy.due(request)
        nbytes = int(self.headers.get("Content-Length", 0))
        if harm is Harm.RESET:
            self.rfile.read(nbytes // 2)
            self._hang_up()
            return
        body = self.rfile.read(nbytes)
        if harm is Harm.STALL:
            self._wait_for_hanging_up()
            return
        if harm is not None and (instead := _instead(harm)):
            self._answer(*instead)
            return
        if harm is Harm.TWICE:
            self._forward(body)
        status, headers, content = self._forward(body)
        self.server.proxy.note(request, len(content))
        if harm is Harm.LOST:
            self._hang_up()
            return
        if harm is Harm.LATE:
            time.sleep(LATE_S)
        if harm is Harm.CUT_LISTING:
            content = cut_listing(content)
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(content))))
        broken_off = harm in (Harm.TRUNCATED, Harm.STUCK)
        self._answer(status, headers, content, sent=len(content) // 2 if broken_off else len(content))
        if harm is Harm.TRUNCATED:
            self._hang_up()
        elif harm is Harm.STUCK:
            self._wait_for_hanging_up()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(urlsplit(self.server.proxy.upstream).netloc, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the host, too, for it is signed
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            content = answer.read()
            kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
            if self.command != "HEAD" and answer.getheader("Content-Length") is None:
                kept.append(("Content-Length", str(len(content))))
            return answer.status, kept, content
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, sent: int = -1) -> None:
        """With so many bytes of the content, all of which are promised."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: sent if sent >= 0 else None])
        self.wfile.flush()

    def _wait_for_hanging_up(self) -> None:
        """Until the client has had enough. What it still sends is taken: else its end would not be seen behind that."""
        with suppress(ConnectionError):
            while not self.server.proxy.over.is_set():
                if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(1 << 16):
                    break
        self.close_connection = True

    def _hang_up(self) -> None:
        """With a reset, not a farewell."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None: ...


def _instead(harm: Harm) -> tuple[int, list[tuple[str, str]], bytes] | None:
    """Status, headers and content that the client gets in the place of the server's answer; None if that is not how it
    is harmed."""
    if isinstance(harm.value, tuple):
        status, code, message = harm.value
    elif harm is Harm.ERROR_INSIDE:
        status, code, message = 200, *Harm.BROKEN.value[1:]
    elif harm is Harm.GARBAGE:
        page = b"<html><head><title>Welcome</title></head><body><p>Please log in.</p></body></html>"
        return 200, [("Content-Type", "text/html"), ("Content-Length", str(len(page)))], page
    else:
        return None
    content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))], content


def cut_listing(content: bytes) -> bytes:
    """A listing of objects without the second half of what it names, which says that there is more, and not where."""
    named = re.findall(rb"<(?:Contents|CommonPrefixes)>.*?</(?:Contents|CommonPrefixes)>", content, re.DOTALL)
    for entry in named[len(named) // 2 :]:
        content = content.replace(entry, b"", 1)
    content = re.sub(rb"<NextContinuationToken>.*?</NextContinuationToken>", b"", content)
    return re.sub(rb"(?i)<IsTruncated>false</IsTruncated>", b"<IsTruncated>true</IsTruncated>", content)
