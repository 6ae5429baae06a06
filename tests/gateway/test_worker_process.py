"""A worker as a process: when it begins to serve, how it stops, and whose death it survives."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway.app import config
from gateway.child import EXIT_ORPHANED, RETIRE
from gateway.upstream import Pool

from .conftest import QuietServer, chat, eventually
from .http1 import read_answer
from .scripted import ANSWER, DONE, LAST, STREAM, Peer, Scripted, chunk, event
from .worker_process import Gateway

Start = Callable[..., Any]
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
    )


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Makes a gateway of worker processes: `gateway = await start(drain_timeout=1)`."""
    async with AsyncExitStack() as stack:

        async def make_gateway(**values: Any) -> Gateway:
            return await stack.enter_async_context(Gateway(tmp_path, values=values))

        yield make_gateway


async def test_it_accepts_only_after_its_first_snapshot(start: Start) -> None:
    gateway = await start()
    await eventually(lambda: gateway.board.pids()[0] == gateway.processes[0].process.pid, seconds=15)
    answer = await gateway.raw(0, HEALTH)
    await gateway.listen()
    await eventually(lambda: gateway.control.workers, seconds=15)
    with pytest.raises(TimeoutError):
        await answer.until(b"HTTP", seconds=0.3)
    await gateway.publish()
    assert read_answer(await answer.rest()).body == b"ok"
    await answer.close()


async def test_it_stops_in_order_held_ones_retryable_then_streams_to_their_end(start: Start) -> None:
    gateway = await start(commit_after=0.0)
    go = asyncio.Event()

    async def stream(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        await go.wait()
        await peer.send(chunk(event("b")) + chunk(DONE) + LAST)

    async with Scripted(stream) as replica:
        await gateway.listen()
        await gateway.publish(replica.url, window=1)
        streaming = await gateway.raw(0, post(chat(stream=True)))
        await streaming.until(b'"a"')
        committed = await gateway.raw(0, post(chat(stream=True)))
        await committed.until(b": waiting")
        silent = await gateway.raw(0, post(chat()).replace(b"Host: a", b"Host: a\r\nX-Gateway-Hold: silent"))
        await eventually(lambda: gateway.board.totals(0).waiting == 2)
        gateway.processes[0].terminate()
        got = read_answer(await silent.rest())
        assert (got.status, got.headers["retry-after"]) == (503, "2")
        assert json.loads(got.body)["error"]["code"] == "gateway_stopping"
        got = read_answer(await committed.rest())
        assert got.complete
        assert b'"code": "gateway_stopping"' in got.body
        assert b"[DONE]" not in got.body
        late = await gateway.raw(0, HEALTH)  # stays in the queue for the next worker
        go.set()
        got = read_answer(await streaming.rest())
        assert got.complete
        assert got.body == event("a") + event("b") + DONE
        assert await gateway.processes[0].exit_code() == 0
        assert late.data == b""
        for answer in (silent, committed, streaming, late):
            await answer.close()
    totals = gateway.board.totals(0)
    assert (totals.arrived, totals.ended, totals.waiting, gateway.board.in_flight(0)) == (3, 3, 0, 0)


async def test_past_the_drain_limit_a_stream_ends_in_an_error_event(start: Start) -> None:
    gateway = await start(drain_timeout=1.0)

    async def stream(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        await peer.gone.wait()

    async with Scripted(stream) as replica:
        await gateway.listen()
        await gateway.publish(replica.url)
        streaming = await gateway.raw(0, post(chat(stream=True)))
        await streaming.until(b'"a"')
        gateway.processes[0].terminate()
        got = read_answer(await streaming.rest())
        await streaming.close()
        assert b'"code": "gateway_stopping"' in got.body
        assert got.complete
        assert await gateway.processes[0].exit_code() == 0
    assert gateway.board.in_flight(0) == 0
    assert gateway.board.totals(0).ended == 1


async def test_a_second_signal_does_not_wait_for_streams(start: Start) -> None:
    gateway = await start(drain_timeout=600.0)

    async def stream(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        await peer.gone.wait()

    async with Scripted(stream) as replica:
        await gateway.listen()
        await gateway.publish(replica.url, window=1)
        streaming = await gateway.raw(0, post(chat(stream=True)))
        await streaming.until(b'"a"')
        held = await gateway.raw(0, post(chat()))
        await eventually(lambda: gateway.board.totals(0).waiting == 1)
        gateway.processes[0].terminate()
        await held.until(b"gateway_stopping")  # it has heard
        gateway.processes[0].terminate()
        assert await gateway.processes[0].exit_code() == 0
        for answer in (streaming, held):
            await answer.rest()
            await answer.close()


async def test_one_that_retires_accepts_nothing_more_and_leaves_with_its_last_request_held_ones_included(
    start: Start,
) -> None:
    gateway = await start(commit_after=0.0, drain_timeout=1.0)
    go = asyncio.Event()

    async def stream(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        await go.wait()
        await peer.send(chunk(event("b")) + chunk(DONE) + LAST)

    async with Scripted(stream) as replica:
        await gateway.listen()
        await gateway.publish(replica.url, window=1)
        streaming = await gateway.raw(0, post(chat(stream=True)))
        await streaming.until(b'"a"')
        held = await gateway.raw(0, post(chat(stream=True)))
        await held.until(b": waiting")
        gateway.processes[0].process.send_signal(RETIRE)
        idle = await gateway.raw(0, b"")
        await asyncio.sleep(1.5)  # longer than a stop may last
        late = await gateway.raw(0, HEALTH)  # stays in the queue for the successor
        go.set()
        for answer in (streaming, held):
            got = read_answer(await answer.rest())
            assert got.complete
            assert got.body.endswith(event("a") + event("b") + DONE)
        assert await gateway.processes[0].exit_code() == 0
        assert late.data == b""
        for answer in (streaming, held, late, idle):
            await answer.close()
    totals = gateway.board.totals(0)
    assert (totals.arrived, totals.ended, totals.waiting, gateway.board.in_flight(0)) == (2, 2, 0, 0)


async def test_one_that_retires_and_is_told_to_stop_has_the_drain_timeout_left(start: Start) -> None:
    gateway = await start(commit_after=0.0, drain_timeout=0.5)

    async def stream(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        await peer.gone.wait()

    async with Scripted(stream) as replica:
        await gateway.listen()
        await gateway.publish(replica.url, window=1)
        streaming = await gateway.raw(0, post(chat(stream=True)))
        await streaming.until(b'"a"')
        held = await gateway.raw(0, post(chat(stream=True)))
        await held.until(b": waiting")
        gateway.processes[0].process.send_signal(RETIRE)
        gateway.processes[0].terminate()
        for answer in (held, streaming):
            got = read_answer(await answer.rest())
            assert got.complete
            assert b'"code": "gateway_stopping"' in got.body
            await answer.close()
        assert await gateway.processes[0].exit_code() == 0
    assert gateway.board.totals(0).ended == 2


async def test_a_signal_before_the_first_snapshot_ends_it(start: Start) -> None:
    gateway = await start()
    await eventually(lambda: gateway.board.pids()[0], seconds=15)
    gateway.processes[0].terminate()
    assert await gateway.processes[0].exit_code() == 0


async def test_it_dies_with_its_supervisor(start: Start) -> None:
    gateway = await start()
    await gateway.listen()
    await gateway.publish()
    gateway.processes[0].orphan()
    assert await gateway.processes[0].exit_code() == EXIT_ORPHANED


async def test_without_a_controller_it_goes_on_with_the_last_list_and_reconnects(start: Start) -> None:
    gateway = await start()

    async def answer(peer: Peer) -> None:
        await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        await gateway.listen()
        await gateway.publish(replica.url)
        await gateway.control.close()
        await eventually(lambda: not gateway.control.workers)
        for number in (1, 2):
            request = await gateway.raw(0, post(chat()))
            await request.until(b"choices")
            await request.close()
            assert len(replica.requests) == number
        await gateway.listen()
        await gateway.publish()
        assert gateway.control.workers[0].pid == gateway.processes[0].process.pid
        held = await gateway.raw(0, post(chat()))
        await eventually(lambda: gateway.control.workers[0].waiting == {"r1": 1})
        await held.close()
        await eventually(lambda: gateway.control.workers[0].waiting == {"r1": 0})


def test_small_writes_leave_at_once_and_a_vanished_replica_is_noticed() -> None:
    """The sockets' options, on the event loop that a worker has."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def connect() -> dict[str, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = QuietServer(config(app, drain_seconds=1, log_level="critical"), None)  # type: ignore[arg-type]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await eventually(lambda: server.started)
        connection = await Pool(f"http://127.0.0.1:{port}").dial()
        await eventually(lambda: server.server_state.connections)
        (accepted,) = server.server_state.connections
        client = accepted.transport.get_extra_info("socket")  # type: ignore[union-attr]
        replica = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
        found = {
            "client nodelay": client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            "replica nodelay": replica.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            "replica keepalive": replica.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "replica probes": replica.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        }
        connection.abort()
        server.should_exit = True
        await task
        return found

    assert uvloop.run(connect()) == {
        "client nodelay": 1, "replica nodelay": 1, "replica keepalive": 1, "replica probes": 3,
    }  # fmt: skip
