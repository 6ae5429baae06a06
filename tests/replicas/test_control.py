"""The control socket, over real sockets: who learns what, and when, whatever breaks in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from replicas import control
from replicas.control import (
    ColdStart,
    ControlClient,
    ControlServer,
    ServiceInfo,
    Snapshot,
    UpstreamInfo,
)
from replicas.messages import MAX_LINE, ProtocolError, decode_snapshot


def service(name: str = "r1", upstreams: int = 1) -> ServiceInfo:
    return ServiceInfo(
        name=name,
        index=0,
        model="deepseek-ai/DeepSeek-R1",
        status="open",
        code="",
        message="",
        retry_after=30,
        upstreams=tuple(UpstreamInfo(f"{name}-{i}", i, f"http://10.0.0.{i}", 16) for i in range(upstreams)),
        state="ready",
        hold_max_seconds=5100.0,
        upstream_timeout=None,
        replica_key="secret",
        cold=ColdStart(f"{name}-1", "load", 0.62, 410.0, "62 of 100 shards"),
    )


class Worker:
    """A worker's end that notes what it was told."""

    def __init__(self, path: Path, index: int = 0) -> None:
        self.waiting: dict[str, int] = {}
        self.told = 0  # how often it was asked for its state
        self.broken = 0  # how many of the first askings fail
        self.snapshots: list[Snapshot] = []
        self.progress: list[tuple[str, ColdStart | None]] = []
        self.refuse: list[int] = []  # generations whose application fails, once each
        self.client = ControlClient(
            path,
            index,
            4000 + index,
            on_snapshot=self._on_snapshot,
            on_progress=lambda name, cold: self.progress.append((name, cold)),
            state=self._state,
        )

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot.generation in self.refuse:
            self.refuse.remove(snapshot.generation)
            raise RuntimeError("no room")
        self.snapshots.append(snapshot)

    def _state(self) -> dict[str, int]:
        self.told += 1
        if self.told <= self.broken:
            raise RuntimeError("cannot count")
        return dict(self.waiting)

    @property
    def generations(self) -> list[int]:
        return [snapshot.generation for snapshot in self.snapshots]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Worker]:
        task = asyncio.create_task(self.client.run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


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


async def test_a_worker_that_connects_gets_the_latest_snapshot_whole_and_acks_it(path: Path) -> None:
    sent = Snapshot(7, (service("r1", 3), service("v3", 0)))
    async with serving(path) as server, Worker(path).running() as worker:
        await until(lambda: server.workers)
        assert server.workers[0].generation == 0
        server.publish(sent)
        await until(lambda: server.workers[0].generation == 7)
        assert worker.snapshots == [sent]
        async with Worker(path, 1).running() as late:
            await until(lambda: 1 in server.workers and server.workers[1].generation == 7)
            assert late.snapshots == [sent]
            assert (server.workers[0].pid, server.workers[1].pid) == (4000, 4001)


async def test_an_ack_comes_after_the_snapshot_was_applied_and_not_if_that_failed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acked: list[int] = []
    worker = Worker(path)
    worker.refuse = [2]

    def on_change(index: int) -> None:
        if index in server.workers:
            acked.append(server.workers[index].generation)
            assert server.workers[index].generation in [0, *worker.generations]

    async with serving(path, on_change) as server, worker.running():
        server.publish(Snapshot(1, ()))
        await until(lambda: acked[-1:] == [1])
        server.publish(Snapshot(2, ()))
        await until(lambda: acked[-1:] == [2])
        assert worker.generations == [1, 2]
        assert acked == [0, 1, 0, 2], "refused, then a new connection"
    assert "could not be applied" in caplog.text


async def test_the_first_state_and_every_later_one_are_levels(path: Path) -> None:
    worker = Worker(path)
    worker.waiting = {"r1": 3}
    async with serving(path) as server, worker.running():
        await until(lambda: server.workers)
        assert server.workers[0].waiting == {"r1": 3}
        for n in (1, 0, 5):
            worker.waiting = {"r1": n}
            worker.client.send_state()
        await until(lambda: server.workers[0].waiting == {"r1": 5})
        worker.waiting = {}
        worker.client.send_state()
        await until(lambda: server.workers[0].waiting == {})


async def test_the_controller_hears_of_every_state_and_of_coming_and_going(path: Path) -> None:
    heard: list[tuple[int, bool]] = []
    async with serving(path, lambda i: heard.append((i, i in server.workers))) as server:
        async with Worker(path, 5).running() as worker:
            await until(lambda: heard == [(5, True)])
            worker.client.send_state()
            await until(lambda: heard == [(5, True), (5, True)])
        await until(lambda: heard[2:] == [(5, False)])
        assert server.workers == {}


async def test_progress_is_pushed_and_a_late_worker_gets_what_is_newer_than_the_snapshot(path: Path) -> None:
    cold = ColdStart("r1-1", "download", None, None)
    async with serving(path) as server, Worker(path).running() as worker:
        server.publish(Snapshot(1, (service(),)))
        await until(lambda: worker.generations == [1])
        server.progress("r1", cold)
        await until(lambda: worker.progress == [("r1", cold)])
        async with Worker(path, 1).running() as late:
            await until(lambda: late.progress == [("r1", cold)])
            assert late.generations == [1]
        server.progress("r1", None)
        await until(lambda: worker.progress[1:] == [("r1", None)])
        server.publish(Snapshot(2, (service(),)))
        async with Worker(path, 2).running() as later:
            await until(lambda: 2 in server.workers and server.workers[2].generation == 2)
            assert later.progress == []


async def test_suspects_reach_the_controller_once_and_only_it_forgets_them(path: Path) -> None:
    async with serving(path) as server, Worker(path).running() as worker:
        await until(lambda: server.workers)
        worker.client.suspect("r1-4", "connection refused")
        worker.client.suspect("r1-5", "x" * 10_000)
        await until(lambda: server.workers[0].suspects)
        worker.waiting = {"r1": 1}
        worker.client.send_state()
        await until(lambda: server.workers[0].waiting)
        assert server.workers[0].suspects == (("r1-4", "connection refused"), ("r1-5", "x" * 500))
        assert server.take_suspects() == {"r1-4": "connection refused", "r1-5": "x" * 500}
        assert server.take_suspects() == {}
        assert server.workers[0].waiting == {"r1": 1}


async def test_a_restarted_controller_gets_full_state_and_gives_a_full_snapshot(path: Path) -> None:
    worker = Worker(path)
    async with worker.running():
        worker.waiting = {"r1": 2}
        worker.client.suspect("r1-9", "refused")  # nobody listens yet
        async with serving(path) as server:
            server.publish(Snapshot(4, (service(),)))
            await until(lambda: server.workers and server.workers[0].generation == 4)
            assert server.take_suspects() == {"r1-9": "refused"}
        await until(lambda: not worker.client.connected)
        assert worker.client.generation == 4, "it goes on with what it has"
        async with serving(path) as server:
            await until(lambda: server.workers)
            assert server.workers[0].waiting == {"r1": 2}
            assert server.workers[0].generation == 0, "an ack of another controller is none of ours"
            server.publish(Snapshot(4, (service(upstreams=0),)))
            await until(lambda: server.workers[0].generation == 4)
    assert worker.snapshots[-1].services[0].upstreams == ()


async def test_a_controller_whose_state_was_wiped_counts_from_one_again_and_is_believed(path: Path) -> None:
    async with Worker(path).running() as worker:
        for generation in (900, 1):
            async with serving(path) as server:
                server.publish(Snapshot(generation, ()))
                await until(lambda: server.workers and server.workers[0].generation != 0)
        assert worker.generations == [900, 1]


async def test_an_older_generation_on_the_same_connection_is_ignored(path: Path) -> None:
    peers: list[asyncio.StreamWriter] = []

    async def controller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer)
        for generation in (5, 3, 6):
            message = {"type": "snapshot", "generation": generation, "services": []}
            writer.write(json.dumps(message).encode() + b"\n")
        await reader.read()

    async with await asyncio.start_unix_server(controller, path), Worker(path).running() as worker:
        await until(lambda: worker.client.generation == 6)
        assert worker.generations == [5, 6]
        for peer in peers:
            peer.transport.abort()


async def test_publishing_an_older_generation_is_a_bug_and_says_so(path: Path) -> None:
    async with serving(path) as server:
        server.publish(Snapshot(5, ()))
        server.publish(Snapshot(5, ()))
        with pytest.raises(ValueError, match="generation 4 after 5"):
            server.publish(Snapshot(4, ()))


async def test_a_message_over_the_limit_is_refused_where_it_is_made(path: Path) -> None:
    async with serving(path) as server:
        with pytest.raises(ValueError, match="over the limit"):
            server.progress("r1", ColdStart("r1-1", None, None, None, "x" * MAX_LINE))


@pytest.mark.parametrize(
    "junk", [b"hello\n", b'{"type": "snapshot"}\n', b'{"type": "reboot"}\n', b'{"type": "progress"}\n']
)
async def test_a_worker_drops_a_controller_that_talks_junk_and_connects_again(
    path: Path, junk: bytes
) -> None:
    connections = 0

    async def controller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.write(junk if connections == 1 else b'{"type":"snapshot","generation":1,"services":[]}\n')
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(controller, path):
        async with Worker(path).running() as worker:
            await until(lambda: worker.generations == [1])
        assert connections == 2


def test_a_snapshot_with_missing_members_or_an_unknown_status_is_not_understood() -> None:
    with pytest.raises(ProtocolError, match="not a snapshot"):
        decode_snapshot({"generation": 1, "services": [{"name": "r1"}]})
    odd = asdict(service()) | {"status": "napping"}
    with pytest.raises(ProtocolError, match="unknown status"):
        decode_snapshot({"generation": 1, "services": [odd]})


async def test_a_worker_that_cannot_tell_its_state_tries_again_over_a_new_connection(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(path)
    worker.broken = 1
    async with serving(path) as server, worker.running():
        server.publish(Snapshot(1, ()))
        await until(lambda: server.workers and server.workers[0].generation == 1)
    assert "state could not be sent" in caplog.text


async def test_a_controller_that_does_not_read_costs_a_worker_no_memory_and_hears_the_last_level(
    path: Path,
) -> None:
    accepted: list[asyncio.StreamReader] = []
    read_on, enough = asyncio.Event(), asyncio.Event()

    async def controller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        accepted.append(reader)
        await read_on.wait()
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        while json.loads(await reader.readline())["waiting"] != {"r1": -1 + 20_000}:
            pass
        enough.set()
        writer.close()

    worker = Worker(path)
    async with await asyncio.start_unix_server(controller, path, limit=MAX_LINE), worker.running():
        await until(lambda: accepted)
        for n in range(20_000):
            worker.waiting = {"r1": n}
            worker.client.send_state()
            await asyncio.sleep(0)
        assert worker.told < 10_000, "the rest was never written down"
        read_on.set()
        async with asyncio.timeout(10):
            await enough.wait()


async def test_a_worker_comes_late_by_little_beside_the_time_that_its_controller_is_absent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(control.asyncio, "sleep", note)
    task = asyncio.create_task(Worker(path).client.run())
    while len(pauses) < 40:
        await sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    waited = list(itertools.accumulate(pauses, initial=0.0))
    assert all(pause <= 0.021 + 0.2 * before for pause, before in zip(pauses, waited, strict=False))
    assert pauses == sorted(pauses)
    assert pauses[-1] == 1.0  # one absent for long is not asked for often
    assert waited[22] > 5.0  # nor does one absent for 5 s make it busy


def test_it_works_on_uvloop_too(path: Path) -> None:
    """The worker runs on uvicorn's loop; both halves meet there."""
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        async with Worker(path).running() as worker:
            for generation in (1, 2):
                async with serving(path) as server:
                    server.publish(Snapshot(generation, (service(),)))
                    await until(lambda: 0 in server.workers and server.workers[0].generation)
                await until(lambda: not worker.client.connected)
            assert worker.generations == [1, 2]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_the_replica_key_is_not_in_a_services_repr() -> None:
    assert "secret" not in repr(service())


async def test_both_ends_say_in_logs_where_they_stand(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(path) as server, Worker(path, 2).running() as worker:
        server.publish(Snapshot(3, ()))
        await until(lambda: 2 in server.workers and server.workers[2].generation == 3)
        assert repr(server) == "<ControlServer generation=3 workers=[2]>"
        assert repr(worker.client) == "<ControlClient worker=2 generation=3 connected>"
    assert "secret" not in caplog.text
