"""A worker's state: its services, what it tells the controller, and the accounting of every request's end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

from gateway import largebodies
from gateway.access import AccessLog
from gateway.errors import End, GatewayError, ModelNotFound, Shutdown
from gateway.ids import Ids
from gateway.keys import ApiKeys
from gateway.metrics import ServiceMetrics
from gateway.patience import Phases
from gateway.proxy import Exchange
from gateway.relay import Attempt
from gateway.settings import Settings
from gateway.upstream import Stale
from gateway.upstreams import Limits, Upstream, Upstreams
from replicas.board import Board
from replicas.control import ColdStart, ControlClient, Snapshot

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
YOUNG_SECONDS = 0.1  # no attempt needs its clock watched sooner (patience.SHORTEST_PAUSE)
ABORT_SECONDS = 5.0
# A request that would not be held still wants a replica: it counts as one waiting for this long, so that the
# launch
# it asked for is not cancelled before its client comes back (Retry-After is at most 60 s).
WAKE_SECONDS = 60.0
NO_SERVICE = ""  # metric label of requests that named none


class Worker:
    """Mutable: by this process's one event loop."""

    def __init__(self, settings: Settings, index: int, board: Board) -> None:
        self.settings = settings
        self.index = index
        self.ids = Ids()
        self.phases = Phases()
        self.keys = ApiKeys(settings.api_key)
        self._limits = _limits(settings)
        self.ready = asyncio.Event()
        self.large = asyncio.Semaphore(largebodies.AT_ONCE)
        self.services: dict[str, Upstreams] = {}
        self.cells = board.cells
        self._board = board
        self._row = board.worker(index)
        self._metrics: dict[str, ServiceMetrics] = {}
        self._access = AccessLog(settings.access_log)
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken: dict[str, float] = {}
        self._wakers: dict[str, tuple[str, str]] = {}  # whose request came when nobody waited: key, request
        self._loop = asyncio.get_running_loop()
        self.control = ControlClient(
            settings.state_dir / "control.sock",
            index,
            os.getpid(),
            on_snapshot=self.on_snapshot,
            on_progress=self.on_progress,
            state=self._levels,
            wakers=lambda: self._wakers,
        )
        self.stopping = False
        self.young: set[Attempt] = set()  # those without a timer of their own yet
        self._looks = False  # at the young, before long

    def __repr__(self) -> str:
        return f"<Worker {self.index} {' '.join(map(repr, self.services.values()))}>"

    # --- life

    async def start(self) -> None:
        """Connect to the controller and wait for its first snapshot: nothing is accepted before."""
        self.cells[self._row.pid] = os.getpid()
        self._spawn(self.control.run())
        self._spawn(self._sweep())
        await self.ready.wait()

    def reload(self, settings: Settings) -> None:
        """Other keys and limits, for every request whose head comes from now on."""
        self.settings = settings
        self.keys = ApiKeys(settings.api_key)
        self._limits = _limits(settings)
        for service in self.services.values():
            service.limit(self._limits)

    def stop(self) -> None:
        """End what is held; what streams goes on."""
        self.stopping = True
        for service in self.services.values():
            service.stop()

    async def close(self) -> None:
        """After the last request."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for service in self.services.values():
            service.close()
        self._flush()
        self._access.close()

    def _flush(self) -> None:
        for metrics in self._metrics.values():
            metrics.flush()

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for service in self.services.values():
                service.sweep()
            self._flush()
            self._forget_wakes()

    # --- the controller

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """Apply one generation."""
        known, services = self.services, {}
        for info in snapshot.services:
            service = known.get(info.name)
            if service is None:
                metrics = self._metrics.setdefault(info.name, ServiceMetrics(info.name))
                service = Upstreams(
                    info,
                    self._board,
                    self.index,
                    limits=self._limits,
                    on_level=self._level,
                    on_suspect=self.control.suspect,
                    on_ejection=metrics.ejection,
                )
                if self.stopping:
                    service.stop()
            else:
                service.update(info)
            services[info.name] = service
        self.services = services
        for name, gone in known.items():
            if name not in services:
                gone.stop()
                gone.close()
        self.ready.set()

    def on_progress(self, name: str, cold: ColdStart | None) -> None:
        """News of a cold start, for beats."""
        service = self.services.get(name)
        if service is not None:
            service.cold = cold

    def waits(self, upstreams: Upstreams, key: str, request: str) -> None:
        """A request is held, or wants to be."""
        self._wakers.setdefault(upstreams.info.name, (key, request))

    def wake(self, upstreams: Upstreams, key: str, request: str) -> None:
        """Ask for a replica on behalf of a request that is not held."""
        name = upstreams.info.name
        self.waits(upstreams, key, request)
        fresh = name not in self._woken
        self._woken[name] = self._loop.time() + WAKE_SECONDS
        if fresh:
            self.control.send_state()

    def _level(self) -> None:
        """A room became empty, or stopped being so: there, `waits` follows before anything is sent."""
        for name, service in self.services.items():
            if not len(service.room) and name not in self._woken:
                self._wakers.pop(name, None)
        self.control.send_state()

    def _levels(self) -> dict[str, int]:
        return {
            name: len(service.room) + (1 if name in self._woken else 0)
            for name, service in self.services.items()
        }

    def _forget_wakes(self) -> None:
        now = self._loop.time()
        over = [
            name for name, until in self._woken.items() if until <= now or len(self.services.get(name, ()))
        ]
        for name in over:
            del self._woken[name]
        if over:
            self._level()

    # --- requests

    def watch(self, attempt: Attempt) -> None:
        """Have its clock watched, if it lasts: most are over before a timer of their own would pay."""
        if not self._looks:
            self._looks = True
            self._loop.call_later(YOUNG_SECONDS, self._look)
        self.young.add(attempt)

    def _look(self) -> None:
        now, young = self._loop.time(), self.young
        self.young, self._looks = set(), False
        for attempt in young:
            attempt.look_first(now)

    def service_for(self, model: str | None) -> Upstreams:
        """The service a request is for. With one, any model name will do, as with SGLang itself. Raises
        ModelNotFound."""
        if len(self.services) == 1:
            return next(iter(self.services.values()))
        for service in self.services.values():
            if model in (service.info.model, service.info.name):
                return service
        if not self.services:
            raise Shutdown("This gateway serves nothing yet. Try again.")
        raise ModelNotFound(
            f"The model {model!r} is not served here: GET /v1/models lists what is.", param="model"
        )

    def metrics(self, upstreams: Upstreams) -> ServiceMetrics:
        return self._metrics[upstreams.info.name]

    def arrived(self, upstreams: Upstreams) -> None:
        """A valid request was accepted."""
        self.cells[self._row.arrived + upstreams.info.index] += 1

    def ended(
        self, exchange: Exchange, end: End, seconds: float, tokens: tuple[int | None, int | None]
    ) -> None:
        """A request reached its typed end."""
        upstreams, reply = exchange.upstreams, exchange.reply
        if upstreams is not None and exchange.served:
            self.cells[self._row.ended + upstreams.info.index] += 1
        name = upstreams.info.name if upstreams is not None else self.default_service
        self.count(
            name, exchange.endpoint.path, reply.status, end, seconds, exchange.ttft, exchange.held, tokens
        )
        if self._access:
            self._access.write(_entry(exchange, self.index, end, seconds, tokens))

    def count(
        self,
        service: str,
        endpoint: str,
        status: int,
        end: End,
        seconds: float = 0.0,
        ttft: float | None = None,
        held: float | None = None,
        tokens: tuple[int | None, int | None] = (None, None),
    ) -> None:
        """Add one ended request to the metrics."""
        metrics = self._metrics.get(service)
        if metrics is None:
            metrics = self._metrics[service] = ServiceMetrics(service)
        metrics.request_ended(endpoint, status, end.value, seconds, ttft, held, *tokens)

    @property
    def default_service(self) -> str:
        """Metric label of a request that was rejected before its model was read."""
        return next(iter(self.services)) if len(self.services) == 1 else NO_SERVICE

    # --- abort

    def abort(self, upstreams: Upstreams, upstream: Upstream, rid: str) -> None:
        """Tell the replica, in the background, that nobody waits for `rid` any more."""
        self._spawn(self._abort(upstreams, upstream, rid))

    async def _abort(self, upstreams: Upstreams, upstream: Upstream, rid: str) -> None:
        pool = upstream.pool
        body = b'{"rid":"%b"}' % rid.encode()
        key = upstreams.info.replica_key
        head = (
            f"POST {pool.prefix.decode()}/abort_request HTTP/1.1\r\nhost: {pool.authority}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        if key:
            head += f"authorization: Bearer {key}\r\n"
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                connection = await pool.dial()
                try:
                    connection.request(head.encode() + b"\r\n" + body)
                    await connection.head()
                finally:
                    connection.abort()
        except (GatewayError, Stale, TimeoutError) as error:
            log.info("%s was not told to abort %s: %s", upstream.id, rid, error)


def _limits(settings: Settings) -> Limits:
    return Limits(settings.max_waiting, settings.max_waiting_bytes, settings.connect_timeout)


def _entry(
    exchange: Exchange, worker: int, end: End, seconds: float, tokens: tuple[int | None, int | None]
) -> Mapping[str, Any]:
    upstreams, upstream, reply, lease = exchange.upstreams, exchange.upstream, exchange.reply, exchange.lease
    return {
        "request_id": exchange.request_id,
        "worker": worker,
        "service": upstreams.info.name if upstreams is not None else None,
        "key": exchange.key or None,
        "endpoint": exchange.endpoint.path,
        "model": exchange.model or None,
        "stream": reply.stream,
        "status": reply.status,
        "end": end.value,
        "replica": upstream.id if upstream is not None else None,
        "attempts": exchange.attempts,
        "held_s": _rounded(exchange.held),
        "ttft_s": _rounded(exchange.ttft),
        "duration_s": _rounded(seconds),
        "tokens_in": tokens[0],
        "tokens_out": tokens[1],
        "counted_ns": lease.counted if lease is not None else None,
        "released_ns": lease.released if lease is not None else None,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
