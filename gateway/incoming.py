"""The client's end of one proxied request, as uvicorn's connection (protocol.py) and the request's `Exchange`
(proxy.py) share it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway import openai
from gateway.errors import GatewayError
from gateway.headers import Head, Header
from gateway.proxy import Exchange

if TYPE_CHECKING:
    from gateway.protocol import GatewayProtocol

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class _NoEvent:
    """What the base class sets when there is news for an ASGI `receive`; nobody waits for it here."""

    def set(self) -> None: ...


_NO_EVENT = _NoEvent()


class Client:
    """The client's end of one proxied request: what it sent, and the only way to answer it.

    Mutable: by the connection's protocol (bytes that come) and the request's `Exchange` (bytes that go).
    """

    __slots__ = (
        "_begun", "_chunked", "_flow", "_got", "_left", "_limit", "_protocol", "_size", "_timer",
        "_transport", "_unsent", "body", "declared", "disconnected", "endpoint", "exchange", "expects",
        "head", "keep_alive", "message_event", "more_body", "query", "response_complete", "version",
    )  # fmt: skip

    def __init__(
        self,
        protocol: GatewayProtocol,
        head: Head,
        length: bytes,
        endpoint: openai.Endpoint,
        query: bytes,
        version: str,
        keep_alive: bool,
    ) -> None:
        self._protocol = protocol
        self._transport: asyncio.Transport = protocol.transport
        self._flow = protocol.flow
        self._got: bytes | bytearray = b""
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
        self.head = head
        self.declared = int(length or 0)  # bytes of the body, by its head; 0 where that does not say
        self.expects = head.expects and version == "1.1"
        self.keep_alive = keep_alive
        self.body = b""  # the base class's; ours is in _got
        self.more_body = True
        self.response_complete = False
        self.disconnected = False
        self.message_event = _NO_EVENT
        self.exchange: Exchange | None = Exchange(protocol.worker, self)  # until it has ended

    def __repr__(self) -> str:
        return f"<Client {self.address} {self.exchange!r}>"

    @property
    def address(self) -> str:
        """The caller's address."""
        client = self._protocol.client
        return client[0] if client else "unknown"

    @property
    def paused(self) -> bool:
        """Whether the client reads too slowly: over 64 KiB wait to be sent."""
        return bool(self._flow.write_paused)

    def serve(self, exchange: Exchange) -> None:
        """The request is being served, for now without a task: a stopping server waits for it, too."""
        tasks: set[Any] = self._protocol.tasks  # it has `cancel`, all that is called
        tasks.add(exchange)

    def served(self, exchange: Exchange) -> None:
        """It has ended."""
        tasks: set[Any] = self._protocol.tasks
        tasks.discard(exchange)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The request's task: a stopping server waits for it, and cancels it at last."""
        protocol = self._protocol
        task = protocol.loop.create_task(coroutine)
        protocol.tasks.add(task)
        task.add_done_callback(self._ran)
        return task

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._protocol.tasks.discard(task)
        if self.exchange is not None:  # cancelled before its first step
            self.exchange.on_unrun()

    async def drained(self) -> None:
        """Wait until the client has read on."""
        await self._flow.drain()

    # --- what comes

    def begin(self) -> None:
        """It is this request's turn on its connection."""
        if self._transport.is_closing():  # between its predecessor's end and its turn
            self.gone()
            return
        self._begun = True
        self._protocol.active = self
        assert self.exchange is not None
        self.exchange.on_head()
        if self.response_complete:
            if self.more_body:
                self._arm()
            return
        if not self.more_body:
            self._complete()
            return
        if self.expects:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def run_asgi(self, app: object) -> None:
        """The base class starts a pipelined request so."""
        self.begin()
        if self.more_body:
            self.watch()

    def feed(self, data: bytes) -> None:
        """Bytes of the body; those of a refused request are dropped, and of one behind this one."""
        if self.response_complete or self.disconnected or not self.more_body:
            return
        self._size += len(data)
        if self._size > self._limit:
            self._got = b""
            if self._begun and self.exchange is not None:
                self.exchange.on_too_large(self._limit)
            return
        if not self._got:
            self._got = data
        elif type(self._got) is bytearray:
            self._got += data
        else:  # not a list: of two-byte chunks it would take 22 times their size
            self._got = bytearray(self._got)
            self._got += data
        if self._timer is not None:
            self._arm()

    def complete(self) -> None:
        """The body has ended."""
        if not self.more_body:  # that of another, which was refused behind this one
            return
        self.more_body = False
        self._disarm()
        if self.response_complete:
            if self.keep_alive:
                self._protocol.idle()
            else:
                self._protocol.close()
        elif self._begun:
            self._complete()

    def refuse(self, error: GatewayError, *, last: bool = True) -> bool:
        """End a request whose body is not whole. `last`: no more of it will be read. Returns whether it was
        one.
        """
        if not self._begun or not self.more_body or self.response_complete or self.exchange is None:
            return False
        self.keep_alive = False
        if last:
            self.more_body = False
        self.exchange.on_refused(error)
        return True

    def _complete(self) -> None:
        assert self.exchange is not None
        if self._size > self._limit:
            self.exchange.on_too_large(self._limit)
            return
        got, self._got = self._got, b""
        self.exchange.on_body(bytes(got))

    def gone(self) -> None:
        """The connection is closed."""
        self.disconnected = True
        self._disarm()
        self._got = b""
        if self.exchange is not None:
            self.exchange.on_gone()

    def watch(self) -> None:
        """All that was read is looked at, and more of the body is to come."""
        if self._timer is None and self._begun:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._protocol.loop.call_later(self._protocol.read_seconds, self._slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _slow(self) -> None:
        self._timer = None
        if self.response_complete or self.exchange is None:
            self._protocol.close()
        else:
            self.keep_alive = self.more_body = False
            self.exchange.on_slow_body(self._protocol.read_seconds)

    # --- what goes

    def start(self, status: int, headers: list[Header]) -> None:
        """Write status line and headers, which go with the first piece of the body. Without a
        content-length the body is chunked, or ends with the connection for HTTP/1.0.
        """
        lines = [STATUS_LINE.get(status) or b"HTTP/1.1 %d \r\n" % status]
        self._left = None
        for name, value in headers:
            if name == b"content-length":
                if status == 204:  # it has none, whatever a replica says
                    continue
                self._left = int(value)
            lines += (name, b": ", value, b"\r\n")
        if self._left is None and status not in (204, 304):
            self._chunked = self.version == "1.1"
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if self.expects and self.more_body and not self._size:
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
        head, self._unsent = self._unsent, b""  # one segment, one system call
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
                self._protocol.close()
        self._protocol.on_response_complete()

    def break_off(self) -> None:
        """Close the connection without a last chunk: the client must not take what it has for all."""
        self.flush()
        if self._chunked or self._left is not None:
            self._protocol.close()
        else:  # HTTP/1.0: a close is how its body ends well
            self.sever()

    def sever(self) -> None:
        """Reset the connection, with whatever the client has not read."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self.disconnected:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()
