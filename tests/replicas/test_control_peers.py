"""The control socket's server against peers of every kind, over real sockets: junk, slow, doubled, stale."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType

import pytest

from replicas import control
from replicas.control import ControlError, ControlServer, ServiceInfo, Snapshot, UpstreamInfo
from replicas.messages import MAX_LINE


def snapshot(generation: int, upstreams: int = 0) -> Snapshot:
    infos = tuple(UpstreamInfo(f"r1-{i}", i, f"http://10.0.0.{i}", 16) for i in range(upstreams))
    r1 = ServiceInfo("r1", 0, "m", "open", "", "", 30, infos, "ready", 5100.0, None, None, None)
    return Snapshot(generation, (r1,))


class Peer:
    """A worker's end made of a bare socket, to say what a ControlClient never would."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __aenter__(self) -> Peer:
        self.reader, self.writer = await asyncio.open_unix_connection(self._path, limit=MAX_LINE)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    async def hears(self, generation: int) -> None:
        """Read on until the snapshot of this generation has come."""
        async with asyncio.timeout(10):
            while json.loads(await self.reader.readline())["generation"] != generation:
                pass

    async def is_dropped(self) -> None:
        """Read to the end, which the other side makes."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()


@asynccontextmanager
async def serving(
    path: Path, on_change: Callable[[int], None] = lambda _: None
) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, on_change)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until the condition holds; 10 s is only there to end a broken test."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (it may hold through any of several causes)
            await asyncio.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


GOOD = {
    "type": "state",
    "protocol": 1,
    "worker": 0,
    "pid": 7,
    "generation": 0,
    "waiting": {"r1": 1},
    "suspects": {},
}


def line(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x00\xff\xfe\n",
        b"[1, 2]\n",
        b"[" * 100_000 + b"\n",
        line(type="hello"),
        line(protocol=2),
        line(worker=-1),
        line(worker="0"),
        line(pid=True),
        line(waiting=[]),
        line(waiting={"r1": -1}),
        line(waiting={"r1": 1.5}),
        line(suspects={"r1-1": 3}),
        line(woken=["alice"]),
        line(woken={"r1": "alice"}),
        line(woken={"r1": ["alice"]}),
        line(woken={"r1": ["alice", 3]}),
        line(suspects={str(i): "" for i in range(65)}),
        line(generation=2) + line(generation=2),
        line() + line(worker=1),
        b"x" * (2 * MAX_LINE + 100_000),
    ],
    ids=lambda junk: junk[:60].decode(errors="replace"),
)
async def test_junk_costs_the_peer_its_connection_and_nobody_else_anything(
    path: Path, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path) as server, Peer(path) as good, Peer(path) as bad:
        server.publish(snapshot(1))
        good.say(line(worker=3))
        await good.hears(1)
        bad.say(junk)
        await bad.is_dropped()
        await until(lambda: set(server.workers) == {3})
        assert "dropping the control connection" in caplog.text
        server.publish(snapshot(2))
        await good.hears(2)


async def test_a_message_may_arrive_byte_by_byte_and_half_a_message_says_nothing(path: Path) -> None:
    async with serving(path) as server, Peer(path) as peer:
        whole = line() + line(waiting={"r1": 2})
        for i in range(len(whole)):
            peer.say(whole[i : i + 1])
            await asyncio.sleep(0)
        await until(lambda: server.workers and server.workers[0].waiting == {"r1": 2})
        peer.say(line(waiting={"r1": 3})[:-1])
        peer.writer.write_eof()
        await until(lambda: not server.workers)
        assert await peer.reader.read() == b""


async def test_a_worker_that_does_not_read_is_dropped_and_gets_everything_when_it_returns(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "MAX_UNSENT", 10_000)
    async with serving(path) as server, Peer(path) as good, Peer(path) as stuck:
        good.say(line(worker=1))
        stuck.say(line(worker=0))
        await until(lambda: len(server.workers) == 2)
        stuck.writer.transport.pause_reading()  # type: ignore[attr-defined]
        generation = 0
        while 0 in server.workers:
            generation += 1
            assert generation < 2_000
            server.publish(snapshot(generation, upstreams=64))
            await good.hears(generation)
        assert "worker 0 does not read" in caplog.text
        async with Peer(path) as back:
            back.say(line(worker=0))
            await back.hears(generation)


async def test_a_worker_restarted_under_the_same_index_takes_over_at_once(path: Path) -> None:
    heard: list[tuple[int, bool]] = []
    async with serving(path, lambda i: heard.append((i, i in server.workers))) as server:
        async with Peer(path) as old, Peer(path) as new:
            old.say(line(pid=7, waiting={"r1": 9}))
            await until(lambda: server.workers)
            new.say(line(pid=8, waiting={}))
            await old.is_dropped()
            await until(lambda: heard == [(0, True), (0, True)])
            assert (server.workers[0].pid, server.workers[0].waiting) == (8, {})
        await until(lambda: heard[2:] == [(0, False)])


async def test_a_stale_socket_is_replaced_by_a_private_one_that_goes_with_its_server(path: Path) -> None:
    stale = ControlServer(path, lambda _: None)
    await stale.start()
    async with serving(path) as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        async with Peer(path) as peer:
            peer.say(line())
            await until(lambda: server.workers)
    assert os.listdir(path.parent) == []
    await stale.close()
    await stale.close()


def test_something_else_in_the_way_of_the_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ControlError, match="not a socket"):
        asyncio.run(ControlServer(path, lambda _: None).start())
    assert path.read_text() == "precious"


def test_a_state_dir_too_deep_for_a_unix_socket_is_a_clear_error(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ControlError, match="shorter state dir"):
        asyncio.run(ControlServer(deep / "control.sock", lambda _: None).start())
