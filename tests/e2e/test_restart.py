"""`gateway restart` under load: every process is a new one, and no client of openai-python notices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai

Gateways = Callable[..., Any]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CLIENTS = 12
LONG = 4  # streams that span the restart


async def test_two_workers_and_the_controller_are_replaced_under_load_and_no_request_is_lost(
    gateways: Gateways, eventually: Any
) -> None:
    gateway = gateways("--workers", "2", startup="load=1", min=1, max=1, flags="--profile r1-8xh200-2026")
    async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", timeout=60) as client:

        async def short(stream: bool) -> None:
            answer = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=2, stream=stream, extra_body={"ignore_eos": True}
            )
            if stream:
                chunks = [chunk async for chunk in answer]
                assert chunks[-1].choices[0].finish_reason == "length"
            else:
                assert answer.usage.completion_tokens == 2

        async def keep_asking(number: int) -> int:
            count = 0
            while not over.is_set():
                await short(stream=(number + count) % 2 == 0)
                count += 1
            return count

        async def long() -> int:
            stream = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=50_000, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = []
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == 1:
                    begun.release()
                if restarted.is_set():  # it has spanned the restart
                    return len(chunks)
            raise AssertionError("the stream ended before the restart did")

        over, restarted, begun = asyncio.Event(), asyncio.Event(), asyncio.Semaphore(0)
        await short(stream=False)  # the replica is there
        before = {pid for module in ("gateway.app", "gateway.admin") for pid in gateway.children(module)}
        asking = [asyncio.create_task(keep_asking(number)) for number in range(CLIENTS)]
        streaming = [asyncio.create_task(long()) for _ in range(LONG)]
        for _ in range(LONG):
            await begun.acquire()

        assert "is a new one" in (await asyncio.to_thread(gateway.cli, "restart")).stdout
        after = {pid for module in ("gateway.app", "gateway.admin") for pid in gateway.children(module)}
        assert len(after - before) == 3
        assert after & before, "an old worker still has its streams"
        for _ in range(CLIENTS):
            await short(stream=True)
        restarted.set()
        chunks = await asyncio.gather(*streaming)
        over.set()
        counts = await asyncio.gather(*asking)
    assert min(chunks) > 2
    assert min(counts) > 0
    eventually(lambda: not before & set(gateway.children("gateway.")))
    entries = gateway.access()
    print(f"{len(entries)} requests, {sum(counts)} of them during the load; streams of {chunks} chunks")
    assert {entry["worker"] for entry in entries} == {0, 1, 2, 3}
    ends = [entry["end"] for entry in entries]
    assert ends.count("client_gone") == LONG  # as this test leaves them
    assert set(ends) <= {"complete", "client_gone", "shutdown"}
    assert "worker_died" not in gateway.metrics()
