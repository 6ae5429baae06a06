"""One request, from its head to its typed end: checks, the wait for a lease, attempts.

`Exchange` is told by its `Client` (incoming.py) what has come; once the body is whole and valid it has a task
of its own. An attempt at an upstream, and the relay of the answer, are in relay.py; what the client may still
be sent is in reply.py. A client that leaves cancels the task, in whichever phase it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from gateway import bodies, largebodies, openai
from gateway import headers as lines
from gateway.admission import Passed
from gateway.errors import (
    BadRequest,
    BodyTooLarge,
    DiedSilent,
    End,
    GatewayError,
    InternalError,
    NotTaken,
    Shutdown,
    Undialable,
    UpstreamError,
)
from gateway.hold import monotonic_ns
from gateway.patience import Patience, check_wish, cold_headers, hold
from gateway.relay import Attempt
from gateway.reply import Reply
from gateway.retries import judge, may_try_again
from gateway.upstream import Stale
from gateway.upstreams import Lease, Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.incoming import Client
    from gateway.worker import Worker

log = logging.getLogger(__name__)


class Exchange:
    """Mutable: by its own task, and by the connection's callbacks (`on_...`) before and beside it.

    `rid` is ours, made per attempt; "" where SGLang takes none.
    """

    __slots__ = (
        "_attempt", "_cut", "_since", "_task", "attempts", "body", "client", "ended", "endpoint", "held",
        "key", "lease", "loop", "model", "patience", "reply", "request_id", "rid", "served", "started",
        "ttft", "upstream", "upstreams", "worker",
    )  # fmt: skip

    patience: Patience

    def __init__(self, worker: Worker, client: Client) -> None:
        self.worker = worker
        self.client = client
        self.endpoint = client.endpoint
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.started: float = self.loop.time()
        self.rid = worker.ids()
        self.request_id = self.rid
        self.reply: Reply = Reply(client, client.endpoint, self.rid, self.started)
        self.upstreams: Upstreams | None = None
        self.upstream: Upstream | None = None
        self.lease: Lease | None = None  # the last attempt's
        self.key = self.model = ""
        self.attempts = 0
        self.held: float | None = None  # seconds
        self.ttft: float | None = None  # seconds
        self.served = False  # accepted: counted as arrived
        self.ended = False
        self._since = monotonic_ns()
        self.body = b""
        self._attempt: Attempt | None = None
        self._task: asyncio.Task[None] | None = None
        self._cut: End | None = None

    def __repr__(self) -> str:
        where = self.upstream.id if self.upstream else "-"
        return f"<Exchange {self.request_id} {self.endpoint.path} at={where} status={self.reply.status}>"

    # --- what the connection tells

    def on_head(self) -> None:
        """The request's head is here, and it is its turn."""
        self._checked(self._check_head)

    def on_body(self, body: bytes) -> None:
        """The whole body is here."""
        if largebodies.large(body):
            self._task = self.client.spawn(self._run(None, body))
        elif self._checked(self._check_body, body):
            self._checked(self._begin)

    def _checked(self, check: Callable[..., None], *what: bytes) -> bool:
        try:
            check(*what)
        except Exception as error:
            self._refuse(error)
            return False
        return True

    def on_too_large(self, limit: int) -> None:
        """The body has passed `--max-body`."""
        self._refuse(BodyTooLarge(f"The request body is over {limit} bytes (--max-body)."))

    def on_slow_body(self, seconds: float) -> None:
        """The rest of the body does not come."""
        self._refuse(
            BadRequest(
                f"No byte of the request body came for {seconds:.0f} s.", status=408, code="request_timeout"
            )
        )

    def on_refused(self, error: GatewayError) -> None:
        """The connection gives the request up before its body is whole."""
        self._refuse(error)

    def on_unrun(self) -> None:
        """The task was cancelled before its first step."""
        if self.lease is not None:
            self.lease.release()
        if self._cut is None:
            self._fail(Shutdown("This gateway is stopping and waited as long as it may."))
        self._account(self._cut or End.SHUTDOWN)

    def cancel(self, msg: str | None = None) -> None:
        """The server has waited as long as it may (what has a task, that is cancelled)."""
        if self._task is None:
            self.loop.call_soon(self._stopped)

    def _stopped(self) -> None:
        if self._task is None and not self.ended:
            self._let_go()
            self.on_unrun()

    def on_gone(self) -> None:
        """The connection is closed."""
        if not self.ended:
            self.cut(End.CLIENT_GONE)

    def on_writable(self) -> None:
        """A client that read too slowly has read on."""
        if self._attempt is not None:
            self._attempt.writable()

    def cut(self, end: End) -> None:
        """End the request now: the client has left, or does not read."""
        if end is End.CLIENT_SLOW:
            self.client.sever()
        if self._task is None:
            self._let_go()
            self._account(end)
        elif self._cut is None and (not self.reply.finished or self.client.paused):
            self._cut = end
            self._task.cancel()

    # --- checks

    def _check_head(self) -> None:
        worker, head = self.worker, self.client.head
        self.request_id = lines.request_id(head.fields, self.rid)
        self.reply.describe(stream=False, model="", rid=self.rid, request_id=self.request_id)
        passed, keys, settings = head.passed, worker.keys, worker.settings
        if type(passed) is not Passed or passed.keys is not keys or passed.settings is not settings:
            passed = head.passed = Passed(keys, settings, head.fields)
        self.key = passed.key
        self.patience = passed.patience
        declared, limit = self.client.declared, settings.max_body
        if declared > limit:
            raise BodyTooLarge(
                f"The request body has {declared} bytes; at most {limit} are served (--max-body)."
            )

    def _check_body(self, raw: bytes, facts: bodies.Facts | None = None) -> None:
        self.body = raw
        model, stream, takes_rid = facts or bodies.facts(raw, self.endpoint)
        self.upstreams = upstreams = self.worker.service_for(model)
        self.model = model or upstreams.info.model
        if not takes_rid:
            self.rid = ""
        self.reply.describe(
            stream=stream,
            model=self.model,
            rid=self.rid or self.request_id,
            request_id=self.request_id,
        )

    def _refuse(self, error: Exception) -> None:
        """A request that ends before it has a task."""
        end = self._failed(error)
        self._let_go()
        self._account(end)

    def _arrive(self) -> tuple[Upstreams, Lease]:
        """It is accepted."""
        upstreams = self.upstreams
        assert upstreams is not None
        self.worker.arrived(upstreams)
        self.served = True
        self.lease = lease = upstreams.lease(self._since, len(self.body))
        return upstreams, lease

    # --- served at once, without a task

    def _begin(self) -> None:
        """Send it where there is a place for it and a connection; else a task sees to it. Raises why not."""
        upstreams, lease = self._arrive()
        upstream = lease.take()
        connection = upstream.pool.pooled() if upstream is not None else None
        if upstream is None or connection is None:
            self._spawn()
            return
        self.client.serve(self)
        self.upstream = upstream
        self.attempts = 1
        self._attempt = attempt = Attempt(self, upstreams, upstream)
        attempt.begin(connection, self._over)

    def _over(self, error: Exception | None) -> None:
        """How the attempt without a task has ended."""
        upstreams, lease = self.upstreams, self.lease
        assert upstreams is not None
        assert lease is not None
        assert self.upstream is not None
        self._attempt = None
        if type(error) is not Stale:  # that one is sent again, in its place
            judge(upstreams, self.upstream, error)
            lease.release()
        if error is None:
            if self.client.paused:
                self._spawn()
            else:
                self._account(End.COMPLETE)
        elif isinstance(error, Stale | NotTaken | DiedSilent):
            self._spawn(error)
        else:
            self._refuse(error)

    def _let_go(self) -> None:
        """End the attempt without a task, if there is one."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandon()
        if self.lease is not None:
            self.lease.release()

    # --- the task

    def _spawn(self, error: Stale | UpstreamError | None = None) -> None:
        """Go on in a task; `error` is how the first attempt ended."""
        self._task = self.client.spawn(self._run(error))

    async def _run(self, error: Stale | UpstreamError | None, large: bytes = b"") -> None:
        """Serve the request, and account its end. Raises nothing of its own. `large`: its body, not yet
        checked."""
        end = End.COMPLETE
        try:
            if large:
                self._check_body(large, await largebodies.read(large, self.endpoint, self.worker.large))
                self._arrive()
            if not self.reply.finished:
                await self._serve(error)
            if self.client.paused:
                await self._drain()
        except asyncio.CancelledError:
            end = self._cut or End.SHUTDOWN
            if self._cut is None:  # the drain limit of a stopping gateway
                self._fail(Shutdown("This gateway is stopping and waited as long as it may."))
        except Exception as failure:
            end = self._failed(failure)
        finally:
            error = None  # its traceback has this frame: no cycle
            self._account(end)

    def _failed(self, error: Exception) -> End:
        """Tell the client; returns the request's end."""
        if isinstance(error, GatewayError):
            self._fail(error)
            return error.end
        log.error("request %s failed by a fault of the gateway's own", self.request_id, exc_info=error)
        return self._failed(InternalError("The gateway failed; the cause is in its log."))

    def _fail(self, error: GatewayError) -> None:
        try:
            self.reply.fail(error)
        except Exception:
            log.exception("request %s: its failure could not be told", self.request_id)
            self.client.sever()

    async def _drain(self) -> None:
        """All is sent but not read: the answer is complete when the client has it."""
        try:
            async with asyncio.timeout(self.worker.settings.write_timeout):
                await self.client.drained()
        except TimeoutError:
            self._cut = End.CLIENT_SLOW
            self.client.sever()
            raise asyncio.CancelledError from None

    async def _serve(self, error: Stale | UpstreamError | None) -> None:
        """Attempts, each around a lease: another one only while no byte of a response has come.

        The first may have been made; it ended with `error`. A stale connection costs no attempt and keeps its
        place.
        """
        upstreams = self.upstreams
        assert upstreams is not None
        avoid: list[str] = []
        try:
            while True:
                if isinstance(error, UpstreamError):
                    if not may_try_again(self, error, avoid):
                        raise error
                    self.retried(error.cause)
                    self.lease = upstreams.lease(self._since, len(self.body), avoid, again=True)
                    error = None
                try:
                    await self._once(stale=error is not None)
                    return
                except (Undialable, NotTaken, DiedSilent) as failed:
                    error = failed
        finally:
            error = None  # its traceback has this frame: no cycle

    async def _once(self, *, stale: bool) -> None:
        """One attempt, in its lease."""
        upstreams, lease = self.upstreams, self.lease
        assert upstreams is not None
        assert lease is not None
        try:
            upstream = lease.upstream
            if upstream is None:
                check_wish(self, upstreams)
                upstream = lease.take() or await lease.wait(partial(hold, self))
            self.upstream = upstream
            if stale:
                self.retried("stale")
            else:
                self.attempts += 1
            await self._try(upstreams, upstream, fresh=stale)
        finally:
            lease.release()

    async def _try(self, upstreams: Upstreams, upstream: Upstream, *, fresh: bool) -> None:
        self._attempt = attempt = Attempt(self, upstreams, upstream)
        try:
            await attempt.run(fresh=fresh)
        except UpstreamError as error:
            judge(upstreams, upstream, error)
            raise
        else:
            judge(upstreams, upstream, None)
        finally:
            self._attempt = None

    def retried(self, cause: str) -> None:
        """The request is sent again, for this cause."""
        assert self.upstreams is not None
        self.worker.metrics(self.upstreams).retry(cause)
        if self.rid:
            self.rid = self.worker.ids()  # SGLang refuses a rid it has seen

    # --- waiting

    def beat(self, now: float, text: str) -> None:
        """Keep the client: 200 first, where nothing was sent yet."""
        assert self.upstreams is not None
        if not self.reply.started:
            self.reply.commit(now, cold_headers(self.upstreams))
        self.reply.beat(now, text)

    # --- the end

    def _account(self, end: End) -> None:
        if self.ended:
            return
        self.ended = True
        tokens = openai.usage(self.reply.tail)
        self.worker.ended(self, end, self.loop.time() - self.started, tokens)
        # No reference cycle: the memory, the body's above all, is to go now and not some day.
        self.client.served(self)
        self._task = self.lease = self.client.exchange = None
        self.body = b""
