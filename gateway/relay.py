"""One attempt: a request on one connection to one upstream, its answer relayed as it comes.

The request's task sleeps while the answer streams. Bytes go from the upstream's socket to the client's in the
callback that brought them; a client that reads too slowly pauses the upstream's socket. One timer watches the
clock: for the beats that a silent replica needs, for its time limit and for the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from gateway import headers as lines
from gateway import openai
from gateway.errors import BadResponse, DiedMidway, End, NotTaken, Refused, UpstreamError, UpstreamTimeout
from gateway.upstream import Connection, Stale
from gateway.upstreams import Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.proxy import Exchange

MAX_ERROR_BODY = 256 * 1024  # bytes read of a replica's error answer


class Attempt:
    """Mutable: by the request's task, and by the callbacks of socket and timer. `connection` is set once
    dialled.
    """

    __slots__ = (
        "_cells", "_chunk", "_client", "_ended", "_exchange", "_last", "_loop", "_over", "_reply", "_timer",
        "_upstream", "_upstreams", "connection",
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
        self._over: asyncio.Future[None] | None = None
        self._ended = False  # the stream's end marker was seen, or there is none to see
        self.connection: Connection | None = None

    async def run(self) -> None:
        """From the dial to the last byte. Raises UpstreamError; a cancellation aborts the replica's work."""
        exchange, pool = self._exchange, self._upstream.pool
        self._look_again(self._last)
        try:
            self.connection = await pool.acquire()
            try:
                await self._head(self.connection)
            except Stale:
                exchange.retried("stale")
                self.connection = await pool.dial()
                await self._head(self.connection)
            await self._relay(self.connection)
        except UpstreamTimeout:
            self._abandon()
            raise
        except asyncio.CancelledError:
            self._abandon()
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            connection, self.connection, self._over = self.connection, None, None
            if connection is not None:
                connection.release()

    async def _head(self, connection: Connection) -> None:
        """Send, and wait for the head: it comes with the first token, after queueing and prefill."""
        self._last = self._loop.time()
        connection.request(self._exchange.request(self._upstreams, self._upstream))
        await connection.head()
        self._last = self._loop.time()

    async def _relay(self, connection: Connection) -> None:
        reply = self._reply
        if not 200 <= connection.status < 300:
            raise openai.refused(connection.status, await self._error_body(connection))
        events = lines.value(connection.headers, b"content-type").lower().startswith(b"text/event-stream")
        if reply.committed and reply.stream and not events:
            raise openai.refused(502, await self._error_body(connection))
        if reply.committed and events and not reply.stream:
            raise BadResponse("The replica streams an answer that was not to be streamed.")
        first = b""
        if events:
            first = await self._first_event(connection)
            error = openai.first_event_error(first)
            if error is not None:
                raise error
        if not reply.started:
            reply.stream = events
            # A stream may get beats and an error event of ours: its length is not the replica's to say.
            head = lines.to_client(connection.headers, self._exchange.request_id, sized=not events)
            reply.start(connection.status, head)
        self._ended = not events
        if first:
            self._pass_on(first, connection)
        if not reply.finished:
            self._news(connection)
        if not reply.finished:
            self._client.flush()
            self._over = self._loop.create_future()
            connection.sink = self._heard
            await self._over

    # --- the callbacks of a relay

    def _heard(self, connection: Connection) -> None:
        """Bytes, the end or a failure of the upstream."""
        over = self._over
        if over is None or over.done():
            return
        try:
            self._news(connection)
        except Exception as error:
            over.set_exception(error)
        else:
            if self._reply.finished:
                over.set_result(None)

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
        if connection.exhausted and (self._ended or openai.is_complete(reply.tail + data, endpoint)):
            reply.finish(data)
            return
        reply.relay(data, now)
        if self._client.paused:
            connection.pause()
            self._look_again(now)
        elif connection.exhausted or connection.closed:
            self._news(connection)

    def writable(self) -> None:
        """The client has read on."""
        connection = self.connection
        # Its slow time is not the replica's silence.
        self._last = self._reply.sent_at = now = self._loop.time()
        self._look_again(now)
        if connection is not None and self._over is not None:
            connection.resume()
            if connection.exhausted or connection.closed:
                self._heard(connection)

    # --- before the relay

    async def _first_event(self, connection: Connection) -> bytes:
        """Bytes up to at least the first event's blank line, or as much as is looked at."""
        data = b""
        while openai.first_event_end(data) < 0 and len(data) < openai.FIRST_EVENT_LIMIT:
            more = await connection.read()
            self._last = self._loop.time()
            if more:
                data += more
            elif openai.is_complete(data, self._exchange.endpoint):
                break
            else:
                raise DiedMidway("The replica ended its stream within the first event.")
        return data

    async def _error_body(self, connection: Connection) -> bytes:
        data = b""
        with contextlib.suppress(DiedMidway, BadResponse):  # what came of it will do
            while len(data) < MAX_ERROR_BODY and (more := await connection.read()):
                data += more
        return data

    def _abandon(self) -> None:
        """Nobody waits for this answer any more. SGLang sees a closed connection at once only while it
        streams; a queued or non-streaming request it would go on with for 4 s, so it is told."""
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
        self._look_again(now)

    def _look_again(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(max(self._next_look(now), now + 0.01), self._tick)


def counts_against(error: UpstreamError) -> bool:
    """Whether an attempt's failure is the replica's fault: never a 4xx, never "queue full"."""
    return not isinstance(error, NotTaken) and not (isinstance(error, Refused) and error.status < 500)
