"""Ready: the held are let in oldest first and into the window, not as a herd."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually
from .scripted import ANSWER, Peer, Scripted

Rigs = Callable[..., Awaitable[Rig]]


class Gate:
    """A replica's answers, one per `open()`; `most` were there at one time."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(0)
        self.order: list[int] = []
        self.inside = self.most = 0

    async def answer(self, peer: Peer) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.order.append(int(peer.request.json["user"]))
        await self.places.acquire()
        self.inside -= 1
        await peer.send(ANSWER)

    def open(self) -> None:
        self.places.release()


async def hold(rig: Rig, count: int) -> list[asyncio.Task[int]]:
    """That many requests, one after the other, taking turns between the workers; each ends as a status."""
    tasks = []
    for number in range(count):
        url = rig.urls[number % rig.workers]
        body = chat(user=str(number))

        async def ask(url: str = url, body: dict[str, object] = body) -> int:
            return (await rig.client.post(f"{url}/v1/chat/completions", json=body)).status_code

        tasks.append(asyncio.create_task(ask()))
        await rig.waiting(number + 1)
    return tasks


async def test_two_hundred_held_go_into_a_window_of_sixteen_oldest_first(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0)
    gate = Gate()
    tasks = await hold(rig, 200)
    async with Scripted(gate.answer) as replica:
        rig.publish(replica.url, window=16)
        await eventually(lambda: gate.inside == 16)
        assert rig.board.in_flight(0) == 16
        assert rig.board.totals(0).waiting == 184
        assert sorted(gate.order) == list(range(16))
        for number in range(200):
            gate.open()
            await eventually(lambda done=number: len(gate.order) == min(200, 17 + done))  # type: ignore[misc]
        assert await asyncio.gather(*tasks) == [200] * 200
        assert gate.order[16:] == list(range(16, 200))
        assert gate.most == 16
        await rig.quiet()


async def test_over_two_workers_the_order_and_the_window_hold_too(rigs: Rigs) -> None:
    rig = await rigs(workers=2, commit_after=600.0)
    gate = Gate()
    tasks = await hold(rig, 60)
    async with Scripted(gate.answer) as replica:
        rig.publish(replica.url, window=4)
        await eventually(lambda: gate.inside == 4)
        for number in range(60):
            gate.open()
            await eventually(lambda done=number: len(gate.order) == min(60, 5 + done))  # type: ignore[misc]
        assert await asyncio.gather(*tasks) == [200] * 60
        assert sorted(gate.order[:4]) == [0, 1, 2, 3]
        assert gate.order[4:] == list(range(4, 60))
        assert gate.most <= 4 + rig.workers - 1
        await rig.quiet()


async def test_a_new_request_waits_behind_those_that_are_held(rigs: Rigs) -> None:
    rig = await rigs(workers=2, commit_after=600.0)
    gate = Gate()
    async with Scripted(gate.answer) as replica:
        rig.publish(replica.url, window=1)
        await rig.acked()
        first = asyncio.create_task(rig.client.post("/v1/chat/completions", json=chat(user="0")))
        await eventually(lambda: gate.inside == 1)
        rest = await hold(rig, 4)
        for _ in range(5):
            gate.open()
        assert (await first).status_code == 200
        assert await asyncio.gather(*rest) == [200] * 4
        assert gate.order == [0, 0, 1, 2, 3]
        await rig.quiet()


async def test_a_client_that_leaves_in_the_moment_of_its_release_gives_its_place_on(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0)
    async with Simulator(SimConfig()) as sim:
        for _ in range(10):
            rig.publish()
            await rig.acked()
            answers = [await rig.raw(chat(max_tokens=2)) for _ in range(4)]
            await rig.waiting(4)
            rig.publish(sim.url, window=1)
            for answer in answers[::2]:
                await answer.close(reset=True)
            for answer in answers[1::2]:
                assert b'"finish_reason"' in await answer.rest()
                await answer.close()
            await rig.quiet()


async def test_a_second_replica_takes_what_the_first_has_no_place_for(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0)
    one, two = Gate(), Gate()
    tasks = await hold(rig, 6)
    async with Scripted(one.answer) as first, Scripted(two.answer) as second:
        rig.publish(first.url, window=2)
        await eventually(lambda: one.inside == 2)
        rig.publish(first.url, second.url, window=2)
        await eventually(lambda: two.inside == 2)
        assert sorted(two.order) == [2, 3]
        for _ in range(6):
            one.open()
            two.open()
        assert await asyncio.gather(*tasks) == [200] * 6
        assert (one.most, two.most) == (2, 2)
        await rig.quiet()


async def test_a_wider_window_lets_the_next_in(rigs: Rigs) -> None:
    rig = await rigs(commit_after=600.0)
    gate = Gate()
    tasks = await hold(rig, 3)
    async with Scripted(gate.answer) as replica:
        rig.publish(replica.url, window=1)
        await eventually(lambda: gate.inside == 1)
        rig.publish(replica.url, window=3)
        await eventually(lambda: gate.inside == 3)
        for _ in range(3):
            gate.open()
        assert await asyncio.gather(*tasks) == [200] * 3


async def test_the_dispatch_log_says_what_was_held_and_how_long(rigs: Rigs, tmp_path: object) -> None:
    log = f"{tmp_path}/access.log"
    rig = await rigs(commit_after=600.0, access_log=log)
    async with Simulator(SimConfig()) as sim:
        tasks = await hold(rig, 2)
        rig.publish(sim.url)
        assert await asyncio.gather(*tasks) == [200, 200]
        await rig.quiet()
    with open(log) as file:  # noqa: ASYNC230 - a few lines
        entries = [json.loads(line) for line in file]
    for entry in entries:
        (before, after), (released, freed) = entry["counted_ns"], entry["released_ns"]
        assert 0 < before <= after <= released <= freed
        assert entry["held_s"] > 0
        assert entry["replica"] == "up-0"
