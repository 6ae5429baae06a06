"""uvicorn's HTTP protocol, with the proxied paths served by us: no ASGI between the socket and the relay.

uvicorn keeps the life cycle, the limits, TLS and every other path (those go to the ASGI app). A POST to a
path of `openai.ENDPOINTS` gets a `Client` where uvicorn would make its `RequestResponseCycle`, so the base
class works on with the few attributes that it needs: `response_complete`, `keep_alive`, `disconnected`,
`message_event`. They are private to uvicorn 0.35, which SkyPilot pins; `tests/gateway/test_fast_path.py`
fails where they change.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway import openai
from gateway.errors import BadRequest, End, GatewayError, Shutdown
from gateway.headers import Head
from gateway.incoming import Client

if TYPE_CHECKING:
    from gateway.worker import Worker

# A request's head, or the next bytes of its body, must come within this; also how long the rest of a refused
# body is read before its connection is closed (nginx's lingering_time): closing with unread bytes resets the
# connection, and the client might never see the answer that it was sent before.
READ_SECONDS = 30.0
# Bytes that come without any of a body among them: a head, trailers, chunk extensions. llhttp has no limit.
MAX_HEAD = 64 * 1024
MAX_AHEAD = 64 * 1024  # bytes of requests that wait for their turn; then no more are read
MAX_KEPT = 4096  # bytes of a head that is remembered until the next request


class GatewayProtocol(HttpToolsProtocol):
    """One connection of the public port. Mutable: `active`, the proxied request whose turn it is; what is
    known of the parser's state; timers.
    """

    read_seconds = READ_SECONDS
    active: Client | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None  # until the client must have read what it was sent
    _in_head = True  # or before the next one; not in a body or its trailers
    _dry = 0  # bytes since a head or a piece of a body was complete
    _ahead = 0  # bytes read since a request had to wait for its turn
    _idle_since: float | None = None  # loop time; None: not between two requests
    _held_up = False  # the next request waits until the client has read its answers so far
    _length = b""  # of the body, as the head declares it
    _head: Head | None = None  # the last one

    @property
    def worker(self) -> Worker:
        worker: Worker = self.app.worker
        return worker

    # --- what comes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.read_seconds, self._slow_head)

    def data_received(self, data: bytes) -> None:
        self._dry += len(data)
        super().data_received(data)
        if self._dry > MAX_HEAD:
            self._refuse(_too_large())
        if self.pipeline:
            self._ahead += len(data)
            self._bound_pipeline()
        cycle: Any = self.cycle
        if type(cycle) is Client and cycle.more_body:
            cycle.watch()
        if (
            (cycle is None or cycle.response_complete)
            and self._idle_since is None
            and self._head_timer is None
            and not (type(cycle) is Client and cycle.more_body)
            and not self.transport.is_closing()
        ):
            self._head_timer = self.loop.call_later(self.read_seconds, self._slow_head)

    def on_message_begin(self) -> None:
        # The scope is made only for what goes to the ASGI app.
        self.url = b""
        self.headers = []
        self._length = b""
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer: nobody asked for it
            if len(name) == 14 and name.lower() == b"content-length":  # of all lines the one that varies
                self._length = value
            else:
                self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():  # behind a request that was the last
            return
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._unset_keepalive_if_required()  # of a request that was refused in this same read
        if self._dry > MAX_HEAD and sum(len(n) + len(v) for n, v in self.headers) > MAX_HEAD:
            self._refuse(_too_large())
            return
        self._dry = 0
        parser = self.parser
        if parser.should_upgrade():  # the parser leaves it here: its body would be read as a request
            self._refuse(BadRequest("No upgrade is served: send it without.", code="upgrade_not_served"))
            return
        if parser.get_method() == b"POST":
            query = b""
            endpoint = openai.ENDPOINTS.get(self.url)
            if endpoint is None:
                parsed = httptools.parse_url(self.url)
                endpoint, query = openai.ENDPOINTS.get(parsed.path or b""), parsed.query or b""
            if endpoint is not None:
                self._in_head = False
                self._proxied(endpoint, query)
                return
        url, head, length = self.url, self._read_head(), self._length
        super().on_message_begin()
        self.url, self.expect_100_continue = url, head.expects
        self.headers.extend(head.lines)
        if length:
            self.headers.append((b"content-length", length))
        super().on_headers_complete()
        self._in_head = False

    def _proxied(self, endpoint: openai.Endpoint, query: bytes) -> None:
        version, previous = self.parser.get_http_version(), self.cycle
        keep_alive = version == "1.1" and bool(self.parser.should_keep_alive())
        client = Client(self, self._read_head(), self._length, endpoint, query, version, keep_alive)
        self.cycle = client  # type: ignore[assignment]  # see the module
        if (previous is None or previous.response_complete) and not self._held_up:
            client.begin()
        else:  # read on: a client that leaves is to be noticed
            self.pipeline.appendleft((client, self.app))  # type: ignore[arg-type]

    def _read_head(self) -> Head:
        head = self._head
        if head is None or head.raw != self.headers:
            address = self.client[0] if self.client else "unknown"
            head = Head(self.headers, address, self.scheme or "http")
            self._head = head if sum(len(n) + len(v) for n, v in self.headers) <= MAX_KEPT else None
        return head

    def on_body(self, body: bytes) -> None:
        self._dry = 0
        cycle: Any = self.cycle
        if type(cycle) is Client:
            cycle.feed(body)
        elif cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._dry = 0
        self._in_head = True
        cycle: Any = self.cycle
        if type(cycle) is Client:
            cycle.complete()
        elif cycle is not None:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """It was refused (`on_headers_complete`); uvicorn would say to install a library."""

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        self._refuse(BadRequest(msg))

    def _refuse(self, error: GatewayError) -> None:
        """Close for what came, with an answer where one is due and no other is under way."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle
        if type(cycle) is Client and cycle.refuse(error):
            return
        if self._in_head and (cycle is None or cycle.response_complete) and not self.pipeline:
            body = openai.error_body(error)
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
                % (STATUS_LINE[error.status], len(body), body)
            )
            self.worker.count(self.worker.default_service, "other", error.status, error.end)
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._read_timer = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        waiting: list[Any] = [client for client, _ in self.pipeline]
        active, self.active = self.active, None
        latest: Any = self.cycle
        # First, while it is still known what the client had not read.
        for client in {id(c): c for c in (active, latest, *waiting)}.values():
            if type(client) is Client:
                client.gone()
        super().connection_lost(exc)
        self.pipeline.clear()
        if type(latest) is Client:
            self.cycle = None  # type: ignore[assignment]  # no reference cycle: the memory is to go now

    def _slow_head(self) -> None:
        self._head_timer = None
        self.close()

    # --- what goes

    def on_response_complete(self) -> None:
        """An answer is written: the next request's turn, unless the client does not read."""
        if self.flow.write_paused and not self.transport.is_closing():
            self._held_up = True
            self.flow.pause_reading()
            self._must_read()
            return
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            task = self.loop.create_task(cycle.run_asgi(app))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)
            self._bound_pipeline()
        else:
            self._ahead = 0
            self._idle()

    def _bound_pipeline(self) -> None:
        if not self.pipeline:
            self._ahead = 0
        elif self._ahead > MAX_AHEAD and not self.transport.is_closing():
            self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None and not self.transport.is_closing():
            self._read_timer.cancel()
            self._read_timer = None
        if self.active is not None and self.active.exchange is not None:
            self.active.exchange.on_writable()
        if self._held_up:
            self._held_up = False
            if self.pipeline or self.cycle.response_complete:
                self.on_response_complete()
            else:
                self.flow.resume_reading()

    def idle(self) -> None:
        """The rest of a refused request has come: the connection may wait for the next."""
        if self._idle_since is None and not self.transport.is_closing():
            self._idle()

    def _idle(self) -> None:
        """Wait for the next request. One timer serves many: it looks when it fires whether it is time."""
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:  # the end of the request that is under way sets it anew
            return
        due = self._idle_since + self.timeout_keep_alive
        if due - self.loop.time() > 0.001:  # the loop's clock counts in whole ms
            self.timeout_keep_alive_task = self.loop.call_at(due, self.timeout_keep_alive_handler)
        else:
            self.close()

    def close(self) -> None:
        """Close when all is sent; a client that does not read it in `--write-timeout` is cut off."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._must_read()

    def _must_read(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.worker.settings.write_timeout, self._slow_reader)

    def _slow_reader(self) -> None:
        self._read_timer = None
        if self.active is not None and self.active.exchange is not None:
            self.active.exchange.cut(End.CLIENT_SLOW)
        self.transport.abort()

    def shutdown(self) -> None:
        super().shutdown()
        if self.active is not None:  # nobody waits for a body to come
            self.active.refuse(Shutdown("This gateway is stopping. Try again."), last=False)


def _too_large() -> GatewayError:
    return BadRequest(
        f"The head of the request is over {MAX_HEAD} bytes.", status=431, code="headers_too_large"
    )
