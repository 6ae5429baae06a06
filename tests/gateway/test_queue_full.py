"""A full queue is told as 503, or in a 200 stream's first event; either way another replica may be asked."""

from __future__ import annotations

import asyncio
import json

import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .scripted import DATA, Peer, Scripted, busier, retries, whole

FULL = (DATA / "queue-full-stream.raw").read_bytes()
HEAD, _, REST = FULL.partition(b"\r\n\r\n")
HEAD += b"\r\n\r\n"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_finds_a_full_queue_is_answered_by_another_replica(
    rig: Rig, stream: bool
) -> None:
    before = retries("queue_full")
    async with Simulator(SimConfig(faults=("queue-full=1",))) as full, Simulator(SimConfig()) as free:
        rig.publish(full.url, free.url)
        await rig.acked()
        busier(rig, 1)
        answer = await rig.client.post("/v1/chat/completions", json=chat(stream=stream, max_tokens=3))
        assert answer.status_code == 200
        assert b"The request queue is full" not in answer.content
        assert (full.stats.refused, full.stats.runs_total, free.stats.runs_total) == (1, 0, 1)
        assert retries("queue_full") == before + 1
        await rig.quiet()


@pytest.mark.parametrize("stream", [True, False])
async def test_with_one_full_replica_the_answer_is_an_honest_503(rig: Rig, stream: bool) -> None:
    async with Simulator(SimConfig(faults=("queue-full=9",))) as sim:
        rig.publish(sim.url)
        answer = await rig.client.post("/v1/chat/completions", json=chat(stream=stream))
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        error = answer.json()["error"]
        assert (error["code"], error["message"]) == ("replica_queue_full", "The request queue is full.")
        assert sim.stats.refused == 1
        assert sim.stats.runs_total == 0
        await rig.quiet()


async def test_full_queues_everywhere_are_asked_three_times_at_most(rig: Rig) -> None:
    sims = [Simulator(SimConfig(faults=("queue-full=9",))) for _ in range(4)]
    for sim in sims:
        await sim.open()
    rig.publish(*(sim.url for sim in sims))
    answer = await rig.client.post("/v1/chat/completions", json=chat(stream=True))
    assert answer.status_code == 503
    assert sorted(sim.stats.refused for sim in sims) == [0, 1, 1, 1]
    for sim in sims:
        await sim.close()


async def test_a_full_queue_does_not_eject_the_replica(rig: Rig) -> None:
    async with Simulator(SimConfig(faults=("queue-full=20",))) as sim:
        rig.publish(sim.url)
        for _ in range(20):
            assert (await rig.client.post("/v1/chat/completions", json=chat())).status_code == 503
        answer = await rig.client.post("/v1/chat/completions", json=chat(max_tokens=2))
        assert answer.status_code == 200


async def test_the_recorded_event_is_understood_wherever_the_network_cuts_it(rig: Rig) -> None:
    """Each cut is one request: the first part, a pause until it has been read, the rest."""
    cuts = iter(range(len(HEAD), len(FULL)))

    async def answer(peer: Peer) -> None:
        cut = next(cuts)
        await peer.send(FULL[:cut])
        for _ in range(3):  # let the gateway read the first part by itself
            await asyncio.sleep(0)
        await peer.send(FULL[cut:])

    async with Scripted(answer) as server:
        rig.publish(server.url)
        await rig.acked()
        for _ in range(len(HEAD), len(FULL)):
            got = await rig.client.post("/v1/chat/completions", json=chat(stream=True))
            assert (got.status_code, got.json()["error"]["code"]) == (503, "replica_queue_full")
    assert next(cuts, None) is None


async def test_an_error_that_is_not_a_full_queue_keeps_its_status_and_is_not_retried(rig: Rig) -> None:
    body = {"error": {"object": "error", "message": "too long", "type": "BadRequest", "code": 400}}
    data = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(body).encode()

    async def answer(peer: Peer) -> None:
        await peer.send(whole(data, kind="text/event-stream"))

    async with Scripted(answer) as one, Scripted(answer) as two:
        rig.publish(one.url, two.url)
        got = await rig.client.post("/v1/chat/completions", json=chat(stream=True))
        assert got.status_code == 400
        assert got.json()["error"]["message"] == "too long"
        assert len(one.requests) + len(two.requests) == 1
        await eventually(lambda: rig.board.in_flight(0) == rig.board.in_flight(1) == 0)
