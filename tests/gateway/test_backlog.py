"""A backlog waits in the gateway and not in one engine's queue: a second replica is filled at once.

Over two worker processes; the replicas count what they have at one time.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from .conftest import RawAnswer, chat, eventually
from .scripted import ANSWER, Peer, Scripted
from .worker_process import Gateway

WORKERS, BACKLOG, WINDOW = 2, 200, 64
ROUNDS = 3  # the best counts: another program may have the processor in one of them
FILL_SECONDS = 1.0


class Replica:
    """Answers once it may; `inside` now, `most` at any time."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.may = asyncio.Event()

    async def answer(self, peer: Peer) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.may.wait()
        self.inside -= 1
        await peer.send(ANSWER)


async def ask(gateway: Gateway, number: int) -> RawAnswer:
    body = json.dumps(chat()).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return await gateway.raw(number % WORKERS, head.encode() + body)


async def test_a_second_replica_is_at_its_window_within_a_second_and_none_is_ever_above(
    tmp_path: Path,
) -> None:
    one, two = Replica(), Replica()
    times = []
    async with (
        Scripted(one.answer) as first,
        Scripted(two.answer) as second,
        Gateway(tmp_path, WORKERS, {"commit_after": 600.0}) as gateway,
    ):
        await gateway.listen()
        for _ in range(ROUNDS):
            one.may.clear()
            two.may.clear()
            await gateway.publish(first.url, window=WINDOW)
            answers = [await ask(gateway, number) for number in range(BACKLOG)]
            await eventually(lambda: gateway.board.totals(0).waiting + one.inside >= BACKLOG, seconds=30)
            assert gateway.board.in_flight(0) <= WINDOW + WORKERS - 1

            began = time.monotonic()
            await gateway.publish(first.url, second.url, window=WINDOW)
            await eventually(lambda: two.inside >= WINDOW, seconds=30)
            times.append(time.monotonic() - began)

            one.may.set()
            two.may.set()
            for answer in answers:
                assert (await answer.rest(30)).startswith(b"HTTP/1.1 200 ")
                await answer.close()
            await eventually(lambda: gateway.board.in_flight(0) == gateway.board.in_flight(1) == 0)
    print(f"filled in {[f'{t * 1000:.0f} ms' for t in times]}; most at one time: {one.most}, {two.most}")
    assert min(times) < FILL_SECONDS
    assert one.most <= WINDOW + WORKERS - 1
    assert two.most <= WINDOW + WORKERS - 1
