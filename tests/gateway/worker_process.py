"""Real worker processes, as the supervisor starts them, with the test in the supervisor's and controller's
place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from gateway import sockets
from gateway.child import VARIABLE, Child
from gateway.settings import make
from replicas.board import Board
from replicas.control import ControlServer, Snapshot, UpstreamInfo

from .conftest import SERVICE, RawAnswer, eventually


@dataclass
class Process:
    """One `python -m gateway.app`. `alive`: closing it is the supervisor's death."""

    process: asyncio.subprocess.Process
    url: str
    alive: int

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self, seconds: float = 15.0) -> int:
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    def orphan(self) -> None:
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1


@dataclass
class Gateway:
    """`workers` processes on one board; `control` is there once `listen()` was called."""

    folder: Path
    workers: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    processes: list[Process] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self.stack = contextlib.AsyncExitStack()
        self.board = self.stack.enter_context(Board.create(self.folder / "load.board", self.workers))
        self.control = ControlServer(self.folder / "control.sock", lambda index: None)
        self.stack.push_async_callback(self.control.close)
        self.settings = make(state_dir=self.folder, workers=self.workers, **self.values)
        (self.folder / "metrics").mkdir()
        for index in range(self.workers):
            self.processes.append(await self._start(index))
        return self

    async def __aexit__(self, *error: object) -> None:
        for each in self.processes:
            if each.process.returncode is None:
                each.process.kill()
            await each.process.wait()
            each.orphan()
        await self.stack.aclose()

    async def _start(self, index: int) -> Process:
        (listener,) = sockets.listen("127.0.0.1", 0, 1, "--port")
        self.stack.enter_context(listener)
        read_end, write_end = os.pipe()
        child = Child(self.settings, index, listener.fileno(), read_end, read_end)
        metrics = str(self.folder / "metrics")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway.app",
            pass_fds=(listener.fileno(), read_end),
            env={**os.environ, VARIABLE: child.to_env(), "PROMETHEUS_MULTIPROC_DIR": metrics},
        )  # fmt: skip
        os.close(read_end)
        return Process(process, sockets.url(listener, "127.0.0.1"), write_end)

    async def listen(self) -> None:
        """The controller is there."""
        await self.control.start()

    async def publish(self, *urls: str, window: int = 64, **changes: Any) -> None:
        """The next generation, as `Rig.publish`; returns when every worker has applied it."""
        self.generation += 1
        upstreams = tuple(UpstreamInfo(f"up-{i}", i, url, window) for i, url in enumerate(urls))
        self.control.publish(Snapshot(self.generation, (replace(SERVICE, upstreams=upstreams, **changes),)))
        await eventually(
            lambda: (
                len(self.control.workers) == self.workers
                and all(w.generation == self.generation for w in self.control.workers.values())
            ),
            seconds=15,
        )

    async def raw(self, index: int, request: bytes) -> RawAnswer:
        """Send these bytes to one worker on a connection of their own."""
        port = int(self.processes[index].url.rsplit(":", 1)[1])
        sock = socket.create_connection(("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(request)
        return RawAnswer(reader, writer)
