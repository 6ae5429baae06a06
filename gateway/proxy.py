"""One request, from its head to its typed end: checks, the wait for a lease, attempts.

`Exchange` is told by its `Client` (incoming.py) what has come; once the body is whole and valid it has a task
of its own. An attempt at an upstream, and the relay of the answer, are in relay.py; what the client may still
be sent is in reply.py. A client that leaves cancels the task, in whichever phase it is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway import headers as lines
from gateway import openai
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
    UnsupportedEncoding,
    UpstreamError,
)
from gateway.hold import Place, monotonic_ns
from gateway.patience import Patience, check_limit, check_wish, cold_headers, hold, patience
from gateway.relay import Attempt, counts_against
from gateway.reply import Reply
from gateway.upstreams import Lease, Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.incoming import Client
    from gateway.worker import Worker

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


class Exchange:
    """Mutable: by its own task, and by the connection's callbacks (`on_...`) before and beside it.

    `rid` is ours, made per attempt; "" where SGLang takes none.
    """

    __slots__ = (
        "_attempt",
        "_body",
        "_cut",
        "_head",
        "_since",
        "_task",
        "attempts",
        "client",
        "ended",
        "endpoint",
        "held",
        "key",
        "lease",
        "loop",
        "model",
        "patience",
        "reply",
        "request_id",
        "rid",
        "served",
        "started",
        "ttft",
        "upstream",
        "upstreams",
        "worker",
    )  # fmt: skip

    patience: Patience

    def __init__(self, worker: Worker, client: Client) -> None:
        self.worker = worker
        self.client = client
        self.endpoint = client.endpoint
        self.loop = asyncio.get_running_loop()
        self.started = self.loop.time()
        self.rid = secrets.token_hex(16)
        self.request_id = self.rid
        self.reply = Reply(client, client.endpoint, self.rid, self.started)
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
        self._head: dict[bytes, bytes] = {}
        self._body = b""
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
        if self._checked(self._check_body, body):
            self._task = self.client.spawn(self._run())

    def _checked(self, check: Callable[..., None], *what: bytes) -> bool:
        try:
            check(*what)
        except GatewayError as error:
            self._refuse(error)
        except Exception:
            log.exception("request %s failed by a fault of the gateway's own", self.request_id)
            self._refuse(InternalError("The gateway failed; the cause is in its log."))
        else:
            return True
        return False

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
        if self._cut is None:
            self._fail(Shutdown("This gateway is stopping and waited as long as it may."))
        self._account(self._cut or End.SHUTDOWN)

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
            self._account(end)
        elif self._cut is None and (not self.reply.finished or self.client.paused):
            self._cut = end
            self._task.cancel()

    # --- checks

    def _check_head(self) -> None:
        worker, settings = self.worker, self.worker.settings
        self._head = headers = dict(self.client.headers)
        self.request_id = lines.request_id(headers, self.rid)
        self.reply.describe(stream=False, model="", rid=self.rid, request_id=self.request_id)
        self.key = worker.keys.check(headers)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"", b"identity"):
            raise UnsupportedEncoding(
                f"Content-Encoding {encoding.decode('latin-1')!r} is not served: send the body uncompressed."
            )
        kind = headers.get(b"content-type", b"")
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            # Also what keeps a web page from waking a paid machine: a browser asks before it may send this
            # type.
            raise UnsupportedEncoding(
                "Send the body as JSON, with 'Content-Type: application/json'.",
                code="unsupported_content_type",
            )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > settings.max_body:
            raise BodyTooLarge(
                f"The request body has {int(declared)} bytes; at most {settings.max_body} are served "
                "(--max-body)."
            )

    def _check_body(self, raw: bytes) -> None:
        worker, settings = self.worker, self.worker.settings
        self._body = raw
        body = openai.parse(raw, self.endpoint)
        self.upstreams = upstreams = worker.service_for(body.get("model"))
        self.patience = patience(
            self._head.get(b"x-stainless-read-timeout"),
            self._head.get(b"x-gateway-hold"),
            hold=settings.hold,
            commit_after=settings.commit_after,
            beat_every=settings.beat_every,
            beat_after=settings.beat_after,
        )
        self.model = body.get("model") or upstreams.info.model
        if not openai.takes_rid(body, self.endpoint):
            self.rid = ""
        self.reply.describe(
            stream=bool(body.get("stream")),
            model=self.model,
            rid=self.rid or self.request_id,
            request_id=self.request_id,
        )

    def _refuse(self, error: GatewayError) -> None:
        """A request that ends before it has a task."""
        self.reply.fail(error)
        self._account(error.end)

    # --- the task

    async def _run(self) -> None:
        """Serve the request, and account its end. Raises nothing of its own."""
        end = End.COMPLETE
        try:
            await self._serve()
            if self.client.paused:
                await self._drain()
        except asyncio.CancelledError:
            end = self._cut or End.SHUTDOWN
            if self._cut is None:  # the drain limit of a stopping gateway
                self._fail(Shutdown("This gateway is stopping and waited as long as it may."))
        except GatewayError as error:
            end = error.end
            self._fail(error)
        except Exception:
            end = InternalError.end
            log.exception("request %s failed by a fault of the gateway's own", self.request_id)
            self._fail(InternalError("The gateway failed; the cause is in its log."))
        finally:
            self._account(end)

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

    async def _serve(self) -> None:
        """Attempts around the lease: another one only while no byte of a response has come."""
        upstreams = self.upstreams
        assert upstreams is not None
        self.worker.arrived(upstreams)
        self.served = True
        avoid: list[str] = []
        again = False
        while True:
            try:
                check_wish(self, upstreams)
                self.lease = upstreams.lease(self._since, len(self._body), avoid, self._hold, again=again)
                async with self.lease as upstream:
                    self.upstream = upstream
                    self.attempts += 1
                    await self._try(upstreams, upstream)
                return
            except Undialable as error:
                # Nothing was sent: no attempt. It waits for whoever can be dialled, as long as any hold may.
                hopeless = error.lasting or self.patience.mode == "reject"
                if hopeless and not upstreams.has_other_than(()):
                    raise
                self.attempts -= 1
                check_limit(self, upstreams)
                self.retried(error.cause)
            except (NotTaken, DiedSilent) as error:
                # Nothing ran, or nothing was answered: safe to try elsewhere.
                assert self.upstream is not None
                avoid.append(self.upstream.id)
                if self.attempts >= MAX_ATTEMPTS or not upstreams.has_other_than(avoid):
                    raise
                self.retried(error.cause)
            again = True

    async def _hold(self, place: Place) -> None:
        await hold(self, place)

    async def _try(self, upstreams: Upstreams, upstream: Upstream) -> None:
        self._attempt = attempt = Attempt(self, upstreams, upstream)
        try:
            await attempt.run()
        except UpstreamError as error:
            if counts_against(error):
                upstreams.failed(upstream, error.message, unreachable=isinstance(error, Undialable))
            raise
        else:
            upstreams.succeeded(upstream)
        finally:
            self._attempt = None

    def retried(self, cause: str) -> None:
        """The request is sent again, for this cause."""
        assert self.upstreams is not None
        self.worker.metrics(self.upstreams).retry(cause)
        if self.rid:
            self.rid = secrets.token_hex(16)  # SGLang refuses a rid it has seen

    def request(self, upstreams: Upstreams, upstream: Upstream) -> bytes:
        """The bytes for this upstream: the client's body, our `rid` put first."""
        client, pool = self.client, upstream.pool
        body = openai.with_rid(self._body, self.rid) if self.rid else self._body
        target = pool.prefix + self.endpoint.target + (b"?" + client.query if client.query else b"")
        head = lines.to_replica(
            client.headers,
            target=target,
            authority=pool.authority,
            key=upstreams.info.replica_key,
            request_id=self.request_id,
            client=client.address,
            scheme=client.scheme,
            length=len(body),
        )
        return head + body

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
        self._task = self.lease = self.client.exchange = None
        self._body = b""
