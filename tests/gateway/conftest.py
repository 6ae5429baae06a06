"""A real worker on a real loopback port, with a controller's socket that a test speaks through."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from gateway.app import App, Server, config
from gateway.settings import Settings, make
from gateway.worker import Worker
from replicas.board import Board
from replicas.control import ColdStart, ControlServer, ServiceInfo, Snapshot, UpstreamInfo

SERVICE = ServiceInfo(
    name="r1", index=0, model="deepseek-ai/DeepSeek-R1", status="open", code="", message="", retry_after=30,
    upstreams=(), state="cold", hold_max_seconds=600.0, upstream_timeout=None, replica_key=None, cold=None,
)  # fmt: skip


async def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """The first true value of `condition`. The limit is for a broken gateway, no promise about time."""
    async with asyncio.timeout(seconds):
        while not (value := condition()):  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(0.001)
    return value


@dataclass
class RawAnswer:
    """Bytes of one answer as they came from the socket."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    data: bytes = b""

    async def until(self, marker: bytes, seconds: float = 10.0) -> bytes:
        """Read on until `marker` has come; all bytes so far."""
        async with asyncio.timeout(seconds):
            while marker not in self.data:
                more = await self.reader.read(65536)
                if not more:
                    raise AssertionError(f"closed before {marker!r}: {self.data!r}")
                self.data += more
        return self.data

    async def rest(self, seconds: float = 10.0) -> bytes:
        """All bytes to the end of the connection; a reset counts as an end."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                while more := await self.reader.read(65536):
                    self.data += more
        return self.data

    async def close(self, *, reset: bool = False) -> None:
        """Close, by a reset if asked; nothing where the peer's own reset has already closed it."""
        if reset and not self.writer.is_closing():
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass
class Rig:
    """`publish` is the controller's voice, `control.workers` what it hears; `board` what all see."""

    folder: Path
    settings: Settings
    workers: int = 1
    service: ServiceInfo = SERVICE
    generation: int = 0
    heard: list[int] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self.stack = contextlib.AsyncExitStack()
        self.board = Board.create(self.folder / "load.board", self.workers)
        self.stack.callback(self.board.close)
        self.control = ControlServer(self.folder / "control.sock", self.heard.append)
        await self.control.start()
        self.stack.push_async_callback(self.control.close)
        self.publish()
        self.servers = [await self._serve(i) for i in range(self.workers)]
        self.url = self.urls[0]
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=30, limits=limits)
        await self.stack.enter_async_context(self.client)
        return self

    async def _serve(self, index: int) -> Server:
        worker = Worker(self.settings, index, self.board)
        self.stack.push_async_callback(worker.close)
        await worker.start()
        # As a worker gets it: by its number, so that it knows to be TCP (asyncio sets TCP_NODELAY only then).
        sock = socket.socket(fileno=socket.create_server(("127.0.0.1", 0)).detach())
        server = QuietServer(config(App(worker), drain_seconds=1, log_level="warning"), worker)
        task = asyncio.create_task(server.serve(sockets=[sock]))

        async def stop() -> None:
            server.should_exit = server.force_exit = True
            await task

        self.stack.push_async_callback(stop)
        await eventually(lambda: server.started)
        server.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        return server

    async def __aexit__(self, *error: object) -> None:
        await self.stack.aclose()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    @property
    def worker(self) -> Worker:
        return self.servers[0].worker

    def publish(self, *urls: str, window: int = 64, **changes: Any) -> None:
        """The next generation; upstreams are named up-0, up-1 ... by position, in slots 0, 1 ..."""
        self.generation += 1
        upstreams = tuple(UpstreamInfo(f"up-{i}", i, url, window) for i, url in enumerate(urls))
        state = "ready" if urls else "cold"
        self.service = replace(self.service, upstreams=upstreams, **{"state": state, **changes})
        self.control.publish(Snapshot(self.generation, (self.service,)))

    def progress(
        self, phase: str | None, progress: float | None = None, eta: float | None = None, **more: Any
    ) -> None:
        self.control.progress("r1", ColdStart("r1-gw-00000000-1", phase, progress, eta, **more))

    async def acked(self) -> None:
        """Every worker has applied the last generation."""
        await eventually(
            lambda: (
                len(self.control.workers) == self.workers
                and all(w.generation == self.generation for w in self.control.workers.values())
            )
        )

    async def waiting(self, count: int) -> None:
        await eventually(lambda: self.board.totals(0).waiting == count)

    async def quiet(self) -> None:
        """Nothing in flight, nothing held, every accepted request ended."""
        await eventually(
            lambda: (
                all(self.board.in_flight(slot) == 0 for slot in range(8))
                and self.board.totals(0).waiting == 0
                and self.board.totals(0).arrived == self.board.totals(0).ended
            )
        )

    async def raw(
        self,
        body: Any,
        *,
        path: str = "/v1/chat/completions",
        headers: Iterable[str] = (),
        url: str | None = None,
    ) -> RawAnswer:
        """Send one request by hand on a connection of its own."""
        port = int((url or self.url).rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [
            f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "Connection: close", *headers,
        ]  # fmt: skip
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        return RawAnswer(reader, writer)


class QuietServer(Server):
    """A worker's server that leaves signals alone: the test's process has its own."""

    url = ""

    @property
    def worker(self) -> Worker:
        return self._worker

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@pytest.fixture
async def rigs(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    """Makes rigs: `rig = await rigs(commit_after=0.1)`; keyword arguments are settings."""
    async with contextlib.AsyncExitStack() as stack:

        async def make_rig(*, workers: int = 1, **values: Any) -> Rig:
            settings = make(state_dir=tmp_path, workers=workers, **values)
            return await stack.enter_async_context(Rig(tmp_path, settings, workers))

        yield make_rig


@pytest.fixture
async def rig(rigs: Callable[..., Awaitable[Rig]]) -> Rig:
    return await rigs()


def chat(text: str = "how many rs are in strawberry", **more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": "r1", "messages": [{"role": "user", "content": text}], **more}


def on_task(monkeypatch: pytest.MonkeyPatch, made: Callable[[str, asyncio.Task[Any]], Any]) -> None:
    """Tell `made` of each task that a request gets from now on: its coroutine's name, and the task.

    By the event loop: the methods of a compiled module cannot be replaced.
    """
    loop = asyncio.get_running_loop()
    original = loop.create_task

    def create_task(coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = original(coroutine, **options)
        name = getattr(coroutine, "__qualname__", type(coroutine).__name__)
        if "Exchange" in name:
            made(name, task)
        return task

    monkeypatch.setattr(loop, "create_task", create_task)


def on_dial(monkeypatch: pytest.MonkeyPatch, port: int, dialled: Callable[[], Awaitable[Any]]) -> None:
    """Await `dialled` from now on in place of each dial of `port`."""
    loop = asyncio.get_running_loop()
    original = loop.create_connection

    async def create_connection(factory: Any, host: Any = None, to: Any = None, **options: Any) -> Any:
        if to == port:
            return await dialled()
        return await original(factory, host, to, **options)

    monkeypatch.setattr(loop, "create_connection", create_connection)
