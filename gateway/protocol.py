"""uvicorn's HTTP protocol, with the proxied paths served by us: no ASGI between the socket and the relay.

uvicorn keeps the life cycle, the limits, TLS and every other path (those go to the ASGI app). A POST to a
path of `openai.ENDPOINTS` gets a `Client` where uvicorn would make its `RequestResponseCycle`, so the base
class works on with the few attributes that it needs: `response_complete`, `keep_alive`, `disconnected`,
`message_event`. They are private to uvicorn 0.35, which SkyPilot pins; `tests/gateway/test_fast_path.py`
fails where they change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway import openai
from gateway.headers import Header
from gateway.proxy import Exchange

if TYPE_CHECKING:
    from gateway.worker import Worker

# A request's head, or the next bytes of its body, must come within this; also how long the rest of a refused
# body is read before its connection is closed (nginx's lingering_time): closing with unread bytes resets the
# connection, and the client might never see the answer that it was sent before.
READ_SECONDS = 30.0


class _NoEvent:
    """What the base class sets when there is news for an ASGI `receive`; nobody waits for it here."""

    def set(self) -> None: ...


class Client:
    """The client's end of one proxied request: what it sent, and the only way to answer it.

    Mutable: by the connection's protocol (bytes that come) and the request's `Exchange` (bytes that go).
    """

    __slots__ = (
        "_begun", "_chunked", "_flow", "_left", "_limit", "_parts", "_protocol", "_size", "_timer",
        "_transport", "_unsent", "body", "disconnected", "endpoint", "exchange", "expects", "headers",
        "keep_alive", "message_event", "more_body", "query", "response_complete", "version",
    )  # fmt: skip

    def __init__(
        self,
        protocol: GatewayProtocol,
        endpoint: openai.Endpoint,
        query: bytes,
        version: str,
        keep_alive: bool,
    ) -> None:
        self._protocol = protocol
        self._transport: asyncio.Transport = protocol.transport
        self._flow = protocol.flow
        self._parts: list[bytes] = []
        self._size = 0
        self._limit = protocol.worker.settings.max_body
        self._chunked = False
        self._left: int | None = None  # bytes still owed under a content-length
        self._begun = False
        self._unsent = b""  # the head, until the first piece of the body goes with it
        self._timer: asyncio.TimerHandle | None = None
        self.endpoint = endpoint
        self.query = query
        self.version = version
        self.headers: list[Header] = protocol.headers
        self.expects = protocol.expect_100_continue
        self.keep_alive = keep_alive
        self.body = b""  # the base class's; ours is in _parts
        self.more_body = True
        self.response_complete = False
        self.disconnected = False
        self.message_event = _NoEvent()
        self.exchange: Exchange | None = Exchange(protocol.worker, self)  # until it has ended

    def __repr__(self) -> str:
        return f"<Client {self.address} {self.exchange!r}>"

    @property
    def address(self) -> str:
        """The caller's address."""
        client = self._protocol.client
        return client[0] if client else "unknown"

    @property
    def scheme(self) -> str:
        return self._protocol.scheme or "http"

    @property
    def paused(self) -> bool:
        """Whether the client reads too slowly: over 64 KiB wait to be sent."""
        return bool(self._flow.write_paused)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The request's task: a stopping server waits for it."""
        protocol = self._protocol
        task = protocol.loop.create_task(coroutine)
        protocol.tasks.add(task)
        task.add_done_callback(protocol.tasks.discard)
        return task

    async def drained(self) -> None:
        """Wait until the client has read on."""
        await self._flow.drain()

    # --- what comes

    def begin(self) -> None:
        """It is this request's turn on its connection."""
        self._begun = True
        self._protocol.active = self
        assert self.exchange is not None
        self.exchange.on_head()
        if self.response_complete:
            return
        if not self.more_body:
            self._complete()
            return
        if self.expects:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._arm()

    async def run_asgi(self, app: object) -> None:
        """The base class starts a pipelined request so."""
        self.begin()

    def feed(self, data: bytes) -> None:
        """Bytes of the body; those of a refused request are dropped."""
        if self.response_complete or self.disconnected:
            return
        self._size += len(data)
        if self._size > self._limit:
            self._parts.clear()
            if self._begun and self.exchange is not None:
                self.exchange.on_too_large(self._limit)
            return
        self._parts.append(data)
        if self._timer is not None:
            self._arm()

    def complete(self) -> None:
        """The body has ended."""
        self.more_body = False
        self._disarm()
        if self.response_complete:
            if not self.keep_alive:
                self._transport.close()
        elif self._begun:
            self._complete()

    def _complete(self) -> None:
        assert self.exchange is not None
        if self._size > self._limit:
            self.exchange.on_too_large(self._limit)
            return
        parts, self._parts = self._parts, []
        self.exchange.on_body(parts[0] if len(parts) == 1 else b"".join(parts))

    def gone(self) -> None:
        """The connection is closed."""
        self.disconnected = True
        self._disarm()
        self._parts.clear()
        if self.exchange is not None:
            self.exchange.on_gone()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._protocol.loop.call_later(READ_SECONDS, self._slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _slow(self) -> None:
        self._timer = None
        if self.response_complete or self.exchange is None:
            self._transport.close()
        else:
            self.keep_alive = self.more_body = False
            self.exchange.on_slow_body(READ_SECONDS)

    # --- what goes

    def start(self, status: int, headers: list[Header]) -> None:
        """Write status line and headers, which go with the first piece of the body. Without a
        content-length the body is chunked, or ends with the connection for HTTP/1.0.
        """
        lines = [STATUS_LINE.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self._left = None
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            lines += (name, b": ", value, b"\r\n")
        if self._left is None and status not in (204, 304):
            self._chunked = self.version == "1.1"
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if self.expects and self.more_body and not self._parts:
            self.keep_alive = False  # its body may or may not come: what follows cannot be told apart
            self.more_body = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._unsent = b"".join(lines)

    def flush(self) -> None:
        """Send the head by itself, where no body follows at once."""
        if self._unsent:
            self._transport.write(self._unsent)
            self._unsent = b""

    def write(self, data: bytes) -> None:
        """Write a piece of the body. Raises ValueError beyond the content-length."""
        if self._unsent:  # one segment, one system call
            head, self._unsent = self._unsent, b""
        else:
            head = b""
        if self._chunked:
            self._transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))
            return
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("more body than its content-length")
        self._transport.write(head + data if head else data)

    def finish(self, data: bytes = b"") -> None:
        """Write the last piece and end the response well."""
        if not self._chunked:
            self.write(data)
            if self._left:
                raise ValueError("less body than its content-length")
        elif data:
            self._transport.write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (self._unsent, len(data), data))
        else:
            self._transport.write(self._unsent + b"0\r\n\r\n")
        self._unsent = b""
        self.response_complete = True
        if not self.keep_alive:
            if self.more_body:
                self._arm()
            else:
                self._transport.close()
        self._protocol.on_response_complete()

    def break_off(self) -> None:
        """Close the connection without a last chunk: the client must not take what it has for all."""
        self._transport.close()

    def sever(self) -> None:
        """Reset the connection, with whatever the client has not read."""
        self._transport.abort()


class GatewayProtocol(HttpToolsProtocol):
    """One connection of the public port. Mutable: `active`, the proxied request whose turn it is."""

    active: Client | None = None
    _head_timer: asyncio.TimerHandle | None = None

    @property
    def worker(self) -> Worker:
        worker: Worker = self.app.worker
        return worker

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(READ_SECONDS, self._slow_head)

    def on_message_begin(self) -> None:
        # The scope is made only for what goes to the ASGI app.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        parser = self.parser
        if parser.get_method() == b"POST":
            query = b""
            endpoint = openai.ENDPOINTS.get(self.url)
            if endpoint is None:
                parsed = httptools.parse_url(self.url)
                endpoint, query = openai.ENDPOINTS.get(parsed.path or b""), parsed.query or b""
            if endpoint is not None and not parser.should_upgrade():
                self._proxied(endpoint, query)
                return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def _proxied(self, endpoint: openai.Endpoint, query: bytes) -> None:
        version, previous = self.parser.get_http_version(), self.cycle
        keep_alive = version == "1.1" and bool(self.parser.should_keep_alive())
        client = Client(self, endpoint, query, version, keep_alive)
        self.cycle = client  # type: ignore[assignment]  # see the module
        if previous is None or previous.response_complete:
            client.begin()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((client, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        cycle: Any = self.cycle
        if type(cycle) is Client:
            cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        cycle: Any = self.cycle
        if type(cycle) is Client:
            cycle.complete()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        waiting: list[Any] = [client for client, _ in self.pipeline]
        active, self.active = self.active, None
        latest: Any = self.cycle
        super().connection_lost(exc)
        for client in {id(c): c for c in (active, latest, *waiting)}.values():
            if type(client) is Client:
                client.gone()
        if type(latest) is Client:
            self.cycle = None  # type: ignore[assignment]  # no reference cycle: the memory is to go now

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.active is not None and self.active.exchange is not None:
            self.active.exchange.on_writable()

    def _slow_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
