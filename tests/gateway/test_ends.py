"""Every request has exactly one typed end, and it is in the metrics and in the access log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from gateway.errors import End
from gateway.metrics import REGISTRY
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually, on_dial
from .scripted import STREAM, Peer, Scripted, chunk, event, whole

PATH = "/v1/chat/completions"
Rigs = Callable[..., Awaitable[Rig]]
TURNED_BY_OTHERS = {End.WORKER_DIED}  # a dead worker cannot: its supervisor counts it


def counted() -> dict[tuple[str, str], int]:
    """(end, code) -> requests, of this endpoint."""
    found: dict[tuple[str, str], int] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name == "gateway_requests_total" and sample.labels["endpoint"] == PATH:
                key = sample.labels["end"], sample.labels["code"]
                found[key] = found.get(key, 0) + int(sample.value)
    return found


class Ends:
    """What was counted and logged since it was made."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.mark()

    def mark(self) -> None:
        """Count from here on."""
        self.before = counted()
        self.lines = len(self.log())

    def log(self) -> list[dict[str, Any]]:
        path = self.rig.folder / "access.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    async def one(self, end: End, code: int, **entry: Any) -> None:
        """Exactly one request has ended, with this end and code; the log's line says so and `entry`."""
        await eventually(lambda: len(self.log()) > self.lines)
        await self.rig.quiet()
        after = counted()
        new = {key: n - self.before.get(key, 0) for key, n in after.items() if n != self.before.get(key, 0)}
        assert new == {(end.value, str(code)): 1}
        (line,) = self.log()[self.lines :]
        assert (line["end"], line["status"], line["endpoint"]) == (end.value, code, PATH)
        assert {key: line[key] for key in entry} == entry
        self.mark()


async def test_every_end_is_reached_counted_and_logged(rigs: Rigs, tmp_path: Any) -> None:
    rig = await rigs(access_log=str(tmp_path / "access.log"), write_timeout=0.3, max_waiting=1)
    ends = Ends(rig)
    reached: set[End] = set()

    async def ended(end: End, code: int, **entry: Any) -> None:
        await ends.one(end, code, **entry)
        reached.add(end)

    # before there is a replica
    await rig.client.post(PATH, json={})
    await ended(End.REJECTED, 400, replica=None, attempts=0)

    held = await rig.raw(chat())
    await rig.waiting(1)
    assert (await rig.client.post(PATH, json=chat())).status_code == 429
    await ended_while_held(rig, ends, reached)
    await held.close()
    await ended(End.CLIENT_GONE, 0, replica=None)

    held = await rig.raw(chat())
    await rig.waiting(1)
    rig.publish(status="blocked", message="the run exits 1", code="launch_blocked")
    assert b" 503 " in (await held.rest()).splitlines()[0]
    await held.close()
    await ended(End.COLD_START_FAILED, 503)
    rig.publish(status="open")

    # with one
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.client.post(PATH, json=chat(max_tokens=3), headers={"x-request-id": "me-1"})
        await ended(End.COMPLETE, 200, replica="up-0", attempts=1, tokens_out=3, request_id="me-1")
        await rig.client.post(PATH, json=chat(max_tokens=10**9))
        await ended(End.UPSTREAM_ERROR, 400, replica="up-0")

    async def dies(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("x")))
        peer.close()

    async with Scripted(dies) as replica:
        rig.publish(replica.url)
        await rig.client.post(PATH, json=chat(stream=True))
        await ended(End.UPSTREAM_DIED, 200, stream=True)

    async def hangs(peer: Peer) -> None:
        await peer.gone.wait()

    async with Scripted(hangs) as replica:
        rig.publish(replica.url, upstream_timeout=0.2)
        await rig.client.post(PATH, json=chat())
        await ended(End.TIMEOUT, 504)
        await eventually(lambda: replica.aborts)
        rig.publish(replica.url, upstream_timeout=None)

    async def floods(peer: Peer) -> None:
        await peer.send(whole(b'"' + b"x" * 30_000_000 + b'"'))

    async with Scripted(floods) as replica:
        rig.publish(replica.url)
        deaf = await rig.raw(chat())
        deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await ended(End.CLIENT_SLOW, 200)
        await deaf.close()

    rig.publish()
    held = await rig.raw(chat())
    await rig.waiting(1)
    rig.worker.stop()
    await held.rest()
    await held.close()
    await ended(End.SHUTDOWN, 503)
    assert reached == set(End) - TURNED_BY_OTHERS


async def ended_while_held(rig: Rig, ends: Ends, reached: set[End]) -> None:
    """A rejection while another request is held: only the counts of the one are new."""
    await eventually(lambda: len(ends.log()) > ends.lines)
    (line,) = ends.log()[ends.lines :]
    assert (line["end"], line["status"]) == ("rejected", 429)
    reached.add(End.REJECTED)
    ends.mark()


async def test_the_log_has_no_prompt_no_answer_and_no_key(rigs: Rigs, tmp_path: Any) -> None:
    path = tmp_path / "access.log"
    rig = await rigs(access_log=str(path), api_key=("alice=sk-alice-1",))
    async with Simulator(SimConfig(reply="the-answer")) as sim:
        rig.publish(sim.url)
        headers = {"authorization": "Bearer sk-alice-1"}
        await rig.client.post(PATH, json=chat("the-prompt"), headers=headers)
        await eventually(lambda: path.exists() and path.read_text())
        text = path.read_text()
        assert json.loads(text)["key"] == "alice"
        for secret in ("sk-alice", "the-prompt", "the-answer"):
            assert secret not in text


async def test_a_full_disk_fails_no_request(rigs: Rigs) -> None:
    rig = await rigs(access_log="/dev/full")
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        for _ in range(3):
            assert (await rig.client.post(PATH, json=chat(max_tokens=1))).status_code == 200
        await rig.quiet()


async def test_a_request_that_fails_by_our_own_fault_is_a_500_that_is_counted(
    rigs: Rigs, monkeypatch: Any, tmp_path: Any
) -> None:
    rig = await rigs(access_log=str(tmp_path / "access.log"))
    ends = Ends(rig)

    async def broken() -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    on_dial(monkeypatch, 9, broken)
    rig.publish("http://127.0.0.1:9")
    got = await rig.client.post(PATH, json=chat())
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    await ends.one(End.UPSTREAM_ERROR, 500)
