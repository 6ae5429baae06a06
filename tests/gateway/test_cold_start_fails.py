"""A replica that never gets ready, a paused service, a gateway that stops: how the held are told."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .http1 import read_answer

Rigs = Callable[..., Awaitable[Rig]]
CAUSE = "replica r1-gw-0a1b2c3d-1 exited with code 1: CUDA out of memory"
BLOCKED: dict[str, Any] = {
    "status": "blocked", "code": "launch_blocked", "message": CAUSE, "retry_after": 3600, "state": "blocked",
}  # fmt: skip
LATE = {"commit_after": 600.0}
EARLY = {"commit_after": 0.0}


async def held(rig: Rig, count: int = 1, path: str = "/v1/chat/completions", **body: Any) -> Any:
    """A request that waits, and was committed where the rig does so early."""
    answer = await rig.raw(body if "input" in body else chat(**body), path=path)
    await rig.waiting(count)
    if rig.settings.commit_after == 0:
        await answer.until(b"\r\n\r\n")
    return answer


async def end(answer: Any) -> Any:
    got = read_answer(await answer.rest())
    await answer.close()
    return got


async def test_a_held_stream_ends_in_an_error_event_and_no_end_marker(rigs: Rigs) -> None:
    rig = await rigs(**EARLY)
    answer = await held(rig, stream=True)
    rig.publish(**BLOCKED)
    got = await end(answer)
    assert (got.status, got.complete) == (200, True)
    *_, last, rest = got.body.split(b"\n\n")
    assert rest == b""
    data = last.partition(b"data: ")[2]
    assert json.loads(data) == {
        "error": {"message": CAUSE, "type": "server_error", "param": None, "code": "cold_start_failed"}
    }
    assert b"[DONE]" not in got.body
    await rig.quiet()


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        ("/v1/messages", {"max_tokens": 5}, b'event: error\ndata: {"type": "error", "error": {'),
        ("/v1/responses", {"input": "a"}, b'data: {"type": "error", "code": "cold_start_failed"'),
    ],
)
async def test_each_endpoint_has_its_own_error_event(
    rigs: Rigs, path: str, body: dict[str, Any], last: bytes
) -> None:
    rig = await rigs(**EARLY)
    answer = await held(rig, path=path, stream=True, **body)
    rig.publish(**BLOCKED)
    got = await end(answer)
    assert got.complete
    assert last in got.body


async def test_a_held_json_answer_ends_in_an_aborted_connection(rigs: Rigs) -> None:
    rig = await rigs(**EARLY)
    answer = await held(rig)
    rig.publish(**BLOCKED)
    got = await end(answer)
    assert got.status == 200
    assert not got.complete
    assert got.body.strip(b" ") == b"", "an error body under 200 would be read as an answer"
    await rig.quiet()


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_commit_it_is_503_with_the_cause(rigs: Rigs, stream: bool) -> None:
    rig = await rigs(**LATE)
    answer = await held(rig, stream=stream)
    rig.publish(**BLOCKED)
    got = await end(answer)
    assert got.status == 503
    assert got.headers["retry-after"] == "60"
    error = json.loads(got.body)["error"]
    assert (error["code"], error["message"]) == ("cold_start_failed", CAUSE)


@pytest.mark.parametrize(("seconds", "told"), [(-5, "1"), (0, "1"), (1, "1"), (42, "42"), (3600, "60")])
async def test_later_requests_get_503_with_the_cause_at_once(rig: Rig, seconds: int, told: str) -> None:
    rig.publish(**{**BLOCKED, "retry_after": seconds})
    await rig.acked()
    answer = await rig.client.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == told
    error = answer.json()["error"]
    assert (error["code"], error["message"]) == ("launch_blocked", CAUSE)
    await rig.quiet()


async def test_reject_is_told_the_cause_too(rig: Rig) -> None:
    rig.publish(**BLOCKED)
    await rig.acked()
    answer = await rig.client.post("/v1/chat/completions", json=chat(), headers={"X-Gateway-Hold": "reject"})
    assert answer.json()["error"]["code"] == "launch_blocked"


async def test_when_the_block_ends_requests_are_held_again(rig: Rig) -> None:
    rig.publish(**BLOCKED)
    await rig.acked()
    rig.publish(status="open", message="")
    await rig.acked()
    answer = await held(rig)
    await answer.close()
    await rig.waiting(0)


async def test_a_failed_second_replica_fails_nobody_while_one_is_ready(rigs: Rigs) -> None:
    rig = await rigs(**LATE)
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url, window=1)
        await rig.acked()
        first = await rig.raw(chat(stream=True, max_tokens=100_000, ignore_eos=True))
        await first.until(b"data: ")
        answer = await held(rig, max_tokens=1)
        rig.publish(sim.url, window=1, **BLOCKED)
        await rig.acked()
        assert rig.board.totals(0).waiting == 1
        await first.close()
        assert (await end(answer)).status == 200
        await rig.quiet()


@pytest.mark.parametrize("early", [False, True])
async def test_a_paused_service_ends_holds_and_refuses_new_requests(rigs: Rigs, early: bool) -> None:
    rig = await rigs(**(EARLY if early else LATE))
    answer = await held(rig, stream=True)
    rig.publish(status="paused", message="r1 is paused.", code="service_paused")
    got = await end(answer)
    assert got.status == (200 if early else 503)
    assert b'"code": "service_paused"' in got.body
    answer = await rig.client.post("/v1/chat/completions", json=chat())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_paused")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a_paused_service_takes_nothing_even_while_its_replica_drains(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url, status="paused")
        await rig.acked()
        answer = await rig.client.post("/v1/chat/completions", json=chat())
        assert answer.status_code == 503
        assert sim.stats.runs_total == 0


async def test_going_down_ends_holds_so_that_a_retry_reaches_the_next_gateway(rigs: Rigs) -> None:
    rig = await rigs(**LATE)
    answer = await held(rig)
    rig.publish(status="stopping", retry_after=2)
    got = await end(answer)
    assert (got.status, got.headers["retry-after"]) == (503, "2")
    assert json.loads(got.body)["error"]["code"] == "gateway_stopping"
    assert (await rig.client.post("/v1/chat/completions", json=chat())).status_code == 503


async def test_a_service_that_is_no_longer_there_ends_its_holds(rigs: Rigs) -> None:
    from replicas.control import Snapshot

    rig = await rigs(**LATE)
    answer = await held(rig)
    rig.generation += 1
    rig.control.publish(Snapshot(rig.generation, ()))
    assert (await end(answer)).status == 503
    assert (await rig.client.post("/v1/chat/completions", json=chat())).status_code == 503


async def test_every_way_to_end_has_its_name_in_the_access_log(rigs: Rigs, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    rig = await rigs(access_log=str(log), **LATE)
    answer = await held(rig)
    rig.publish(**BLOCKED)
    await end(answer)
    await rig.client.post("/v1/chat/completions", json=chat())
    rig.publish(status="open")
    await rig.acked()
    answer = await held(rig)
    await answer.close()
    await rig.waiting(0)
    answer = await held(rig)
    rig.publish(status="stopping")
    await end(answer)
    await eventually(lambda: len(log.read_text().splitlines()) == 4)
    ends = [json.loads(line)["end"] for line in log.read_text().splitlines()]
    assert ends == ["cold_start_failed", "rejected", "client_gone", "shutdown"]
