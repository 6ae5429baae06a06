"""The client leaves, in any phase: its place is freed, its upstream closed and its generation ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import RawAnswer, Rig, chat, eventually, on_dial
from .scripted import STREAM, Peer, Scripted, chunk, event, sample

WITHIN = 1.0  # second, the promise
PATH = "/v1/chat/completions"


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    """One running slot, so that a second request queues; polls for gone clients as slowly as SGLang does."""
    async with Simulator(SimConfig(max_running=1)) as sim:
        yield sim


def ended(code: int) -> float:
    return sample("gateway_requests_total", endpoint=PATH, code=str(code), end="client_gone")


async def leave(rig: Rig, got: RawAnswer, gone: Callable[[], Any], *, reset: bool, code: int) -> None:
    """Close the client's side; within a second `gone()` is true, all is accounted and nothing is open."""
    before = ended(code)
    began = time.monotonic()
    await got.close(reset=reset)
    await eventually(gone)
    await rig.quiet()
    assert time.monotonic() - began < WITHIN
    assert ended(code) == before + 1


def long(**more: Any) -> dict[str, Any]:
    return chat(max_tokens=100_000, ignore_eos=True, **more)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_while_held_the_place_is_freed_and_no_replica_ever_sees_it(
    rig: Rig, sim: Simulator, stream: bool, reset: bool
) -> None:
    got = await rig.raw(long(stream=stream))
    await rig.waiting(1)
    await leave(rig, got, lambda: rig.board.totals(0).waiting == 0, reset=reset, code=0)
    assert rig.board.totals(0).waiting_bytes == 0
    assert rig.board.totals(0).oldest_ns == 0
    rig.publish(sim.url)
    await rig.acked()
    assert sim.stats.runs_total == 0


async def test_while_held_and_beaten_it_is_the_same(
    rigs: Callable[..., Awaitable[Rig]], sim: Simulator
) -> None:
    rig = await rigs(commit_after=0.01, beat_every=0.1)
    got = await rig.raw(long(stream=True))
    await got.until(b": cold-start")
    await leave(rig, got, lambda: rig.board.totals(0).waiting == 0, reset=False, code=200)
    assert sim.stats.runs_total == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_while_queued_at_the_replica_its_upstream_is_closed_and_it_is_aborted(
    rig: Rig, sim: Simulator, stream: bool
) -> None:
    rig.publish(sim.url)
    first = await rig.raw(long(stream=True))
    await first.until(b"data: ")
    got = await rig.raw(long(stream=stream))
    await eventually(lambda: sim.stats.queued == 1)
    (queued,) = [rid for rid in sim.stats.requests if rid.encode() not in first.data]
    before = ended(0)
    began = time.monotonic()
    await got.close()
    await eventually(lambda: queued in sim.stats.aborted and queued in sim.stats.abort_calls)
    await eventually(lambda: rig.board.in_flight(0) == 1)
    assert time.monotonic() - began < WITHIN
    assert sim.stats.queued == 0
    assert ended(0) == before + 1
    await leave(rig, first, lambda: sim.stats.running == 0, reset=False, code=200)


@pytest.mark.parametrize("reset", [True, False])
async def test_while_running_without_a_stream_its_upstream_is_closed_and_it_is_aborted(
    rig: Rig, sim: Simulator, reset: bool
) -> None:
    rig.publish(sim.url)
    got = await rig.raw(long())
    await eventually(lambda: sim.stats.running == 1)
    (rid,) = sim.stats.requests
    await leave(rig, got, lambda: rid in sim.stats.aborted and not sim.stats.running, reset=reset, code=0)
    assert sim.stats.abort_calls == [rid]
    assert sim.stats.runs_total == 1


@pytest.mark.parametrize("reset", [True, False])
async def test_in_the_middle_of_a_stream_its_upstream_is_closed_which_sglang_sees_at_once(
    rig: Rig, sim: Simulator, reset: bool
) -> None:
    rig.publish(sim.url)
    got = await rig.raw(long(stream=True))
    await got.until(b"data: ")
    (rid,) = sim.stats.requests
    await leave(rig, got, lambda: rid in sim.stats.disconnected, reset=reset, code=200)
    assert rid in sim.stats.aborted
    assert sim.stats.abort_calls == []
    assert sim.stats.running == 0


async def test_a_request_with_two_choices_has_no_rid_of_ours_and_its_upstream_is_closed(rig: Rig) -> None:
    async def hangs(peer: Peer) -> None:
        await peer.gone.wait()

    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.raw(long(n=2))
        await eventually(lambda: replica.peers)
        await leave(rig, got, lambda: replica.peers[0].gone.is_set(), reset=False, code=0)
        assert replica.aborts == []


async def test_after_beats_over_a_silent_replica_it_is_aborted(
    rigs: Callable[..., Awaitable[Rig]],
) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)

    async def hangs(peer: Peer) -> None:
        await peer.gone.wait()

    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.raw(long(stream=True))
        await got.until(b": waiting")
        await leave(rig, got, lambda: replica.peers[0].gone.is_set(), reset=False, code=200)
        await eventually(lambda: replica.aborts == [replica.requests[0].json["rid"]])


async def test_while_its_upstream_is_dialled_nothing_is_left_open(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialling = asyncio.Event()

    async def dialled() -> None:
        dialling.set()
        await asyncio.Event().wait()

    on_dial(monkeypatch, 9, dialled)
    rig.publish("http://127.0.0.1:9")
    got = await rig.raw(long())
    await dialling.wait()
    await leave(rig, got, lambda: True, reset=False, code=0)


async def test_before_its_body_is_there_it_is_accounted_and_nothing_was_asked_for(rig: Rig) -> None:
    before = ended(0)
    _, writer = await asyncio.open_connection("127.0.0.1", int(rig.url.rsplit(":", 1)[1]))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % PATH.encode())
    writer.write(b"content-length: 500\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: ended(0) == before + 1)
    assert rig.board.totals(0).arrived == 0


async def test_a_client_that_only_stops_sending_is_gone(rig: Rig) -> None:
    """uvicorn and every proxy take a half-closed connection for a closed one; a client that shuts its side
    down has no answer to expect."""

    async def hangs(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")))
        await peer.gone.wait()

    async with Scripted(hangs) as replica:
        rig.publish(replica.url)
        got = await rig.raw(long(stream=True))
        await got.until(b"data: ")
        got.writer.write_eof()
        await asyncio.wait_for(replica.peers[0].gone.wait(), WITHIN)
        await rig.quiet()
        await got.close()


async def test_a_hundred_that_leave_at_once_leave_nothing_behind(rig: Rig) -> None:
    async with Simulator(SimConfig(max_running=20)) as sim:
        rig.publish(sim.url)
        answers = [await rig.raw(long(stream=n % 2 == 0, user=f"u{n}")) for n in range(100)]
        await eventually(lambda: rig.board.in_flight(0) == 64 and rig.board.totals(0).waiting == 36)
        for got in answers:
            await got.close(reset=True)
        await rig.quiet()
        await eventually(lambda: sim.stats.running == sim.stats.queued == 0)
        assert max(sim.stats.markers.values()) == 1
        assert (await rig.client.post(PATH, json=chat(max_tokens=1))).status_code == 200
