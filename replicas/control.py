"""The control socket: the controller tells the workers which upstreams exist, the workers tell it who waits.

The messages are in messages.py. A worker *acks* a generation by naming it in its state, which it does after
`on_snapshot` has returned. An ack counts for one connection only: it is 0 until the worker has applied a
snapshot of this very controller.

Mutable here: `ControlServer`, by the controller's event loop, and `ControlClient`, by the worker's; neither
is thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from replicas.messages import (
    MAX_LINE,
    MAX_SUSPECTS,
    PROTOCOL,
    ColdStart,
    ProtocolError,
    ServiceInfo,
    Snapshot,
    Status,
    UpstreamInfo,
    WorkerState,
    decode_cold,
    decode_snapshot,
    decode_state,
    line,
    read,
)

__all__ = [
    "ColdStart",
    "ControlClient",
    "ControlError",
    "ControlServer",
    "ServiceInfo",
    "Snapshot",
    "Status",
    "UpstreamInfo",
    "WorkerState",
]

log = logging.getLogger(__name__)

MAX_UNSENT = 1024 * 1024
"""Bytes that the controller keeps for a worker that does not read; past it the connection is dropped."""
BACKOFF = (0.02, 1.0)
"""First and longest pause between two attempts to reach the controller, seconds."""
LONGER = 1.2
"""Each pause to the one before: it is 20 ms and a fifth of the time waited so far. Both processes start at
once and the controller takes 0.3 s longer: a worker that doubled its pauses came up to 0.4 s late."""


class ControlError(Exception):
    """The control socket cannot be made; the message says why."""


class ControlServer:
    """The controller's end. `on_change(index)` is called after each state of a worker and each (dis)connect.

    `workers` holds the connected workers only: one that lives (the board knows its pid) but is absent here
    may still use an old generation. The file at `path` is replaced when the server starts; mode 0600.
    """

    def __init__(self, path: str | os.PathLike[str], on_change: Callable[[int], None]) -> None:
        self.path = Path(path)
        self.workers: dict[int, WorkerState] = {}
        self._on_change = on_change
        self._server: asyncio.Server | None = None
        self._peers: dict[int, asyncio.StreamWriter] = {}  # by worker index, as `workers`
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._snapshot: Snapshot | None = None
        self._snapshot_line = b""
        self._progress: dict[str, bytes] = {}  # newer than the snapshot

    def __repr__(self) -> str:
        generation = self._snapshot.generation if self._snapshot else None
        return f"<ControlServer generation={generation} workers={sorted(self.workers)}>"

    async def start(self) -> None:
        """Listen. A stale socket file is replaced; raises ControlError where the path cannot be used."""
        sock = _bind(self.path)
        try:
            self._server = await asyncio.start_unix_server(self._connected, sock=sock, limit=MAX_LINE)
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        """Drop every worker and remove the socket file. Closing twice is fine."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for writer in self._connections.values():
            writer.transport.abort()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await server.wait_closed()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def publish(self, snapshot: Snapshot) -> None:
        """Push `snapshot` to all workers, and to each that connects from now on. Never waits.

        Raises ValueError if its generation is below the last one's.
        """
        if self._snapshot is not None and snapshot.generation < self._snapshot.generation:
            raise ValueError(f"generation {snapshot.generation} after {self._snapshot.generation}")
        self._snapshot_line = line({"type": "snapshot", **asdict(snapshot)})
        self._snapshot = snapshot
        self._progress.clear()  # the snapshot's `cold` is newer
        self._broadcast(self._snapshot_line)

    def progress(self, service: str, cold: ColdStart | None) -> None:
        """Push how far a cold start is; None = nothing is starting. Never waits."""
        cold_json = None if cold is None else asdict(cold)
        self._progress[service] = line({"type": "progress", "service": service, "cold": cold_json})
        self._broadcast(self._progress[service])

    def take_suspects(self) -> dict[str, str]:
        """The replicas (id -> reason) that workers could not connect to since the last call."""
        suspects: dict[str, str] = {}
        for index, worker in self.workers.items():
            suspects.update(worker.suspects)
            self.workers[index] = replace(worker, suspects=())
        return suspects

    def _broadcast(self, data: bytes) -> None:
        for index, writer in list(self._peers.items()):
            self._send(index, writer, data)

    def _send(self, index: int, writer: asyncio.StreamWriter, data: bytes) -> None:
        transport = writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("worker %d does not read its control messages: dropping its connection", index)
            transport.abort()  # it reconnects and gets everything anew
            return
        writer.write(data)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        index: int | None = None
        try:
            while (message := await read(reader)) is not None:
                state = decode_state(message)
                if index is None:
                    index = self._adopt(state, writer)
                elif self._peers.get(index) is not writer:
                    return  # a newer connection of the same worker took over
                elif state.index != index:
                    raise ProtocolError(f"worker {index} now calls itself {state.index}")
                else:
                    self._store(state)
                self._on_change(index)
        except ProtocolError as error:
            who = "an unknown peer" if index is None else f"worker {index}"
            log.warning("dropping the control connection of %s: %s", who, error)
        finally:
            del self._connections[task]
            writer.transport.abort()
            if index is not None and self._peers.get(index) is writer:
                del self._peers[index], self.workers[index]
                self._on_change(index)

    def _adopt(self, state: WorkerState, writer: asyncio.StreamWriter) -> int:
        previous = self._peers.get(state.index)
        if previous is not None:
            previous.transport.abort()
        self._peers[state.index] = writer
        # What it applied came over another connection, perhaps from another state dir: not an ack of ours.
        self.workers[state.index] = replace(state, generation=0)
        if self._snapshot is not None:
            self._send(state.index, writer, self._snapshot_line)
        for pushed in self._progress.values():
            self._send(state.index, writer, pushed)
        return state.index

    def _store(self, state: WorkerState) -> None:
        latest = self._snapshot.generation if self._snapshot else 0
        if state.generation > latest:
            raise ProtocolError(f"it acks generation {state.generation}, the latest is {latest}")
        kept = dict(self.workers[state.index].suspects) | dict(state.suspects)
        self.workers[state.index] = replace(state, suspects=tuple(kept.items())[-MAX_SUSPECTS:])


def _bind(path: Path) -> socket.socket:
    """A listening socket that appears at `path` in one step: complete, 0600, in place of a stale one."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ControlError(f"{path} is in the way: it is not a socket; move it elsewhere")
    temporary = path.with_name(path.name + "~")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        sock.bind(str(temporary))
        temporary.chmod(0o600)
        sock.listen(128)
        sock.setblocking(False)
        os.replace(temporary, path)
    except OSError as error:
        sock.close()
        if "too long" in str(error):
            raise ControlError(f"{path} is too long for a unix socket: choose a shorter state dir") from None
        raise ControlError(f"cannot listen on {path}: {error.strerror or error}") from error
    return sock


class ControlClient:
    """A worker's end: `run()` for ever. Without a controller the worker goes on with its last snapshot.

    `on_snapshot` and `on_progress` are called on the event loop and must not block; `state()` tells how many
    requests wait per service, now; `wakers()` for whose request they began to (key's name, request id).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        worker: int,
        pid: int,
        *,
        on_snapshot: Callable[[Snapshot], None],
        on_progress: Callable[[str, ColdStart | None], None],
        state: Callable[[], dict[str, int]],
        wakers: Callable[[], dict[str, tuple[str, str]]] = dict,
    ) -> None:
        self.path = Path(path)
        self.worker = worker
        self.pid = pid
        self.connected = False
        self.generation = 0
        """The last one applied, 0 = none yet."""
        self._on_snapshot = on_snapshot
        self._on_progress = on_progress
        self._state = state
        self._wakers = wakers
        self._suspects: dict[str, str] = {}
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        link = "connected" if self.connected else "disconnected"
        return f"<ControlClient worker={self.worker} generation={self.generation} {link}>"

    def send_state(self) -> None:
        """Say how many wait now; call it when a service's waiting goes 0 -> n or n -> 0. Never waits.

        Calls close together become one message; while nobody listens it is said at the next connect.
        """
        self._news.set()

    def suspect(self, replica_id: str, reason: str) -> None:
        """Say that a connection to the replica was refused; the controller probes it at once. Never waits."""
        if replica_id in self._suspects or len(self._suspects) < MAX_SUSPECTS:
            self._suspects[replica_id] = reason[:500]
        self._news.set()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        first, longest = BACKOFF
        pause = first
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self.path, limit=MAX_LINE)
            except OSError as error:
                log.debug("no controller at %s: %s", self.path, error)
            else:
                if await self._serve(reader, writer):
                    pause = first
            await asyncio.sleep(pause)
            pause = min(LONGER * pause, longest)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One connection, to its end; whether it brought a snapshot that could be applied."""
        teller = asyncio.create_task(self._tell(writer))
        self.connected = True
        self._news.set()
        applied = False
        try:
            while (message := await read(reader)) is not None:
                applied = self._hear(message, first=not applied) or applied
        except ProtocolError as error:
            log.warning("dropping the connection to the controller: %s", error)
        except Exception:  # on_snapshot's: without its ack the controller waits; the next connect tries again
            log.exception("what the controller sent could not be applied: connecting again")
        finally:
            self.connected = False
            writer.transport.abort()
            teller.cancel()
            await asyncio.wait([teller])
        return applied

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        """Write the state whenever there is news: one message for all that happened since the last."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                state = {
                    "type": "state",
                    "protocol": PROTOCOL,
                    "worker": self.worker,
                    "pid": self.pid,
                    "generation": self.generation,
                    "waiting": self._state(),
                    "suspects": self._suspects,
                    "woken": self._wakers(),
                }
                writer.write(line(state))
                self._suspects = {}  # a hint: if this connection is lost with it, the next dial says it again
                await writer.drain()  # a controller that does not read costs nothing but this wait
        except ConnectionError:
            pass  # _serve reads the end of the stream
        except Exception:
            log.exception("the worker's state could not be sent: connecting again")
            writer.transport.abort()

    def _hear(self, message: dict[str, Any], *, first: bool) -> bool:
        """Apply one message; True if it was a snapshot that is now in force."""
        match message.get("type"):
            case "progress":
                service = message.get("service")
                if not isinstance(service, str):
                    raise ProtocolError(f"progress of service {service!r}")
                self._on_progress(service, decode_cold(message.get("cold")))
                return False
            case "snapshot":
                snapshot = decode_snapshot(message)
                # Generations only grow, but a new connection's snapshot is the truth even if older: with a
                # wiped state dir the controller counts from 1 again.
                if snapshot.generation < self.generation and not first:
                    log.warning("ignoring generation %d after %d", snapshot.generation, self.generation)
                    return False
                self._on_snapshot(snapshot)
                self.generation = snapshot.generation
                self._news.set()  # the ack
                return True
            case other:
                raise ProtocolError(f"unexpected message type {other!r}")
