"""A request that finds a replica and a pooled connection has no task of its own, and loses nothing by that:
every end, every retry and every clock is as for one that waits."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.worker import YOUNG_SECONDS, Worker

from .conftest import Rig, chat, eventually, on_task
from .scripted import ANSWER, DONE, LAST, STREAM, Peer, Scripted, busier, chunk, event, retries, sample, whole

Rigs = Callable[..., Awaitable[Rig]]
PATH = "/v1/chat/completions"


def ended(end: str, code: int) -> float:
    return sample("gateway_requests_total", endpoint=PATH, code=str(code), end=end)


@pytest.fixture
async def tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that needed a task, by their coroutine's name."""
    made: list[str] = []
    on_task(monkeypatch, lambda name, task: made.append(name))
    return made


def after_the_first(answer: Callable[[Peer], Awaitable[None]]) -> Callable[[Peer], Awaitable[None]]:
    """A replica that answers its first request at once, so that its connection is in the pool."""

    async def played(peer: Peer) -> None:
        await (peer.send(ANSWER) if peer.number == 0 else answer(peer))

    return played


async def warm(rig: Rig, tasks: list[str], *replicas: Scripted) -> None:
    rig.publish(*(replica.url for replica in replicas))
    await rig.acked()
    for slot, replica in enumerate(replicas):
        for other in range(len(replicas)):
            rig.board.cells[rig.board.foreign + other] = 0
            if other != slot:
                busier(rig, other)
        assert (await rig.client.post(PATH, json=chat())).status_code == 200
        assert len(replica.requests) == 1
    await rig.quiet()
    for slot in range(1, len(replicas)):
        busier(rig, slot)
    rig.board.cells[rig.board.foreign] = 0
    assert len(tasks) == len(replicas)
    tasks.clear()


async def answers(peer: Peer) -> None:
    await peer.send(ANSWER)


async def streams(peer: Peer) -> None:
    await peer.send(STREAM + chunk(event("a")) + chunk(event("b")) + chunk(DONE) + LAST)


async def hangs(peer: Peer) -> None:
    await peer.gone.wait()


async def begins(peer: Peer) -> None:
    await peer.send(STREAM + chunk(event("a")))
    await peer.gone.wait()


async def test_plain_and_streaming_in_one_piece_or_byte_by_byte(rig: Rig, tasks: list[str]) -> None:
    async def dribbles(peer: Peer) -> None:
        data = STREAM + chunk(event("a")) + chunk(DONE) + LAST if peer.request.json.get("stream") else ANSWER
        for i in range(len(data)):
            await peer.send(data[i : i + 1])
            await asyncio.sleep(0)

    async with Scripted(after_the_first(dribbles)) as replica:
        await warm(rig, tasks, replica)
        before = ended("complete", 200)
        plain = await rig.client.post(PATH, json=chat())
        assert plain.json() == {"object": "chat.completion", "choices": []}
        stream = await rig.client.post(PATH, json=chat(stream=True))
        assert stream.content == event("a") + DONE
        await rig.quiet()
        assert ended("complete", 200) == before + 2
        assert replica.connections == 1
    assert tasks == []


async def test_a_refusal_is_wrapped_and_its_connection_kept(rig: Rig, tasks: list[str]) -> None:
    async def refuses(peer: Peer) -> None:
        await peer.send(whole(b'{"object":"error","message":"too long","code":400}', status=400))

    async with Scripted(after_the_first(refuses)) as replica:
        await warm(rig, tasks, replica)
        for _ in range(2):
            got = await rig.client.post(PATH, json=chat())
            assert got.status_code == 400
            assert got.json()["error"]["message"] == "too long"
        await rig.quiet()
        assert replica.connections == 1
    assert tasks == []


async def test_a_stale_connection_is_replaced_by_a_fresh_one(rig: Rig, tasks: list[str]) -> None:
    async def closes_once(peer: Peer) -> None:
        await (peer.send(ANSWER) if peer.number == 2 else asyncio.sleep(0))
        peer.close()

    async with Scripted(after_the_first(closes_once)) as replica:
        await warm(rig, tasks, replica)
        before = retries("stale")
        assert (await rig.client.post(PATH, json=chat())).status_code == 200
        assert retries("stale") == before + 1
        assert len(replica.requests) == 3
        rids = [request.json["rid"] for request in replica.requests]
        assert len(set(rids)) == 3
        await rig.quiet()


async def test_queue_full_goes_to_the_other_replica(rig: Rig, tasks: list[str]) -> None:
    async def full(peer: Peer) -> None:
        error = {"error": {"message": "The request queue is full.", "code": 503}}
        stream = STREAM + chunk(b"data: %b\n\n" % json.dumps(error).encode()) + chunk(DONE) + LAST
        await peer.send(stream if peer.request.json.get("stream") else whole(b"{}", status=503))

    async with Scripted(after_the_first(full)) as one, Scripted(after_the_first(streams)) as two:
        await warm(rig, tasks, one, two)
        before = retries("queue_full")
        got = await rig.client.post(PATH, json=chat(stream=True))
        assert got.content == event("a") + event("b") + DONE
        assert retries("queue_full") == before + 1
        assert (len(one.requests), len(two.requests)) == (2, 2)
        await rig.quiet()


async def test_a_replica_that_dies_in_mid_stream_ends_it_with_an_error(rig: Rig, tasks: list[str]) -> None:
    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("a")))
        peer.close()

    async with Scripted(after_the_first(dies)) as replica:
        await warm(rig, tasks, replica)
        before = ended("upstream_died", 200)
        got = await rig.client.post(PATH, json=chat(stream=True))
        assert got.content.startswith(event("a") + b'data: {"error"')
        assert DONE not in got.content
        await rig.quiet()
        assert ended("upstream_died", 200) == before + 1
    assert tasks == []


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(
    ("answer", "stream", "code", "aborted"),
    [(begins, True, 200, False), (hangs, True, 0, True), (hangs, False, 0, True)],
)
async def test_a_client_that_leaves_frees_the_engine(
    rig: Rig, tasks: list[str], answer: Any, stream: bool, code: int, aborted: bool, reset: bool
) -> None:
    async with Scripted(after_the_first(answer)) as replica:
        await warm(rig, tasks, replica)
        before = ended("client_gone", code)
        got = await rig.raw(chat(stream=stream))
        await eventually(lambda: len(replica.peers) == 2)
        if code:
            await got.until(event("a"))
        await got.close(reset=reset)
        await asyncio.wait_for(replica.peers[1].gone.wait(), 5)
        await rig.quiet()
        assert ended("client_gone", code) == before + 1
        await eventually(lambda: replica.aborts == [replica.requests[1].json["rid"]] * aborted)
    assert tasks == []


async def test_a_silent_replica_is_given_up_and_told(rigs: Rigs, tasks: list[str]) -> None:
    rig = await rigs(upstream_timeout=0.3)
    async with Scripted(after_the_first(hangs)) as replica:
        await warm(rig, tasks, replica)
        got = await rig.client.post(PATH, json=chat())
        assert got.status_code == 504
        await eventually(lambda: replica.aborts == [replica.requests[1].json["rid"]])
        await rig.quiet()
    assert tasks == []


async def test_beats_keep_the_client_of_a_silent_replica(rigs: Rigs, tasks: list[str]) -> None:
    rig = await rigs(beat_after=0.1, beat_every=0.1)
    speak = asyncio.Event()

    async def late(peer: Peer) -> None:
        await speak.wait()
        await peer.send(STREAM + chunk(event("a")) + chunk(DONE) + LAST)

    async with Scripted(after_the_first(late)) as replica:
        await warm(rig, tasks, replica)
        got = await rig.raw(chat(stream=True))
        beats = await got.until(b": waiting for the replica")
        assert beats.startswith(b"HTTP/1.1 200")
        speak.set()
        assert (await got.rest()).endswith(LAST)
        assert DONE in got.data
        await got.close()
        await rig.quiet()
    assert tasks == []


async def test_a_client_that_reads_nothing_is_cut(rigs: Rigs, tasks: list[str]) -> None:
    rig = await rigs(write_timeout=0.3)

    async def floods(peer: Peer) -> None:
        await peer.send(STREAM)
        while not peer.gone.is_set():
            await peer.send(chunk(event("x" * 60_000)))

    async with Scripted(after_the_first(floods)) as replica:
        await warm(rig, tasks, replica)
        before = ended("client_slow", 200)
        got = await rig.raw(chat(stream=True))
        got.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await eventually(lambda: ended("client_slow", 200) == before + 1)
        await got.close(reset=True)
        await rig.quiet()
    assert tasks == []


@pytest.mark.parametrize(("answer", "code"), [(begins, 200), (hangs, 503)])
async def test_a_server_that_stops_waits_for_it_and_cuts_it_at_last(
    rig: Rig, tasks: list[str], answer: Any, code: int
) -> None:
    async with Scripted(after_the_first(answer)) as replica:
        await warm(rig, tasks, replica)
        before = ended("shutdown", code)
        got = await rig.raw(chat(stream=True))
        await eventually(lambda: len(replica.peers) == 2)
        if code == 200:
            await got.until(event("a"))
        state = rig.servers[0].server_state
        assert len(state.tasks) == 1  # what uvicorn waits for, and what it does at the end of its patience
        for waited_for in state.tasks:
            waited_for.cancel(msg="the drain limit")
        await got.until(b"gateway_stopping")
        await rig.quiet()
        assert ended("shutdown", code) == before + 1
        assert not state.tasks
        await got.close()
    assert tasks == []


async def test_requests_that_come_one_by_one_share_the_clock_of_the_young(
    rig: Rig, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    original = Worker._look

    def look(self: Worker) -> None:
        looks.append(asyncio.get_running_loop().time())
        original(self)

    monkeypatch.setattr(Worker, "_look", look)
    async with Scripted(answers) as replica:
        await warm(rig, tasks, replica)
        for _ in range(20):
            assert (await rig.client.post(PATH, json=chat())).status_code == 200
        await asyncio.sleep(2 * YOUNG_SECONDS)
        assert looks
        assert all(late - early >= YOUNG_SECONDS for early, late in itertools.pairwise(looks))
        assert not rig.worker.young
