"""When a request is sent again: only before any response byte, at most three attempts, and nothing runs
twice."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gateway import routing, upstream
from gateway.retries import MAX_ATTEMPTS
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .scripted import ANSWER, LAST, STREAM, Peer, Scripted, busier, chunk, event, retries, whole

Answer = Callable[[Peer], Awaitable[None]]
Rigs = Callable[..., Awaitable[Rig]]


async def well(peer: Peer) -> None:
    await peer.send(ANSWER)


async def silent(peer: Peer) -> None:
    peer.close()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


CAUSES = (
    "stale", "dial", "queue_full", "died_silent", "died_midway", "bad_response", "timeout", "upstream_error",
)  # fmt: skip


class Counted:
    """The retries within the block, by cause."""

    def __enter__(self) -> Counted:
        self._before = {cause: retries(cause) for cause in CAUSES}
        return self

    def __exit__(self, *error: object) -> None:
        after = {cause: retries(cause) - self._before[cause] for cause in CAUSES}
        self.retries = {cause: int(count) for cause, count in after.items() if count}


async def test_a_stale_connection_is_replaced_once_on_the_same_replica(rig: Rig) -> None:
    closing: set[int] = {1}

    async def answer(peer: Peer) -> None:
        if peer.number in closing:
            peer.close()
        else:
            await peer.send(ANSWER)

    async with Scripted(answer) as one, Scripted(well) as two:
        rig.publish(one.url, two.url)
        await rig.acked()
        busier(rig, 1)
        await rig.client.post("/v1/chat/completions", json=chat())
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat())
        assert got.status_code == 200
        assert counted.retries == {"stale": 1}
        assert len(one.requests) == 3
        assert two.requests == []
        rids = [request.json["rid"] for request in one.requests]
        assert len(set(rids)) == 3  # SGLang refuses a rid it has seen


async def test_a_connection_that_closes_long_after_the_request_was_sent_is_not_stale(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(peer: Peer) -> None:
        if peer.number == 1:
            peer.close()
        else:
            await peer.send(ANSWER)

    async with Scripted(answer) as replica:
        rig.publish(replica.url)
        await rig.client.post("/v1/chat/completions", json=chat())
        monkeypatch.setattr(upstream, "STALE_SECONDS", -1.0)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat())
        assert (got.status_code, got.json()["error"]["code"]) == (502, "replica_died")
        assert counted.retries == {}
        assert len(replica.requests) == 2


async def test_an_idle_connection_that_sglang_closed_costs_nobody_anything(rig: Rig) -> None:
    async with Simulator(SimConfig(keep_alive=0.01)) as sim:
        rig.publish(sim.url)
        for n in range(1, 6):
            got = await rig.client.post("/v1/chat/completions", json=chat(max_tokens=1))
            assert got.status_code == 200
            assert sim.stats.runs_total == n
            await asyncio.sleep(0.02)  # around the close, on either side of it


async def test_a_refused_dial_goes_to_another_replica(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(closed_port(), sim.url)
        await rig.acked()
        busier(rig, 1)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat(max_tokens=1))
        assert got.status_code == 200
        assert counted.retries == {"dial": 1}
        assert sim.stats.runs_total == 1
        assert [suspect[0] for suspect in rig.control.workers[0].suspects] == ["up-0"]


async def test_without_another_replica_a_refused_dial_is_no_attempt_and_the_request_waits(
    rigs: Rigs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More dials than attempts are allowed; then the replica is back on its port."""
    monkeypatch.setattr(routing, "BASE_EJECTION_SECONDS", 0.02)
    log = tmp_path / "access.log"
    rig = await rigs(commit_after=0.05, beat_every=0.1, access_log=str(log))
    url = closed_port()
    rig.publish(url)
    with Counted() as counted:
        plain, stream = await rig.raw(chat()), await rig.raw(chat(stream=True))
        await stream.until(b": waiting for a replica that can be reached")
        await eventually(lambda: retries("dial") > 3 * MAX_ATTEMPTS)
        assert b"x-gateway-state: waiting" in stream.data
        async with Simulator(SimConfig(port=int(url.rpartition(":")[2]))) as sim:
            assert b"data: [DONE]" in await stream.rest()
            assert b'"choices"' in await plain.rest()
            assert sim.stats.runs_total == 2
    assert set(counted.retries) == {"dial"}
    await rig.quiet()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["end"], entry["attempts"]) for entry in entries] == [("complete", 1)] * 2
    for answer in (plain, stream):
        await answer.close()


async def test_who_waits_for_a_replica_that_is_gone_is_answered_by_another_that_comes(rig: Rig) -> None:
    gone = closed_port()
    rig.publish(gone)
    asked = asyncio.create_task(rig.client.post("/v1/chat/completions", json=chat(max_tokens=1)))
    await rig.waiting(1)
    async with Simulator(SimConfig()) as sim:
        rig.publish(gone, sim.url)
        assert (await asked).status_code == 200


async def test_one_that_comes_back_from_a_refused_dial_is_let_into_a_full_room(
    rigs: Rigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "BASE_EJECTION_SECONDS", 0.02)
    rig = await rigs(max_waiting=1)
    rig.publish(closed_port(), window=4)
    asked = [asyncio.create_task(rig.client.post("/v1/chat/completions", json=chat())) for _ in range(4)]
    await rig.waiting(4)  # all four had a lease before
    got = await rig.client.post("/v1/chat/completions", json=chat())
    assert (got.status_code, got.json()["error"]["code"]) == (429, "cold_queue_full")
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        assert [(await each).status_code for each in asked] == [200] * 4


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [
        ("beats", 503, "cold_start_timeout"),
        ("silent", 503, "cold_start_timeout"),
        ("reject", 502, "replica_unreachable"),
    ],
)
async def test_a_wait_for_a_replica_that_is_gone_ends_as_any_hold_does(
    rigs: Rigs, monkeypatch: pytest.MonkeyPatch, mode: str, status: int, code: str
) -> None:
    monkeypatch.setattr(routing, "BASE_EJECTION_SECONDS", 0.02)
    rig = await rigs(hold=mode)
    rig.publish(closed_port(), hold_max_seconds=0.3)
    with Counted() as counted:
        got = await rig.client.post("/v1/chat/completions", json=chat())
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)
    assert 1 <= int(got.headers["retry-after"]) <= 60
    assert counted.retries.get("dial", 0) == 0 if mode == "reject" else counted.retries["dial"] > 3
    await rig.quiet()


async def test_a_replica_that_closes_without_a_byte_is_not_asked_again_but_another_is(rig: Rig) -> None:
    async with Scripted(silent) as one, Simulator(SimConfig()) as sim:
        rig.publish(one.url, sim.url)
        await rig.acked()
        busier(rig, 1)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat(max_tokens=1))
        assert got.status_code == 200
        assert counted.retries == {"died_silent": 1}
        assert len(one.requests) == sim.stats.runs_total == 1


async def test_alone_it_is_an_honest_502(rig: Rig) -> None:
    async with Scripted(silent) as one:
        rig.publish(one.url)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat(stream=True))
        assert (got.status_code, got.json()["error"]["code"]) == (502, "replica_died")
        assert 1 <= int(got.headers["retry-after"]) <= 60
        assert counted.retries == {}
        assert len(one.requests) == 1


async def test_an_ejected_other_is_no_reason_to_ask_the_same_replica_again(rig: Rig) -> None:
    async with Scripted(silent) as one:
        rig.publish(one.url, closed_port())
        await rig.acked()
        busier(rig, 0)
        await rig.client.post("/v1/chat/completions", json=chat())  # ejects the closed port
        assert len(one.requests) == 1
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat())
        assert got.status_code == 502
        assert counted.retries == {}
        assert len(one.requests) == 2


async def test_three_attempts_are_all(rig: Rig) -> None:
    async with Scripted(silent) as a, Scripted(silent) as b, Scripted(silent) as c, Scripted(well) as d:
        rig.publish(a.url, b.url, c.url, d.url)
        await rig.acked()
        busier(rig, 3)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat())
        assert got.status_code == 502
        assert counted.retries == {"died_silent": 2}
        assert [len(r.requests) for r in (a, b, c, d)] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (b"garbage\r\n\r\n", 502, "replica_bad_response"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", 502, "replica_died"),
        (whole(b"no", status=500), 500, "replica_error"),
        (whole(b"no", status=429), 429, "invalid_request"),
        (whole(b"no", status=400), 400, "invalid_request"),
        (STREAM, 502, "replica_died"),
        (STREAM + b"5\r\ndat", 502, "replica_died"),
        (STREAM + chunk(b"data: {}\n"), 502, "replica_died"),
        (STREAM + LAST, 502, "replica_died"),
    ],
    ids=["garbage", "half a head", "500", "429", "400", "no event", "half a chunk", "half an event", "empty"],
)
async def test_after_the_first_byte_nothing_is_sent_again_and_the_status_is_honest(
    rig: Rig, answer: bytes, status: int, code: str
) -> None:
    async def send(peer: Peer) -> None:
        await peer.send(answer)
        peer.close()

    async with Scripted(send) as one, Scripted(send) as two:
        rig.publish(one.url, two.url)
        with Counted() as counted:
            got = await rig.client.post("/v1/chat/completions", json=chat(stream=True))
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert counted.retries == {}
        assert len(one.requests) + len(two.requests) == 1


async def test_our_own_beats_are_not_response_bytes(
    rigs: Rigs,
) -> None:
    rig = await rigs(commit_after=0.05, beat_every=0.1)

    async def full(peer: Peer) -> None:
        await peer.send(whole(b'{"message":"The request queue is full."}', status=503))

    async def streams(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")) + chunk(b"data: [DONE]\n\n") + LAST)

    async with Scripted(full) as one, Scripted(streams) as two:
        got = await rig.raw(chat(stream=True))
        await got.until(b": cold-start")
        busier(rig, 1)
        with Counted() as counted:
            rig.publish(one.url, two.url)
            data = await got.rest()
        assert b"data: [DONE]" in data
        assert counted.retries == {"queue_full": 1}
        await got.close()


async def test_nothing_runs_twice_when_replicas_are_full_gone_or_stale(rig: Rig) -> None:
    """200 requests, each with a marker that the engine counts; every one is answered once and ran once."""
    configs = [SimConfig(faults=("queue-full=20",), keep_alive=0.02), SimConfig(max_running=4, max_queued=2)]
    sims = [Simulator(config) for config in (*configs, SimConfig())]
    for sim in sims:
        await sim.open()
    rig.publish(closed_port(), *(sim.url for sim in sims))
    await rig.acked()

    async def ask(n: int) -> int:
        body = chat(stream=n % 2 == 0, max_tokens=2, user=f"user-{n}")
        for _ in range(50):
            got = await rig.client.post("/v1/chat/completions", json=body)
            if got.status_code != 503:
                return got.status_code
            await asyncio.sleep(0.01)  # as a client does that obeys Retry-After
        return 503

    async def ask_some(first: int) -> list[int]:
        return [await ask(n) for n in range(first, 200, 10)]

    statuses = [status for some in await asyncio.gather(*map(ask_some, range(10))) for status in some]
    assert statuses == [200] * 200
    markers = sum((sim.stats.markers for sim in sims[1:]), sims[0].stats.markers)
    assert markers == {f"user-{n}": 1 for n in range(200)}
    await rig.quiet()
    for sim in sims:
        await sim.close()
