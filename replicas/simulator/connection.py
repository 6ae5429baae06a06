"""HTTP/1.1 as uvicorn speaks it, with every byte in our hands: one event per chunk, the idle close, the
sudden end.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools

_PHRASES = {int(status): status.phrase.encode() for status in HTTPStatus}


class Handler(Protocol):
    """What a connection needs of its server."""

    keep_alive: float  # seconds an idle connection is kept
    silent: bool  # the process hangs: bytes are taken, nothing is answered
    connections: set[Connection]

    def handle(self, exchange: Exchange) -> None:
        """Answer it, now or later, by calling its methods."""

    def answered(self, exchange: Exchange) -> None:
        """It is answered in full."""


class Exchange:
    """One request and the answer to it. The answering half is `respond`, or `start`, `chunk`..., `end`."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.method = ""
        self.target = b""
        self.path = ""
        self.query = ""
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.keep_alive = True
        self.status: int | None = None
        self.done = False
        self.on_gone: Callable[[], None] | None = None  # the client left before the end
        self.on_writable: Callable[[], None] | None = None  # the client reads again

    def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: bytes | None = b"application/json",
        extra: bytes = b"",
        *,
        vary: bool = True,
    ) -> None:
        """A whole answer at once. `extra` is header lines, with their ends, that come before
        content-length.
        """
        head = self._head(status) + extra + b"content-length: %d\r\n" % len(body)
        if content_type is not None:
            head += b"content-type: " + content_type + b"\r\n"
        if vary:
            head += self._origin()
        self.connection.write(head + self._close() + b"\r\n" + (b"" if self.method == "HEAD" else body))
        self._finish()

    def start(self, extra: bytes = b"") -> None:
        """The status line and headers of a stream, whole lines of `extra` among them."""
        self.connection.write(
            self._head(200)
            + extra
            + b"content-type: text/event-stream; charset=utf-8\r\n"
            + self._origin()
            + b"Transfer-Encoding: chunked\r\n"
            + self._close()
            + b"\r\n"
        )

    def chunk(self, data: bytes) -> None:
        """One HTTP chunk."""
        self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))

    def tear(self, data: bytes) -> None:
        """Half a chunk, then the end of the connection."""
        self.connection.write(b"%x\r\n%b" % (len(data), data[: len(data) // 2]))
        self.connection.close()

    def end(self) -> None:
        """The last chunk of a stream."""
        self.connection.write(b"0\r\n\r\n")
        self._finish()

    def _head(self, status: int) -> bytes:
        self.status = status
        date = formatdate(usegmt=True).encode()
        phrase = _PHRASES.get(status, b"")
        return b"HTTP/1.1 %d %b\r\ndate: %b\r\nserver: uvicorn\r\n" % (status, phrase, date)

    def _origin(self) -> bytes:
        """Any page may read it."""
        if origin := self.headers.get("origin"):
            allowed = b"access-control-allow-origin: %b\r\naccess-control-allow-credentials: true\r\n"
            return allowed % origin.encode("latin-1") + b"vary: Origin\r\n"
        return b"vary: Origin\r\n"

    def _close(self) -> bytes:
        return b"" if self.keep_alive else b"Connection: close\r\n"

    def _finish(self) -> None:
        self.done = True
        self.on_gone = self.on_writable = None
        self.connection.finished(self)


class Connection(asyncio.Protocol):
    """One client. Requests are answered one after the other, in order."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._incoming: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._idle: asyncio.TimerHandle | None = None
        self.current: Exchange | None = None
        self.writable = True
        self.was_cut = False  # what was written last may not have been sent
        self.peer = ""

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else ""
        self._handler.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connections.discard(self)
        self._transport = None
        self._stop_idle_timer()
        for exchange in (self.current, *self._queue):
            if exchange is not None and exchange.on_gone is not None:
                exchange.on_gone()

    def data_received(self, data: bytes) -> None:
        self._stop_idle_timer()
        if self._handler.silent:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.write(
                b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: "
                b"close\r\n\r\n"
            )
            self.write(b"Invalid HTTP request received.")
            self.close()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.current is not None and self.current.on_writable is not None:
            self.current.on_writable()

    # httptools

    def on_message_begin(self) -> None:
        self._incoming = Exchange(self)

    def on_url(self, url: bytes) -> None:
        assert self._incoming is not None
        self._incoming.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._incoming is not None
        self._incoming.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._incoming is not None
        if self._incoming.headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        assert self._incoming is not None
        self._incoming.body += body

    def on_message_complete(self) -> None:
        exchange, self._incoming = self._incoming, None
        assert exchange is not None
        exchange.method = self._parser.get_method().decode()
        exchange.keep_alive = self._parser.should_keep_alive()
        path, _, exchange.query = exchange.target.decode("latin-1").partition("?")
        exchange.path = path
        if self.current is None:
            self.current = exchange
            self._handler.handle(exchange)
        else:
            self._queue.append(exchange)

    # the answering side

    def write(self, data: bytes) -> None:
        """Send; a client that has left is written to in vain."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def finished(self, exchange: Exchange) -> None:
        """The current exchange is answered: on to the next, or idle, or the end."""
        self._handler.answered(exchange)
        self.current = None
        if not exchange.keep_alive:
            self.close()
        elif self._transport is None:
            self._queue.clear()
        elif self._queue:
            self.current = self._queue.popleft()
            self._loop.call_soon(self._handler.handle, self.current)
        else:
            self._idle = self._loop.call_later(self._handler.keep_alive, self.close)

    def close(self) -> None:
        """Close when everything is sent."""
        if self._transport is not None:
            self._transport.close()

    def cut(self, *, reset: bool = False) -> None:
        """End the connection now, in the middle of whatever it is; `reset` sends RST instead of FIN."""
        if self._transport is None:
            return
        self.was_cut = True
        if reset:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _stop_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
