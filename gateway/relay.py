"""One attempt: a request on one connection to one upstream, its answer relayed as it comes.

All of it happens in the callbacks of the upstream's socket: the head, the first event, then the bytes, which
go to the client's socket in the callback that brought them; a client that reads too slowly pauses the
upstream's socket. So a request that finds a replica and a connection needs no task at all; one that must dial
or wait has one, which sleeps meanwhile. One timer watches the clock: for the beats that a silent replica
needs, for its time limit and for the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from gateway import bodies, openai
from gateway import headers as lines
from gateway.errors import BadResponse, DiedMidway, End, UpstreamTimeout
from gateway.upstream import Connection, Stale
from gateway.upstreams import Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.proxy import Exchange

MAX_ERROR_BODY = 256 * 1024  # bytes read of a replica's error answer


class Attempt:
    """Mutable: by the callbacks of socket and timer. `connection` is set while one is in use."""

    __slots__ = (
        "_cells", "_chunk", "_client", "_ended", "_exchange", "_held", "_last", "_loop", "_over", "_relaying",
        "_reply", "_step", "_timer", "_upstream", "_upstreams", "connection",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, upstreams: Upstreams, upstream: Upstream) -> None:
        self._exchange = exchange
        self._client = exchange.client
        self._reply = exchange.reply
        self._upstreams = upstreams
        self._upstream = upstream
        self._loop = exchange.loop
        self._cells = exchange.worker.cells
        self._chunk = upstreams.chunks + upstream.slot
        self._last = self._loop.time()  # the replica's last sign
        self._timer: asyncio.TimerHandle | None = None
        self._over: Callable[[Exception | None], None] | None = None
        self._step = Attempt._await_head  # what the next news is taken to; not bound: no cycle
        self._held = b""  # of the answer, not passed on yet: its first event, or an error's body
        self._relaying = False
        self._ended = False  # the stream's end marker was seen, or there is none to see
        self.connection: Connection | None = None

    def begin(self, connection: Connection, over: Callable[[Exception | None], None]) -> None:
        """Send the request. `over` is called once, after the last byte or with what went wrong; never before
        this returns."""
        self.connection, self._over = connection, over
        self._step = Attempt._await_head
        self._last = self._loop.time()
        if self._timer is None:
            self._exchange.worker.watch(self)
        connection.sink = self._heard
        connection.request(self._request())
        if connection.closed:
            self._loop.call_soon(self._heard, connection)

    def _request(self) -> bytes:
        """The bytes for this upstream: the client's body, our `rid` put first."""
        exchange, client, pool = self._exchange, self._client, self._upstream.pool
        first, rest = b"", exchange.body
        if exchange.rid:
            first, rest = bodies.with_rid(rest, exchange.rid)
        target = pool.prefix + exchange.endpoint.target + (b"?" + client.query if client.query else b"")
        head = lines.to_replica(
            client.head,
            target=target,
            authority=pool.authority,
            key=self._upstreams.info.replica_key,
            request_id=exchange.request_id,
            length=len(first) + len(rest),
        )
        return b"".join((head, first, rest))

    async def run(self, *, fresh: bool = False) -> None:
        """From the dial to the last byte. Raises UpstreamError. `fresh`: on no pooled connection."""
        pool = self._upstream.pool
        self.look_again(self._last)
        try:
            connection = await (pool.dial() if fresh else pool.acquire())
            try:
                await self._whole(connection)
            except Stale:
                self._exchange.retried("stale")
                self.look_again(self._loop.time())
                await self._whole(await pool.dial())
        except asyncio.CancelledError:
            self.abandon()
            raise
        finally:
            self._rest()

    async def _whole(self, connection: Connection) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self.begin(connection, partial(_settle, future))
        try:
            await future
        finally:
            del future  # an error's traceback has this frame, and the future has the error: no cycle

    def abandon(self) -> None:
        """Nobody waits for this answer any more: close, without a word to whoever began it."""
        self._over = None
        self._abort()
        self._rest()

    def _rest(self) -> None:
        """Give back what is held."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        else:
            self._exchange.worker.young.discard(self)
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.release()

    # --- the callbacks of the upstream's socket

    def _heard(self, connection: Connection) -> None:
        """Bytes, the end or a failure of the upstream."""
        if self.connection is not connection or self._over is None:
            return
        try:
            self._step(self, connection)
        except Exception as error:
            self._finish(error)
        else:
            if self._reply.finished:
                self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        over, self._over = self._over, None
        if type(error) is UpstreamTimeout:
            self._abort()
        self._rest()
        if over is not None:
            over(error)

    def _await_head(self, connection: Connection) -> None:
        """The head comes with the first token, after queueing and prefill."""
        if not connection.started:
            connection.check()
            return
        reply = self._reply
        self._last = self._loop.time()
        if not 200 <= connection.status < 300:
            self._step = Attempt._await_error
            self._await_error(connection)
            return
        events = lines.value(connection.headers, b"content-type").lower().startswith(b"text/event-stream")
        if reply.committed and reply.stream and not events:
            self._step = Attempt._await_error
            self._await_error(connection)
        elif reply.committed and events and not reply.stream:
            raise BadResponse("The replica streams an answer that was not to be streamed.")
        elif events:
            self._step = Attempt._await_first_event
            self._await_first_event(connection)
        else:
            self._ended = True
            self._begin_relay(connection, events=False)

    def _await_error(self, connection: Connection) -> None:
        """An answer that says no: its body, or what comes of it."""
        self._held += connection.take()
        if not connection.exhausted and len(self._held) < MAX_ERROR_BODY:
            try:
                connection.check()
            except (DiedMidway, BadResponse):
                pass  # what came of it will do
            else:
                return
        raise openai.refused(connection.status if connection.status >= 300 else 502, self._held)

    def _await_first_event(self, connection: Connection) -> None:
        """Bytes up to at least the first event's blank line, or as much as is looked at."""
        data = connection.take()
        if data:
            self._last = self._loop.time()
            self._held = data = self._held + data if self._held else data
        else:
            data = self._held
        if openai.first_event_end(data) < 0 and len(data) < openai.FIRST_EVENT_LIMIT:
            if not connection.exhausted:
                connection.check()
                return
            if not openai.is_complete(data, self._exchange.endpoint):
                raise DiedMidway("The replica ended its stream within the first event.")
        error = openai.first_event_error(data)
        if error is not None:
            raise error
        self._held = b""
        self._begin_relay(connection, data, events=True)

    def _begin_relay(self, connection: Connection, first: bytes = b"", *, events: bool) -> None:
        reply = self._reply
        if not reply.started:
            reply.stream = events
            # A stream may get beats and an error event of ours: its length is not the replica's to say.
            head = lines.to_client(connection.headers, self._exchange.request_id, sized=not events)
            reply.start(connection.status, head)
        self._step = Attempt._news
        self._relaying = True
        if first:
            self._pass_on(first, connection)
        if not reply.finished:
            self._news(connection)
        if not reply.finished:
            self._client.flush()

    def _news(self, connection: Connection) -> None:
        data = connection.take()
        if data:
            self._pass_on(data, connection)
        elif connection.done:
            if not self._ended and not openai.is_complete(self._reply.tail, self._exchange.endpoint):
                raise DiedMidway("The replica ended its stream without the end marker.")
            self._reply.finish()
        else:
            connection.check()

    def _pass_on(self, data: bytes, connection: Connection) -> None:
        reply = self._reply
        self._last = now = self._loop.time()
        if not reply.relayed:
            self._exchange.ttft = now - self._exchange.started
        self._cells[self._chunk] += 1
        endpoint = self._exchange.endpoint
        if endpoint.long_end and not self._ended:
            self._ended = openai.is_complete(reply.tail + data, endpoint)
        done = connection.done  # all that came is in `data`
        if done and (self._ended or openai.is_complete(reply.tail + data, endpoint)):
            reply.finish(data)
            return
        reply.relay(data, now)
        if self._client.paused:
            connection.pause()
            self.look_again(now)
        elif done or connection.closed:
            self._news(connection)

    def writable(self) -> None:
        """The client has read on."""
        connection = self.connection
        # Its slow time is not the replica's silence.
        self._last = self._reply.sent_at = now = self._loop.time()
        self.look_again(now)
        if connection is not None and self._relaying:
            connection.resume()
            if connection.exhausted or connection.closed:
                self._heard(connection)

    def _abort(self) -> None:
        """SGLang sees a closed connection at once only while it streams; a queued or non-streaming request it
        would go on with for 4 s, so it is told."""
        exchange, reply = self._exchange, self._reply
        if exchange.rid and self.connection is not None and not (reply.stream and reply.relayed):
            exchange.worker.abort(self._upstreams, self._upstream, exchange.rid)

    # --- the clock

    def _silence_limit(self) -> float:
        own = self._upstreams.info.upstream_timeout
        return own if own is not None else self._exchange.worker.settings.upstream_timeout

    def _beat_due(self) -> float:
        """When the client next needs a byte: `beat_after` of silence, then `every`."""
        wait = self._exchange.patience
        if wait.beat_after is None:
            return float("inf")
        return self._reply.sent_at + (wait.every if self._reply.beating else wait.beat_after)

    def _next_look(self, now: float) -> float:
        if self._client.paused:
            return self._reply.sent_at + self._exchange.worker.settings.write_timeout
        return min(self._last + self._silence_limit(), max(self._beat_due(), now + 0.01))

    def _tick(self) -> None:
        now, connection = self._loop.time(), self.connection
        if self._client.disconnected:  # the task is being cancelled
            return
        if self._client.paused:
            if now - self._reply.sent_at >= self._exchange.worker.settings.write_timeout:
                self._exchange.cut(End.CLIENT_SLOW)
                return
        elif now - self._last >= self._silence_limit():
            if connection is not None:
                quiet = now - self._last
                connection.fail(
                    UpstreamTimeout(f"The replica was silent for {quiet:.0f} s (--upstream-timeout).")
                )
                return
        elif now >= self._beat_due():
            if not self._reply.started or self._reply.can_beat:
                self._exchange.beat(now, f"waiting for the replica, silent for {now - self._last:.0f} s")
            else:
                self._reply.sent_at = now  # nothing can be slipped in here: look again later
                self._reply.beating = True
        self.look_again(now)

    def look_again(self, now: float) -> None:
        """Watch the clock for this attempt. `now` is the loop's time."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(max(self._next_look(now), now + 0.01), self._tick)

    def look_first(self, now: float) -> None:
        """As `look_again`, some time after it began; unless it is over, or has been looked at."""
        if self._timer is None and self._over is not None:
            self.look_again(now)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
