"""Pooled HTTP/1.1 connections to one replica: asyncio.Protocol + httptools, one response at a time.

Written for the hot path: httpx costs 200 us a request above the same transport. The consumer waits in
`head()` and `read()`, or is told by `sink` of each arrival; one that is too slow pauses the socket, so a
stream holds a bounded number of bytes here.

SGLang closes an idle connection after 5.000 s without a word, so one is kept for 4. A request that meets a
stale connection fails with `Stale`, and only then may it be sent again as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import httptools

from gateway.errors import BadResponse, DiedMidway, DiedSilent, Undialable, UpstreamError
from replicas import tls

IDLE_SECONDS = 4.0
# Read from a replica and not yet taken by the client's side; above it the socket is paused. With uvicorn's
# own 64 KiB
# of unsent bytes a client that reads nothing costs at most 64 + 64 + 64 (one read; 256 by TLS) KiB.
HIGH_WATER = 64 * 1024
MAX_HEAD = 64 * 1024  # bytes of status line and headers
MAX_INTERIM = 8  # 1xx answers before the real one
# A machine that vanishes (a spot node) closes nothing. Probes find that out in 15 + 3 x 5 s, where waiting
# for its answer would take `--upstream-timeout`. TCP_KEEPALIVE is macOS's name for the idle time.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_PROBES = [(getattr(socket, name), value) for name, value in _KEEPALIVE if hasattr(socket, name)]
# A pooled connection that the replica had closed shows it when it is next written to, a round trip later. One
# that closes after that did carry the request: sending it again would run it twice.
STALE_SECONDS = 1.0

Header = tuple[bytes, bytes]


class Stale(Exception):
    """The pooled connection had been closed by the replica: no byte of this request was answered."""


class Connection(asyncio.Protocol):
    """One connection. Mutable state belongs to the one request that holds it; the pool owns it in between."""

    __slots__ = (
        "_buffer", "_dry", "_error", "_head", "_interim", "_late", "_parser", "_paused", "_pool", "_received",
        "_sent", "_size", "_transport", "_waiter", "closed", "done", "headers", "idle_since", "keep",
        "reused", "sink", "started", "status",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self.closed = False
        self.reused = False
        self.idle_since = 0.0
        self.sink: Callable[[Connection], None] | None = None
        """Called when bytes, the end or a failure have come; set once the head is read."""
        self._reset()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "done" if self.done else "busy"
        return f"<Connection {self._pool.authority} {state} status={self.status} unread={self._size}>"

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self.started = False  # the head is complete
        self.done = False  # the message is complete
        self.keep = True
        self._buffer: list[bytes] = []
        self._size = 0
        self._received = 0
        self._dry = 0  # bytes since the last of a body: in a head, trailers or chunk extensions
        self._head = 0  # bytes of headers and trailers
        self._sent = self._pool.loop.time()
        self._late = False  # closed long after the request was sent
        self._interim = 0
        self._paused = False
        self._error: UpstreamError | None = None

    # --- the request's side

    def request(self, data: bytes) -> None:
        """Send one whole request."""
        self._reset()
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is not None:
            self._transport.write(data)

    async def head(self) -> None:
        """Wait for the response's head. Raises Stale, DiedSilent, DiedMidway, BadResponse, or `fail`'s
        error.
        """
        while not self.started:
            self.check()
            await self._wait()

    async def read(self) -> bytes:
        """The next bytes of the body; b"" at its end. Raises DiedMidway, BadResponse, or `fail`'s error."""
        while not self._buffer and not self.done:
            self.check()
            await self._wait()
        return self.take()

    def fail(self, error: UpstreamError) -> None:
        """Give the answer up for `error`, which the consumer meets next."""
        if self._error is None:
            self._error = error
        self.keep = False
        self.abort()
        self._tell()

    def pause(self) -> None:
        """Read no more for now."""
        if not self._paused and not self.done and not self.closed and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused:
            self._paused = False
            if not self.closed and self._transport is not None:
                self._transport.resume_reading()

    def release(self) -> None:
        """Give the connection back: reusable when its message was complete, else closed at once."""
        self.sink = None
        if (
            self.done and self.keep and not self.closed and not self._paused
            and self._transport is not None and not self._transport.get_write_buffer_size()  # not all is sent
        ):  # fmt: skip
            self._parser = None
            self._pool.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close now; the replica sees it as the client leaving."""
        if self._transport is not None and not self.closed:
            self._transport.abort()

    @property
    def exhausted(self) -> bool:
        """Whether the message is complete and all of it was read."""
        return self.done and not self._buffer

    @property
    def stale(self) -> bool:
        """Whether a pooled connection must not be used any more."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return True
        return self._pool.loop.time() - self.idle_since > IDLE_SECONDS

    async def _wait(self) -> None:
        self._waiter = waiter = self._pool.loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _tell(self) -> None:
        if self.sink is not None:
            self.sink(self)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def check(self) -> None:
        """Raise what went wrong, if anything did: Stale, DiedSilent, DiedMidway, BadResponse, `fail`'s
        error.
        """
        if self._error is not None:
            raise self._error
        if self.closed and not self.done:
            if self._received == 0:
                if self.reused and not self._late:
                    raise Stale
                raise DiedSilent("The replica closed the connection without an answer.")
            raise DiedMidway("The replica broke off its answer.")

    def take(self) -> bytes:
        """The bytes of the body that have come and were not taken yet."""
        buffer = self._buffer
        if not buffer:
            return b""
        data = buffer[0] if len(buffer) == 1 else b"".join(buffer)
        self._buffer = []
        self._size = 0
        if self._paused:
            self.resume()
        return data

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if self._pool.secure:  # else it would decrypt up to 256 KiB ahead of a slow client
            transport.set_read_buffer_limits(HIGH_WATER)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if self._parser is None:  # bytes on an idle connection belong to nobody's answer
            self.keep = False
            self.abort()
            return
        self._received += len(data)
        self._dry += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.done:
                self._fail(f"The replica's answer is not HTTP: {error}")
            self.keep = False
        if (self._head > MAX_HEAD or self._dry > MAX_HEAD) and not self.done:
            self._fail(f"The replica's answer has over {MAX_HEAD} bytes of headers.")
        self._tell()
        if self._size > HIGH_WATER:
            self.pause()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.keep = False
        self._late = self._pool.loop.time() - self._sent > STALE_SECONDS
        self._pool.forget(self)
        if self.started and not self.done and exc is None and not self._framed():
            self.done = True  # a body that ends where the connection does
        self._tell()

    def _framed(self) -> bool:
        return any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def _fail(self, message: str) -> None:
        self._error = BadResponse(message)
        self.keep = False
        if self._transport is not None:
            self._transport.abort()

    # --- httptools

    def on_message_begin(self) -> None:
        if self.done:  # bytes past the end of the message
            self.keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        if not self.started and self._head <= MAX_HEAD:  # not trailers
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self.done:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = []
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._fail("The replica sends interim answers without end.")
            return
        self.status = status
        self.started = True

    def on_body(self, body: bytes) -> None:
        self._dry = 0
        if not self.done:
            self._buffer.append(body)
            self._size += len(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self.started and not self.done:
            self.done = True
            self.keep = self.keep and bool(self._parser.should_keep_alive())


class Pool:
    """The connections to one replica. `url` is http(s)://host:port with an optional path prefix.

    `context` says how an https:// one is verified; by default by its name and the system's store.
    """

    def __init__(
        self, url: str, *, connect_timeout: float = 5.0, context: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r}: a replica's URL is http(s)://host:port")
        self.loop = asyncio.get_running_loop()
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").encode()
        self.authority = parts.netloc.rpartition("@")[2]
        self.secure = parts.scheme == "https"
        self._ssl = context or tls.context_for(url, None, None)
        self._connect_timeout = connect_timeout
        self._idle: list[Connection] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"<Pool {self.authority} idle={len(self._idle)}>"

    def pooled(self) -> Connection | None:
        """An idle connection to send one request on, the newest; None: dial."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale:
                connection.reused = True
                return connection
            connection.abort()
        return None

    async def acquire(self) -> Connection:
        """A connection to send one request on. Raises Undialable."""
        return self.pooled() or await self.dial()

    async def dial(self) -> Connection:
        """A new connection. Raises Undialable."""
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self._ssl
                )
        except TimeoutError:
            raise Undialable(f"No connection to the replica within {self._connect_timeout:g} s.") from None
        except OSError as error:
            why = tls.explain(error, self._ssl) or error.strerror or str(error)
            undialable = Undialable(f"No connection to the replica: {why}.")
            undialable.lasting = isinstance(error, ssl.SSLError)  # a wrong certificate, no TLS at all
            raise undialable from None
        return connection

    def keep(self, connection: Connection) -> None:
        """Take back a connection whose message is complete."""
        if self._closed:
            connection.abort()
            return
        connection.idle_since = self.loop.time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection closed: it is no longer offered."""
        if connection in self._idle:
            self._idle.remove(connection)

    def sweep(self) -> None:
        """Close what has been idle too long. Called about once a second."""
        for connection in [c for c in self._idle if c.stale]:
            self._idle.remove(connection)
            connection.abort()

    def close(self) -> None:
        """Close the idle connections; busy ones end with their request."""
        self._closed = True
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
