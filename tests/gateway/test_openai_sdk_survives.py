"""The stock SDK lives through waits much longer than its own timeout, and hears of their failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from replicas.simulator import SimConfig, Simulator

from .conftest import Rig
from .scripted import DONE, LAST, STREAM, Peer, Scripted, chunk, event, whole

Rigs = Callable[..., Awaitable[Rig]]
TIMEOUT = 0.9  # seconds: of the client
LONG = 3.0  # seconds: of each wait
MESSAGES: Any = [{"role": "user", "content": "how many rs are in strawberry"}]


def ask(rig: Rig) -> Callable[..., Awaitable[Any]]:
    """One chat request of a client that never retries: the text of its answer."""

    async def call(*, stream: bool, max_tokens: int = 5) -> str:
        async with openai.AsyncOpenAI(
            base_url=f"{rig.url}/v1", api_key="unused", timeout=TIMEOUT, max_retries=0
        ) as client:
            if not stream:
                whole_answer = await client.chat.completions.create(
                    model="r1", messages=MESSAGES, max_tokens=max_tokens
                )
                return whole_answer.choices[0].message.content or ""
            text = ""
            async for part in await client.chat.completions.create(
                model="r1", messages=MESSAGES, max_tokens=max_tokens, stream=True
            ):
                text += part.choices[0].delta.content or ""
            return text

    return call


def ask_in_a_thread(rig: Rig, *, stream: bool) -> Awaitable[str]:
    """The same with the synchronous client."""

    def call() -> str:
        with openai.OpenAI(
            base_url=f"{rig.url}/v1", api_key="unused", timeout=TIMEOUT, max_retries=0
        ) as client:
            if not stream:
                got = client.chat.completions.create(model="r1", messages=MESSAGES, max_tokens=5)
                return got.choices[0].message.content or ""
            parts = client.chat.completions.create(model="r1", messages=MESSAGES, max_tokens=5, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in parts)

    return asyncio.to_thread(call)


async def test_a_hold_of_three_times_the_timeout(rig: Rig) -> None:
    call = ask(rig)
    waits = [asyncio.ensure_future(call(stream=stream)) for stream in (False, True)]
    waits += [asyncio.ensure_future(ask_in_a_thread(rig, stream=stream)) for stream in (False, True)]
    await rig.waiting(4)
    await asyncio.sleep(LONG)  # the wait itself is what is tested
    assert not any(task.done() for task in waits)
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        texts = await asyncio.gather(*waits)
        assert len(set(texts)) == 1
        assert texts[0]
        assert sim.stats.runs_total == 4, "nothing ran twice"
        await rig.quiet()


async def test_an_answer_that_takes_three_times_the_timeout(rig: Rig) -> None:
    async def slowly(peer: Peer) -> None:
        await asyncio.sleep(LONG)
        if peer.request.json.get("stream"):
            await peer.send(STREAM + chunk(event("three")) + chunk(DONE) + LAST)
        else:
            message = b'{"role":"assistant","content":"three"}'
            await peer.send(whole(b'{"choices":[{"index":0,"message":%b}]}' % message))

    async with Scripted(slowly) as replica:
        rig.publish(replica.url)
        await rig.acked()
        call = ask(rig)
        assert await asyncio.gather(call(stream=False), call(stream=True)) == ["three", "three"]
        assert len(replica.requests) == 2
        await rig.quiet()


async def test_a_stream_that_stalls_between_two_tokens_for_three_times_the_timeout(rig: Rig) -> None:
    async def slowly(peer: Peer) -> None:
        await peer.send(STREAM + chunk(event("thr")))
        await asyncio.sleep(LONG)
        await peer.send(chunk(event("ee")) + chunk(DONE) + LAST)

    async with Scripted(slowly) as replica:
        rig.publish(replica.url)
        await rig.acked()
        assert await ask(rig)(stream=True) == "three"


async def test_a_cold_start_that_fails_is_an_error_with_its_cause_in_both_modes(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0)
    call = ask(rig)
    waits = [asyncio.ensure_future(call(stream=stream)) for stream in (False, True)]
    await rig.waiting(2)
    rig.publish(status="blocked", message="no H100 anywhere", retry_after=30)
    whole_error, stream_error = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(whole_error, openai.APIConnectionError), "never a ChatCompletion without choices"
    assert isinstance(stream_error, openai.APIError)
    assert (stream_error.code, stream_error.message) == ("cold_start_failed", "no H100 anywhere")
    with pytest.raises(openai.InternalServerError, match="no H100 anywhere") as caught:
        await call(stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "launch_blocked")


async def test_the_sdk_retries_a_broken_off_json_answer_and_gets_the_honest_status(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0)

    async def refuse(peer: Peer) -> None:
        await peer.send(whole(b'{"message": "max_tokens is too big"}', status=400))

    async with openai.AsyncOpenAI(
        base_url=f"{rig.url}/v1", api_key="unused", timeout=TIMEOUT, max_retries=1
    ) as client:
        wait = asyncio.ensure_future(client.chat.completions.create(model="r1", messages=MESSAGES))
        await rig.waiting(1)
        async with Scripted(refuse) as replica:
            rig.publish(replica.url)
            with pytest.raises(openai.BadRequestError, match="max_tokens is too big"):
                await wait
            assert len(replica.requests) == 2
