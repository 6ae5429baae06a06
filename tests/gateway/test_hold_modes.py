"""`--hold` and `X-Gateway-Hold`: beats, silent, reject."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from gateway import worker
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .http1 import read_answer
from .scripted import Peer, Scripted, whole

Rigs = Callable[..., Awaitable[Rig]]
REJECT = {"X-Gateway-Hold": "reject"}
SILENT = "X-Gateway-Hold: silent"


async def test_reject_answers_503_with_the_eta_at_once_and_the_controller_hears_of_it(rig: Rig) -> None:
    rig.progress("download", 0.4, 1240.4)
    await eventually(lambda: rig.worker.services["r1"].cold)
    answer = await rig.client.post("/v1/chat/completions", json=chat(), headers=REJECT)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "cold_start"
    assert answer.headers["x-gateway-state"] == "cold-start"
    assert answer.headers["x-gateway-eta-seconds"] == "1240"
    assert answer.headers["retry-after"] == "60", "openai-python gives up above that"
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 1})
    await rig.quiet()


async def test_reject_without_an_eta_says_so(rig: Rig) -> None:
    answer = await rig.client.post("/v1/chat/completions", json=chat(stream=True), headers=REJECT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert answer.headers["x-gateway-eta-seconds"] == "unknown"


async def test_reject_needs_no_place_in_the_waiting_room(rigs: Rigs) -> None:
    rig = await rigs(max_waiting=1)
    held = await rig.raw(chat())
    await rig.waiting(1)
    answer = await rig.client.post("/v1/chat/completions", json=chat(), headers=REJECT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cold_start")
    await held.close()
    await rig.waiting(0)


async def test_the_demand_of_rejected_requests_fades(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker.WAKE_SECONDS >= 60, "clients come back within Retry-After, at most 60 s"
    monkeypatch.setattr(worker, "WAKE_SECONDS", 0.1)
    await rig.client.post("/v1/chat/completions", json=chat(), headers=REJECT)
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 1})
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 0})


async def test_reject_is_served_when_a_replica_is_there(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        answer = await rig.client.post("/v1/chat/completions", json=chat(max_tokens=2), headers=REJECT)
        assert answer.status_code == 200
        await rig.quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_silent_sends_nothing_early_and_503_before_the_client_gives_up(rig: Rig, stream: bool) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    held = await rig.raw(chat(stream=stream), headers=[SILENT, "x-stainless-read-timeout: 1"])
    got = read_answer(await held.rest())
    await held.close()
    assert loop.time() - began >= 0.5
    assert got.status == 503
    assert json.loads(got.body)["error"]["code"] == "cold_start_timeout"
    assert got.headers["retry-after"] == "1"
    await rig.quiet()


async def test_silent_keeps_honest_status_codes(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0, beat_every=0.1, beat_after=0.1)
    go = asyncio.Event()

    async def refuse(peer: Peer) -> None:
        await go.wait()
        await peer.send(whole(b'{"message": "temperature is too high"}', status=400))

    held = await rig.raw(chat(stream=True), headers=[SILENT])
    await rig.waiting(1)
    async with Scripted(refuse) as replica:
        rig.publish(replica.url)
        await eventually(lambda: replica.requests)
        with pytest.raises(TimeoutError):  # nor do a replica's own silences get beats
            await held.until(b"HTTP", seconds=0.4)
        go.set()
        got = read_answer(await held.rest())
        await held.close()
    assert got.status == 400
    assert json.loads(got.body)["error"]["message"] == "temperature is too high"
    await rig.quiet()


async def test_the_header_overrides_the_flag(rigs: Rigs) -> None:
    rig = await rigs(hold="reject", commit_after=0.0)
    answer = await rig.client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 503
    held = await rig.raw(chat(stream=True), headers=["X-Gateway-Hold: beats"])
    await held.until(b": cold-start")
    await held.close()


async def test_an_unknown_wish_is_400_and_wakes_nobody(rig: Rig) -> None:
    answer = await rig.client.post("/v1/chat/completions", json=chat(), headers={"X-Gateway-Hold": "wait"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Gateway-Hold"
    assert rig.board.totals(0) == (0, 0, 0, 0, 0)
    assert rig.control.workers[0].waiting == {"r1": 0}


async def test_a_hold_ends_at_its_longest_with_an_honest_503(rig: Rig) -> None:
    rig.publish(hold_max_seconds=0.2)
    await rig.acked()
    answer = await rig.client.post("/v1/chat/completions", json=chat())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "cold_start_timeout"


async def test_a_committed_hold_ends_at_its_longest_with_an_error_event(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0)
    rig.publish(hold_max_seconds=0.2)
    await rig.acked()
    held = await rig.raw(chat(stream=True))
    got = read_answer(await held.rest())
    await held.close()
    assert (got.status, got.complete) == (200, True)
    assert b'"code": "cold_start_timeout"' in got.body
    assert b"[DONE]" not in got.body
