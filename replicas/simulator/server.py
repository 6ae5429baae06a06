"""The simulated server: HTTP in front, the engine behind, faults in between."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from . import shapes
from .answers import DIALECTS, Answer, Choice
from .asking import Ask, Refused, parse
from .config import SimConfig
from .connection import Connection, Exchange
from .engine import Engine, Sequence
from .faults import Faults
from .profiles import PROFILES
from .reply import Reply
from .reports import Reports
from .routes import route
from .runner import Runner
from .stats import Stats


def _quiet(line: str) -> None:
    """No log."""


class Simulator:
    """One simulated SGLang server. `async with Simulator(SimConfig()) as sim:` is up at once, without any
    startup phase.

    Mutable: `live` (requests by rid), `draining`, `starting`, `silent`, `faults`; changed by requests and
    by the faults. As a process, `dies` is True: a crash then ends the process, else it ends the server only.
    """

    def __init__(
        self, config: SimConfig | None = None, *, log: Callable[[str], None] = _quiet, dies: bool = False
    ) -> None:
        self.config = config or SimConfig()
        self.log = log
        self.dies = dies
        self.faults = Faults.parse(self.config.faults)
        self.stats = Stats()
        self.live: dict[str, Answer] = {}  # by the rid of each sequence
        self.connections: set[Connection] = set()
        self.keep_alive = self.config.keep_alive
        self.starting = False
        self.draining = False
        self.silent = False
        self.port = self.config.port
        self.closed = asyncio.Event()
        self._reply = Reply.make(self.config.reply, reasoning=self.config.reasoning_parser is not None)
        self._answered = 0
        self._server: asyncio.Server | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._crash: asyncio.Future[None] | None = None
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
        return f"http://{self.config.host}:{self.port}"

    @property
    def hung(self) -> bool:
        """Whether the scheduler is frozen."""
        return self.runner.frozen

    def _boot(self) -> None:
        config = self.config
        self.engine = Engine(
            PROFILES[config.profile], config.max_running, config.max_queued, config.kv_tokens
        )
        self.reports = Reports(config, self.engine, self.log)
        self.runner = Runner(
            self.engine,
            self._stepped,
            self.reports.began,
            speedup=config.speedup,
            jitter=config.jitter,
            seed=config.seed,
        )
        self.runner.slowness = self.faults.slow

    async def open(self, *, starting: bool = False) -> None:
        """Open the port; `starting`: /health says 503 until `ready()`. After a crash: a new engine on the
        same port.
        """
        loop = asyncio.get_running_loop()
        self._boot()
        self.starting = starting
        self.draining = self.silent = False
        self.closed.clear()
        self._server = await loop.create_server(
            lambda: Connection(self), self.config.host, self.config.port, backlog=2048
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
        self.live.clear()
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if self._server is not None:
            self._server.close()
            self._cut()
            await self._server.wait_closed()
            self._server = None
        self.closed.set()
        await asyncio.sleep(0)

    async def drain(self) -> None:
        """SIGTERM: /health says 503 at once, everything else goes on until nothing is left; then the end."""
        self.draining = True
        while True:
            await asyncio.sleep(self.config.drain_tick)
            if not self.live:
                break
        await self.close()

    # faults

    async def crash(self, silence: float = 0.0) -> None:
        """Die as a killed scheduler does: `silence` seconds in which nothing is answered, then EOF on
        every connection.
        """
        self.runner.freeze()
        self.silent = True
        self.log(
            "Subprocess scheduler_0 (pid=4711) crashed with exit code -9. Triggering SIGQUIT for cleanup..."
        )
        await asyncio.sleep(silence)
        if self.dies:
            if self.config.exit_code is None:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(self.config.exit_code or 0)
        for answer in set(self.live.values()):
            self._end(answer, "crashed")
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
        """Set a fault, or do it now. Raises FaultError."""
        self.faults.set(kind, number)
        self.runner.slowness = self.faults.slow
        if kind in ("crash", "exit"):
            default = self.config.crash_silence if kind == "crash" else 0.0
            self._crash_soon(default if silence is None else silence)
        elif kind == "hang":
            self.hang()
        elif kind == "resume":
            self.resume()
        elif kind == "reset":
            for connection in self.connections - {spare}:
                connection.cut(reset=True)

    def _crash_soon(self, silence: float) -> None:
        self.runner.freeze()
        self.silent = True
        self._crash = asyncio.ensure_future(self.crash(silence))

    def _cut(self) -> None:
        for connection in list(self.connections):
            connection.cut()

    # requests

    def handle(self, exchange: Exchange) -> None:
        """Answer one request, now or later."""
        if self.silent:
            return
        try:
            route(self, exchange)
        except Refused as refused:
            exchange.respond(refused.status, refused.body, refused.content_type, vary=refused.status != 500)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back after that many seconds, unless the server is closed before."""

        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)

    def generate(self, exchange: Exchange) -> None:
        """One of the generating endpoints: check, queue, answer as the tokens come."""
        ask = parse(
            exchange.path,
            exchange.headers.get("content-type", ""),
            bytes(exchange.body),
            self.config.context_length,
        )
        if self.faults.take("drop"):
            exchange.connection.cut()
            return
        if ask.rid is not None and ask.rid in self.live:
            raise Refused(400, shapes.flat_error(f"Duplicate request ID detected: {ask.rid}"))
        if self.engine.full or self.faults.take("queue_full"):
            self.stats.refused += 1
            self._refuse(exchange, ask)
            return
        marker = ask.user or exchange.headers.get("x-request-id")
        parser = self.config.reasoning_parser is not None
        answer = Answer.make(ask, exchange, self._reply, parser=parser, marker=marker)
        self.stats.arrived(answer)
        if (
            self.faults.hang_after_requests is not None
            and self.stats.runs_total > self.faults.hang_after_requests
        ):
            self.hang()
        for choice in answer.choices:
            self.live[choice.sequence.rid] = answer
            self.engine.add(choice.sequence)
        self._levels()
        exchange.on_gone = lambda: self._gone(answer)
        exchange.on_writable = lambda: self._flush(answer)
        self.runner.kick()

    def abort(self, prefix: str | None) -> None:
        """POST /abort_request: every request whose rid starts so; None: all."""
        for rid, answer in list(self.live.items()):
            if prefix is None or rid.startswith(prefix):
                for choice in answer.choices:
                    if choice.sequence.rid == rid and choice.sequence.finish is None:
                        self.engine.abort(choice.sequence)
                        self.stats.aborted.append(rid)
                        self._advance(choice)
        self._levels()

    def _refuse(self, exchange: Exchange, ask: Ask) -> None:
        if ask.stream:
            exchange.start()
            exchange.chunk(shapes.stream_error(shapes.QUEUE_FULL, "SERVICE_UNAVAILABLE", 503))
            exchange.chunk(shapes.DONE)
            exchange.end()
        else:
            exchange.respond(503, shapes.flat_error(shapes.QUEUE_FULL, "503", 503))

    def _stepped(self, sequences: list[Sequence]) -> None:
        self.reports.stepped(len(sequences))
        for sequence in sequences:
            self._advance(sequence.owner)
            if self.silent:
                return
        self._levels()

    def _advance(self, choice: Choice) -> None:
        """One more token of one choice, or its end."""
        answer = choice.answer
        choice.ended = choice.sequence.finish is not None
        if answer.first_ns is None and choice.sequence.generated:
            answer.first_ns = time.monotonic_ns()
            self.reports.ttft[0] += 1
            self.reports.ttft[1] += (answer.first_ns - answer.arrived_ns) / 1e9
        if answer.gone and answer.ask.stream and not answer.over:
            self._drop(
                answer
            )  # the handler wakes for the first token, makes its response and finds the client gone
            return
        if answer.ask.stream:
            self._stream(choice)
        if answer.over:
            self._complete(answer)
        generated = choice.sequence.generated
        if self.faults.hang_after is not None and generated >= self.faults.hang_after:
            self.faults.hang_after = None
            self.hang()
        if self.faults.crash_after is not None and generated >= self.faults.crash_after:
            self.faults.crash_after = None
            self._crash_soon(self.config.crash_silence)

    def _stream(self, choice: Choice) -> None:
        answer, sequence = choice.answer, choice.sequence
        exchange = answer.exchange
        due = sequence.generated - choice.sent >= self.config.stream_interval or choice.sent == 0
        if sequence.finish is None and not (due and exchange.connection.writable):
            return  # a client that does not read gets the tokens together later
        if not answer.started:
            answer.started = True
            exchange.start()
        for event in DIALECTS[answer.ask.path].events(choice):
            exchange.chunk(event)

    def _flush(self, answer: Answer) -> None:
        for choice in answer.choices:
            if choice.sequence.finish is None and choice.sequence.generated > choice.sent:
                self._stream(choice)

    def _complete(self, answer: Answer) -> None:
        exchange = answer.exchange
        dialect = DIALECTS[answer.ask.path]
        aborted = any(choice.sequence.finish == "abort" for choice in answer.choices)
        self._end(answer, "aborted" if aborted else "disconnected" if answer.gone else "complete")
        if answer.ask.stream:
            for event in dialect.closing(answer):
                exchange.chunk(event)
            exchange.chunk(shapes.DONE)
            exchange.end()
        else:
            exchange.respond(200, dialect.body(answer))
        self._answered += 1
        if (
            self.faults.crash_after_requests is not None
            and self._answered >= self.faults.crash_after_requests
        ):
            self.faults.crash_after_requests = None
            self._crash_soon(self.config.crash_silence)

    def _end(self, answer: Answer, end: str) -> None:
        """It is over, one way or the other: out of the books."""
        answer.finished_ns = time.monotonic_ns()
        for choice in answer.choices:
            self.live.pop(choice.sequence.rid, None)
        self.stats.ended(answer, end)
        self.reports.count("num_requests", answer.ask.stream)
        self.reports.count("prompt_tokens", answer.ask.stream, sum(answer.ask.prompts))
        self.reports.count("generation_tokens", answer.ask.stream, answer.generated)
        if end != "complete":
            self.reports.count("num_aborted_requests", answer.ask.stream)
        self.reports.e2e[0] += 1
        self.reports.e2e[1] += (answer.finished_ns - answer.arrived_ns) / 1e9

    def _gone(self, answer: Answer) -> None:
        """The client left: seen at once in mid-stream, else by the next look, which comes every
        `disconnect_poll` seconds.
        """
        if self.silent:
            return
        answer.gone = True
        self.stats.disconnected.append(answer.rid)
        if answer.started:
            self._drop(answer)
            return
        poll = self.config.disconnect_poll
        waited = (time.monotonic_ns() - answer.arrived_ns) / 1e9
        next_look = (math.floor(waited / poll) + 1) * poll if poll > 0 else waited
        self.later(next_look - waited, lambda: self._drop(answer))

    def _drop(self, answer: Answer) -> None:
        """Abort a request that nobody waits for."""
        if answer.finished_ns is not None:
            return
        for choice in answer.choices:
            if choice.sequence.finish is None:
                self.engine.abort(choice.sequence)
                self.stats.aborted.append(choice.sequence.rid)
        self._end(answer, "disconnected")
        answer.exchange.done = True
        self._levels()

    def _levels(self) -> None:
        self.stats.running = self.engine.running_count
        self.stats.queued = len(self.engine.waiting)

    def answered(self, exchange: Exchange) -> None:
        """The access log, as uvicorn's."""
        status = exchange.status or 0
        phrase = {200: "OK", 503: "Service Unavailable", 400: "Bad Request", 404: "Not Found"}.get(status, "")
        target = exchange.target.decode("latin-1")
        line = (
            f'INFO:     {exchange.connection.peer} - "{exchange.method} {target} HTTP/1.1" {status} {phrase}'
        )
        self.log(line.rstrip())
