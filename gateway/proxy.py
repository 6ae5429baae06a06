"""One request: ASGI in -> lease -> upstream -> ASGI out.

`Exchange` is a request from its head to its typed end. It reads the whole body first (watching for the
client's leaving before that would swallow it), from then on a task watches the client. What a replica sends
is relayed byte for byte as it comes; the only bytes added are beats, and only where a client cannot take them
for content.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from gateway import headers as lines
from gateway import openai
from gateway.errors import (
    BadResponse,
    BodyTooLarge,
    DiedMidway,
    DiedSilent,
    End,
    GatewayError,
    HoldTimeout,
    InternalError,
    NotHeld,
    NotTaken,
    Refused,
    Shutdown,
    Undialable,
    UnsupportedEncoding,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.hold import Patience, Place, monotonic_ns, patience
from gateway.reply import Reply
from gateway.upstream import Connection, Stale
from gateway.upstreams import Lease, Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.worker import Worker

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_ATTEMPTS = 3
TAIL = 4096  # bytes kept of a reply's end: its last event, end marker and usage
LINGER_SECONDS = 30.0  # for the rest of a refused body, as nginx's lingering_time
MAX_ERROR_BODY = 256 * 1024  # bytes read of a replica's error answer


class ClientGone(Exception):
    """The client left before its request was read."""


class Exchange:
    """Mutable: by its own task, and by two callbacks (`_gone`, `_tick`) that only wake or cancel it."""

    __slots__ = (
        "_beaten", "_body", "_conn", "_cut", "_last", "_loop", "_patience", "_receive", "_rid", "_scope",
        "_send", "_since", "_started", "_task", "_timer", "_unread", "_upstreams", "_watcher", "_worker",
        "attempts", "endpoint", "held", "key", "lease", "model", "reply", "request_id", "served", "ttft",
        "upstream",
    )  # fmt: skip

    def __init__(
        self, worker: Worker, scope: Scope, receive: Receive, send: Send, endpoint: openai.Endpoint
    ) -> None:
        self._worker = worker
        self._scope = scope
        self._receive = receive
        self._send = send
        self.endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._since = monotonic_ns()
        self._rid = secrets.token_hex(16)
        self.request_id = self._rid
        self.reply = Reply(send, endpoint, self._rid)
        self._body = b""
        self._patience: Patience | None = None
        self._upstreams: Upstreams | None = None
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._conn: Connection | None = None
        self._cut: End | None = None
        self._unread = False  # more of the request's body is to come
        self._last = self._beaten = self._started
        self.key = self.model = ""
        self.upstream: Upstream | None = None
        self.served = False  # accepted: counted as arrived
        self.attempts = 0
        self.held: float | None = None
        self.ttft: float | None = None
        self.lease: Lease | None = None  # the last attempt's

    def __repr__(self) -> str:
        where = self.upstream.id if self.upstream else "-"
        return f"<Exchange {self.request_id} {self.endpoint.path} at={where} status={self.reply.status}>"

    # --- from head to end

    async def run(self) -> None:
        """Serve the request, and account its end. Raises nothing of its own."""
        end = End.COMPLETE
        try:
            await self._read()
            self._task = asyncio.current_task()
            self._watcher = self._loop.create_task(self._watch())
            await self._serve()
        except asyncio.CancelledError:
            end = self._cut or End.SHUTDOWN
            if self._cut is None:  # the drain limit of a stopping gateway
                await self._fail(Shutdown("This gateway is stopping and waited as long as it may."))
        except ClientGone:
            end = End.CLIENT_GONE
        except GatewayError as error:
            end = error.end
            await self._fail(error)
        except Exception:
            end = InternalError.end
            log.exception("request %s failed by a fault of the gateway's own", self.request_id)
            await self._fail(InternalError("The gateway failed; the cause is in its log."))
        finally:
            if self._watcher is not None:
                self._watcher.cancel()
            self._account(end)
            # No reference cycle: the memory, the body's above all, is to go now and not some day.
            self._task = self._watcher = self.lease = None

    async def _fail(self, error: GatewayError) -> None:
        """Tell the client, who may be gone or not read it."""
        try:
            async with asyncio.timeout(LINGER_SECONDS + self._worker.settings.write_timeout):
                await self.reply.fail(error, self._discard if self._unread else None)
        except asyncio.CancelledError:
            if self._cut is None:
                raise
        except TimeoutError:
            self._sever()
        except Exception:
            log.exception("request %s: its failure could not be told", self.request_id)

    async def _discard(self) -> None:
        """Read what is left of a refused body: closing a connection with unread bytes resets it, and the
        client might never see the answer that it was sent before."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread:
                    message = await self._receive()
                    self._unread = message.get("more_body", False)

    async def _read(self) -> None:
        """Head checks, the whole body, and what the body must be."""
        worker, settings = self._worker, self._worker.settings
        headers = dict(self._scope["headers"])
        self.request_id = lines.request_id(headers, self._rid)
        self.reply = Reply(self._send, self.endpoint, self.request_id)
        self._unread = b"expect" not in headers  # such a client sends its body only when asked to
        self.key = worker.keys.check(headers)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            raise UnsupportedEncoding(
                f"Content-Encoding {encoding.decode('latin-1')!r} is not served: send the body uncompressed."
            )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            # Also what keeps a web page from waking a paid machine: a browser asks before it may send this
            # type.
            raise UnsupportedEncoding(
                "Send the body as JSON, with 'Content-Type: application/json'.",
                code="unsupported_content_type",
            )
        limit = settings.max_body
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLarge(
                f"The request body has {int(declared)} bytes; at most {limit} are served (--max-body)."
            )
        self._body = await self._whole_body(limit)
        body = openai.parse(self._body, self.endpoint)
        self._upstreams = upstreams = worker.service_for(body.get("model"))
        self._patience = patience(
            headers.get(b"x-stainless-read-timeout"),
            headers.get(b"x-gateway-hold"),
            hold=settings.hold,
            commit_after=settings.commit_after,
            beat_every=settings.beat_every,
            beat_after=settings.beat_after,
        )
        self.model = body.get("model") or upstreams.info.model
        if not openai.takes_rid(body, self.endpoint):
            self._rid = ""
        self.reply.describe(
            stream=bool(body.get("stream")), model=self.model, rid=self._rid or self.request_id
        )

    async def _whole_body(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            more = self._unread = message.get("more_body", False)
            size += len(part)
            if size > limit:
                raise BodyTooLarge(f"The request body is over {limit} bytes (--max-body).")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _serve(self) -> None:
        """Attempts around the lease: another one only while no byte of a response has come."""
        upstreams = self._upstreams
        assert upstreams is not None
        self._worker.arrived(upstreams)
        self.served = True
        avoid: list[str] = []
        while True:
            self.attempts += 1
            try:
                self._check_hold(upstreams)
                self.lease = upstreams.lease(self._since, len(self._body), avoid, self._hold)
                async with self.lease as upstream:
                    self.upstream = upstream
                    await self._exchange(upstreams, upstream)
                return
            except (Undialable, NotTaken, DiedSilent) as error:
                # Nothing was sent, or nothing ran, or nothing was answered: safe to try elsewhere.
                assert self.upstream is not None
                if self.attempts >= MAX_ATTEMPTS:
                    raise
                avoid.append(self.upstream.id)
                if not isinstance(error, Undialable) and not upstreams.has_other_than(avoid):
                    raise
                self._worker.metrics(upstreams).retry(error.cause)
                self._new_rid()

    def _new_rid(self) -> None:
        if self._rid:
            self._rid = secrets.token_hex(16)  # SGLang refuses a rid it has seen

    # --- waiting

    def _check_hold(self, upstreams: Upstreams) -> None:
        """`reject`: a client that does not want to be held only wakes the service. Raises NotHeld."""
        assert self._patience is not None
        if self._patience.mode == "reject" and not len(upstreams):
            upstreams.check()
            self._worker.wake(upstreams, self.key, self.request_id)
            raise NotHeld(
                f"{upstreams.info.name} is starting. Try again later (X-Gateway-Hold: reject).",
                headers=self._cold_headers(upstreams),
                retry_after=int(upstreams.cold.eta_seconds or 30) if upstreams.cold else 30,
            )

    async def _hold(self, place: Place) -> None:
        """Wait in the room, with beats. Returns when the place's future is done."""
        upstreams, wait = self._upstreams, self._patience
        assert upstreams is not None
        assert wait is not None
        self._worker.waits(upstreams, self.key, self.request_id)
        entered = self._loop.time()
        limit = self._started + upstreams.info.hold_max_seconds
        if wait.give_up is not None:
            limit = min(limit, self._started + wait.give_up)
        try:
            while not place.future.done():
                now = self._loop.time()
                if now >= limit:
                    raise HoldTimeout(
                        f"No replica of {upstreams.info.name} within {now - self._started:.0f} s. The cold "
                        "start goes on; try again.",
                        headers=self._cold_headers(upstreams),
                    )
                due = limit
                if wait.commit_after is not None:
                    beat_due = (
                        self.reply.beat_at + wait.every
                        if self.reply.started
                        else self._started + wait.commit_after
                    )
                    if now >= beat_due:
                        await self._beat(now, _cold_text(upstreams, now - self._started))
                        continue
                    due = min(due, beat_due)
                await asyncio.wait((place.future,), timeout=due - now)
        finally:
            self.held = (self.held or 0.0) + self._loop.time() - entered

    async def _beat(self, now: float, text: str) -> None:
        if not self.reply.started:
            assert self._upstreams is not None
            await self.reply.commit(now, self._cold_headers(self._upstreams))
        await self.reply.beat(now, text)

    def _cold_headers(self, upstreams: Upstreams) -> dict[str, str]:
        cold = upstreams.cold
        eta = cold.eta_seconds if cold is not None else None
        return {
            "X-Gateway-State": "waiting" if len(upstreams) else "cold-start",
            "X-Gateway-ETA-Seconds": f"{eta:.0f}" if eta is not None else "unknown",
        }

    # --- one attempt

    async def _exchange(self, upstreams: Upstreams, upstream: Upstream) -> None:
        pool = upstream.pool
        conn: Connection | None = None
        try:
            conn = await pool.acquire()
            try:
                await self._head(conn, self._request(upstreams, upstream))
            except Stale:
                self._worker.metrics(upstreams).retry("stale")
                self._new_rid()
                conn = await pool.dial()
                await self._head(conn, self._request(upstreams, upstream))
            await self._relay(conn, upstreams, upstream)
            upstreams.succeeded(upstream)
        except UpstreamError as error:
            if not isinstance(error, NotTaken) and not (isinstance(error, Refused) and error.status < 500):
                upstreams.failed(upstream, error.message, unreachable=isinstance(error, Undialable))
            if isinstance(error, UpstreamTimeout):
                self._abandon(upstreams, upstream)
            raise
        except asyncio.CancelledError:
            self._abandon(upstreams, upstream)
            raise
        finally:
            self._conn = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if conn is not None:
                conn.release()

    def _request(self, upstreams: Upstreams, upstream: Upstream) -> bytes:
        scope = self._scope
        body = openai.with_rid(self._body, self._rid) if self._rid else self._body
        query = scope["query_string"]
        target = upstream.pool.prefix + self.endpoint.path.encode() + (b"?" + query if query else b"")
        client = scope.get("client")
        head = lines.to_replica(
            scope["headers"],
            target=target,
            authority=upstream.pool.authority,
            key=upstreams.info.replica_key,
            request_id=self.request_id,
            client=client[0] if client else "unknown",
            scheme=scope.get("scheme", "http"),
            length=len(body),
        )
        return head + body

    async def _head(self, conn: Connection, request: bytes) -> None:
        """Send, and wait for the head: it comes with the first token, after queueing and prefill."""
        self._conn = conn
        self._last = self._beaten = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._next_look(self._last), self._tick)
        conn.request(request)
        while not await conn.head():
            await self._silence()

    async def _relay(self, conn: Connection, upstreams: Upstreams, upstream: Upstream) -> None:
        reply, endpoint = self.reply, self.endpoint
        if not 200 <= conn.status < 300:
            raise openai.refused(conn.status, await self._error_body(conn))
        events = lines.value(conn.headers, b"content-type").lower().startswith(b"text/event-stream")
        if reply.committed and reply.stream and not events:
            raise openai.refused(502, await self._error_body(conn))
        if reply.committed and events and not reply.stream:
            raise BadResponse("The replica streams an answer that was not to be streamed.")
        data = b""
        if events:
            data = await self._first_event(conn)
            error = openai.first_event_error(data)
            if error is not None:
                raise error
        if not reply.started:
            reply.stream = events
            # A stream may get beats and an error event of ours: its length is not the replica's to say.
            await reply.start(conn.status, lines.to_client(conn.headers, self.request_id, sized=not events))
        ended = not events
        chunks, cells = upstreams.chunks + upstream.slot, self._worker.cells
        send, loop = self._send, self._loop
        while True:
            if data:
                self._last = loop.time()
                if not reply.relayed:
                    reply.relayed = True
                    self.ttft = self._last - self._started
                cells[chunks] += 1
                if endpoint.long_end and not ended:
                    ended = openai.is_complete(reply.tail + data, endpoint)
                reply.tail = data[-TAIL:] if len(data) >= TAIL else (reply.tail + data)[-TAIL:]
                if conn.exhausted and (ended or openai.is_complete(reply.tail, endpoint)):
                    await reply.finish(data)
                    return
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._last = loop.time()  # a slow client's time is not the replica's silence
            more = await conn.read()
            if more is None:
                await self._silence()
                data = b""
                continue
            if not more:
                break
            data = more
        if not ended and not openai.is_complete(reply.tail, endpoint):
            raise DiedMidway("The replica ended its stream without the end marker.")
        await reply.finish()

    async def _first_event(self, conn: Connection) -> bytes:
        """Bytes up to at least the first event's blank line, or as much as is looked at."""
        data = b""
        while openai.first_event_end(data) < 0 and len(data) < openai.FIRST_EVENT_LIMIT:
            more = await conn.read()
            if more is None:
                await self._silence()
            elif not more:
                if openai.is_complete(data, self.endpoint):
                    break
                raise DiedMidway("The replica ended its stream within the first event.")
            else:
                data += more
        return data

    async def _error_body(self, conn: Connection) -> bytes:
        data = b""
        with contextlib.suppress(DiedMidway, BadResponse):  # what came of it will do
            while len(data) < MAX_ERROR_BODY:
                more = await conn.read()
                if more is None:
                    await self._silence()
                elif not more:
                    break
                else:
                    data += more
        return data

    def _abandon(self, upstreams: Upstreams, upstream: Upstream) -> None:
        """Nobody waits for this answer any more. SGLang sees a closed connection at once only while it
        streams; a queued or non-streaming request it would go on with for 4 s, so it is told."""
        if self._rid and self._conn is not None and not (self.reply.stream and self.reply.relayed):
            self._worker.abort(upstreams, upstream, self._rid)

    # --- the clock, and the client's leaving

    def _due(self) -> float:
        """When the silence next needs a look. Times are compared as sums: `last + 0.2 - last` may be less
        than 0.2."""
        return min(self._last + self._silence_limit(), self._beat_due())

    def _beat_due(self) -> float:
        wait = self._patience
        assert wait is not None
        if wait.beat_after is None:
            return math.inf
        due = self._last + wait.beat_after
        return due if self._beaten <= self._last else max(due, self._beaten + wait.every)

    def _silence_limit(self) -> float:
        assert self._upstreams is not None
        own = self._upstreams.info.upstream_timeout
        return own if own is not None else self._worker.settings.upstream_timeout

    def _next_look(self, now: float) -> float:
        """When the timer next runs: for a beat, the replica's time limit or the client's."""
        wait = self._patience
        assert wait is not None
        due = self._due()
        if due <= now:
            due = now + min(1.0, wait.every)
        limit = self._worker.settings.write_timeout
        since = now if self._conn is None or self._conn.waiting else max(self._last, self._beaten)
        return min(due, since + limit)

    def _tick(self) -> None:
        now = self._loop.time()
        conn = self._conn
        if conn is None or conn.waiting:
            if conn is not None and now >= self._due():
                conn.poke()
        elif now >= max(self._last, self._beaten) + self._worker.settings.write_timeout:
            self._stop(End.CLIENT_SLOW)
            self._sever()
            return
        self._timer = self._loop.call_at(self._next_look(now), self._tick)

    async def _silence(self) -> None:
        """The replica has said nothing for a while: give up, or keep the client."""
        now = self._loop.time()
        quiet = now - self._last
        if now >= self._last + self._silence_limit():
            raise UpstreamTimeout(f"The replica was silent for {quiet:.0f} s (--upstream-timeout).")
        if now >= self._beat_due():
            self._beaten = now
            if not self.reply.started or self.reply.can_beat:
                await self._beat(now, f"waiting for the replica, silent for {quiet:.0f} s")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stop(End.CLIENT_GONE)

    def _stop(self, end: End) -> None:
        if self._cut is None and self._task is not None and not self.reply.finished:
            self._cut = end
            self._task.cancel()

    def _sever(self) -> None:
        """Reset the client's connection. A server that closes one first sends what the client does not read,
        for as long as it does not read it; ASGI has no word for this, uvicorn's `send` knows its
        transport."""
        transport = getattr(getattr(self._send, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()

    def _account(self, end: End) -> None:
        tokens = openai.usage(self.reply.tail)
        self._worker.ended(self, end, self._loop.time() - self._started, tokens)

    @property
    def upstreams(self) -> Upstreams | None:
        """The service asked for, once it is known."""
        return self._upstreams


def _cold_text(upstreams: Upstreams, waited: float) -> str:
    """The comment of a held stream, e.g. `cold-start phase=load progress=62% eta=410s`, or while it looks for
    a machine `cold-start phase=provision plan=2/3 attempt=14 eta=unknown`."""
    if len(upstreams):
        return f"waiting for a free place, {waited:.0f} s"
    cold = upstreams.cold
    if cold is None:
        return f"cold-start phase=pending waited={waited:.0f}s"
    parts = [f"cold-start phase={cold.phase or 'pending'}"]
    if cold.progress is not None:
        parts.append(f"progress={cold.progress * 100:.0f}%")
    if cold.plan:
        parts.append(f"plan={cold.plan}")
    if cold.attempt > 1:
        parts.append(f"attempt={cold.attempt}")
    parts.append(f"eta={cold.eta_seconds:.0f}s" if cold.eta_seconds is not None else "eta=unknown")
    return " ".join(parts)
