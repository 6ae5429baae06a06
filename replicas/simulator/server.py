"""The simulated server: HTTP in front, the engine behind, faults in between."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Self

from .config import SimConfig
from .connection import Connection, Exchange
from .engine import Engine
from .faults import Faults
from .invalid import Refused
from .profiles import PROFILES
from .reports import Reports
from .routes import route
from .runner import Runner
from .serving import Serving
from .stats import Stats


def _quiet(line: str) -> None:
    """No log."""


def _tls(config: SimConfig) -> ssl.SSLContext | None:
    """As uvicorn makes it. Raises OSError when the files are no key and certificate."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    return context


class Simulator:
    """One simulated SGLang server. `async with Simulator(SimConfig()) as sim:` is up at once, without a
    startup.

    Mutable: `starting`, `draining`, `silent` (a crashed process that still holds its connections), `faults`;
    changed by signals and faults. `dies`: a crash ends the process; else, in a test, the server only, which
    `open()` starts anew on the same port.
    """

    def __init__(
        self, config: SimConfig | None = None, *, log: Callable[[str], None] = _quiet, dies: bool = False
    ) -> None:
        self.config = config or SimConfig()
        self.log = log
        self.dies = dies
        self.faults = Faults.parse(self.config.faults)
        self.stats = Stats(self.config.journal)
        self.connections: set[Connection] = set()
        self.keep_alive = self.config.keep_alive
        self.starting = False
        self.draining = False
        self.silent = False
        self.port = self.config.port
        self.closed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._crash: asyncio.Task[None] | None = None
        self._boot()

    def __repr__(self) -> str:
        return f"<Simulator {self.url} {self.engine!r}>"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"{'https' if self.config.ssl_certfile else 'http'}://{self.config.host}:{self.port}"

    @property
    def hung(self) -> bool:
        """Whether the scheduler is frozen."""
        return self.runner.frozen

    def _boot(self) -> None:
        """A new, empty engine and what belongs to it."""
        config = self.config
        self.engine = Engine(
            PROFILES[config.profile], config.max_running, config.max_queued, config.kv_tokens
        )
        self.reports = Reports(config, self.engine, self.log)
        self.serving = Serving(self)
        self.runner = Runner(
            self.engine,
            self.serving.stepped,
            self.reports.began,
            speedup=config.speedup,
            jitter=config.jitter,
            seed=config.seed,
        )
        self.runner.slowness = self.faults.slow

    async def open(self, *, starting: bool = False) -> None:
        """Open the port; `starting`: /health says 503 until `ready()`. Raises OSError when the port is
        taken or the TLS files are not usable.
        """
        loop = asyncio.get_running_loop()
        self._boot()
        self.starting = starting
        self.draining = self.silent = False
        self.closed.clear()
        self._server = await loop.create_server(
            lambda: Connection(self),
            self.config.host,
            self.config.port,
            backlog=2048,
            ssl=_tls(self.config),
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.config = replace(self.config, port=self.port)

    def ready(self) -> None:
        """Warmed up."""
        self.starting = False

    async def close(self) -> None:
        """Close the port and every connection, at once."""
        self.runner.freeze()
        self.silent = True
        if self._crash is not None and self._crash is not asyncio.current_task():
            self._crash.cancel()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            for connection in list(self.connections):
                connection.cut()
            await server.wait_closed()
        self.closed.set()
        await asyncio.sleep(0)  # the transports close their sockets in the next turn of the loop

    async def drain(self) -> None:
        """SIGTERM: /health says 503 at once, all else goes on, new requests too, until nothing is left;
        then the end.
        """
        self.draining = True
        while True:
            await asyncio.sleep(self.config.drain_tick)
            if not self.serving.live:
                break
        await self.close()

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back after that many seconds, unless the server is closed before."""

        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)

    def handle(self, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        if self.silent:
            return
        try:
            route(self, exchange)
        except Refused as refused:
            exchange.respond(refused.status, refused.body, refused.content_type, vary=refused.status != 500)

    def answered(self, exchange: Exchange) -> None:
        """The access log, as uvicorn's."""
        status = HTTPStatus(exchange.status or 200)
        line = f"{exchange.method} {exchange.target.decode('latin-1')} HTTP/1.1"
        self.log(f'INFO:     {exchange.connection.peer} - "{line}" {status.value} {status.phrase}')

    # faults

    async def crash(self, silence: float = 0.0) -> None:
        """Die as a killed scheduler does: `silence` seconds without any answer, then EOF on every
        connection.
        """
        self.runner.freeze()
        self.silent = True
        self.log("Subprocess scheduler_0 (pid=4711) crashed with exit code -9. Triggering SIGQUIT...")
        await asyncio.sleep(silence)
        if self.dies:
            if self.config.exit_code is None:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(self.config.exit_code or 0)
        self.serving.crashed()
        await self.close()

    def hang(self) -> None:
        """Freeze the scheduler: the port answers, nothing is generated."""
        self.runner.freeze()

    def resume(self) -> None:
        """Thaw it."""
        self.runner.thaw()

    def inject(
        self,
        kind: str,
        number: float | None = None,
        silence: float | None = None,
        spare: Connection | None = None,
    ) -> None:
        """Set a fault, or do it now. `spare`: not to be reset. Raises FaultError."""
        self.faults.set(kind, number)
        self.runner.slowness = self.faults.slow
        if kind == "crash":
            self._crash_soon(self.config.crash_silence if silence is None else silence)
        elif kind == "exit":
            self._crash_soon(0.0)
        elif kind == "hang":
            self.hang()
        elif kind == "resume":
            self.resume()
        elif kind == "reset":
            for connection in self.connections - {spare}:
                connection.cut(reset=True)

    def tripped(self, tokens: int, answered: int) -> None:
        """Some answer has that many tokens, and that many answers are complete: do the faults that wait
        for it.
        """
        faults = self.faults
        if faults.hang_after is not None and tokens >= faults.hang_after:
            faults.hang_after = None
            self.hang()
        crash = faults.crash_after is not None and tokens >= faults.crash_after
        if crash or (faults.crash_after_requests is not None and answered >= faults.crash_after_requests):
            faults.crash_after = faults.crash_after_requests = None
            self._crash_soon(self.config.crash_silence)

    def _crash_soon(self, silence: float) -> None:
        self.runner.freeze()
        self.silent = True
        self._crash = asyncio.ensure_future(self.crash(silence))
