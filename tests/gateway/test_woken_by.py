"""Whose request made a cold service start: the worker tells the controller with the level of who waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from gateway import worker

from .conftest import Rig, chat, eventually

Rigs = Callable[..., Awaitable[Rig]]
KEYS = ("alice=alices-key", "bob=bobs-key-2")
ALICE = ["Authorization: Bearer alices-key", "X-Request-Id: req-1"]
BOB = ["Authorization: Bearer bobs-key-2", "X-Request-Id: req-2"]


async def test_the_first_that_waits_is_named_until_nobody_does(rigs: Rigs) -> None:
    rig = await rigs(api_key=KEYS)
    first = await rig.raw(chat(), headers=ALICE)
    await eventually(lambda: rig.control.workers[0].woken == {"r1": ("alice", "req-1")})
    second = await rig.raw(chat(), headers=BOB)
    await rig.waiting(2)
    await first.close()
    await rig.waiting(1)
    rig.worker.control.send_state()
    assert rig.control.workers[0].woken == {"r1": ("alice", "req-1")}, "it started what the others wait for"
    await second.close()
    await eventually(lambda: rig.control.workers[0].woken == {})
    third = await rig.raw(chat(), headers=BOB)
    await eventually(lambda: rig.control.workers[0].woken == {"r1": ("bob", "req-2")})
    await third.close()


async def test_a_request_that_would_not_be_held_is_named_for_as_long_as_it_counts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WAKE_SECONDS", 0.1)
    headers = {"X-Gateway-Hold": "reject", "X-Request-Id": "req-3"}
    await rig.client.post("/v1/chat/completions", json=chat(), headers=headers)
    await eventually(lambda: rig.control.workers[0].woken == {"r1": ("", "req-3")})
    await eventually(lambda: rig.control.workers[0].woken == {})
