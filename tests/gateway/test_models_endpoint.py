"""`GET /v1/models` is the gateway's own, and names route once there are several services."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx

from replicas.control import ColdStart, Snapshot, UpstreamInfo
from replicas.simulator import SimConfig, Simulator

from .conftest import SERVICE, Rig, chat, eventually

QWEN = replace(SERVICE, name="qwen", index=1, model="Qwen/Qwen3")
Rigs = Callable[..., Awaitable[Rig]]


async def publish(rig: Rig, *services: Any) -> None:
    rig.generation += 1
    rig.control.publish(Snapshot(rig.generation, services))
    await rig.acked()


async def test_a_cold_model_is_listed_with_its_state_and_eta(rig: Rig) -> None:
    rig.publish(state="starting", cold=ColdStart("r1-gw-00000000-1", "load", 0.5, 410.0))
    await rig.acked()
    answer = await rig.client.get("/v1/models")
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "list"
    (model,) = body["data"]
    assert model.pop("created") > 1_700_000_000
    assert model == {
        "id": "deepseek-ai/DeepSeek-R1", "object": "model", "owned_by": "skygate", "service": "r1",
        "state": "starting", "eta_seconds": 410.0,
    }  # fmt: skip


async def test_the_eta_follows_the_cold_start(rig: Rig) -> None:
    rig.progress("load", 0.9, 30.0)
    await eventually(lambda: rig.worker.services["r1"].cold)
    answer = await rig.client.get("/v1/models/deepseek-ai/DeepSeek-R1")
    assert answer.json()["eta_seconds"] == 30.0


async def test_one_model_is_found_by_its_name_or_its_services(rig: Rig) -> None:
    for name in ("deepseek-ai/DeepSeek-R1", "r1"):
        answer = await rig.client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["id"]) == (200, "deepseek-ai/DeepSeek-R1")


async def test_an_unknown_model_is_404_in_openais_shape(rig: Rig) -> None:
    answer = await rig.client.get("/v1/models/gpt-4")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_listing_asks_for_a_key_and_wakes_nobody(rigs: Rigs) -> None:
    rig = await rigs(api_key=("me=a-long-enough-key",))
    for path in ("/v1/models", "/v1/models/r1"):
        assert (await rig.client.get(path)).status_code == 401
        answer = await rig.client.get(path, headers={"Authorization": "Bearer a-long-enough-key"})
        assert answer.status_code == 200
    assert rig.board.totals(0) == (0, 0, 0, 0, 0)
    assert rig.control.workers[0].waiting == {"r1": 0}


async def test_with_one_service_any_model_name_will_do(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        for model in ("deepseek-ai/DeepSeek-R1-671B", "whatever", None):
            body = {**chat(max_tokens=1), "model": model}
            assert (await rig.client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_with_several_services_the_name_routes(rig: Rig) -> None:
    async with Simulator(SimConfig()) as one, Simulator(SimConfig()) as two:
        await publish(
            rig,
            replace(SERVICE, upstreams=(UpstreamInfo("a", 0, one.url, 4),)),
            replace(QWEN, upstreams=(UpstreamInfo("b", 1, two.url, 4),)),
        )
        assert [m["id"] for m in (await rig.client.get("/v1/models")).json()["data"]] == [
            "deepseek-ai/DeepSeek-R1",
            "Qwen/Qwen3",
        ]
        for model, sim in (("Qwen/Qwen3", two), ("qwen", two), ("r1", one), ("deepseek-ai/DeepSeek-R1", one)):
            before = sim.stats.runs_total
            body = {**chat(max_tokens=1), "model": model}
            assert (await rig.client.post("/v1/chat/completions", json=body)).status_code == 200
            assert sim.stats.runs_total == before + 1
        await eventually(lambda: rig.board.totals(0).ended == rig.board.totals(1).ended == 2)


async def test_with_several_services_another_name_is_404_and_wakes_none(rig: Rig) -> None:
    await publish(rig, SERVICE, QWEN)
    for model in ("gpt-4", "", None):
        answer = await rig.client.post("/v1/chat/completions", json={**chat(), "model": model})
        assert_not_found(answer)
    assert rig.control.workers[0].waiting == {"r1": 0, "qwen": 0}


async def test_with_several_services_only_the_one_asked_for_is_woken(rig: Rig) -> None:
    await publish(rig, SERVICE, QWEN)
    held = await rig.raw({**chat(), "model": "qwen"})
    await eventually(lambda: rig.control.workers[0].waiting == {"r1": 0, "qwen": 1})
    assert (rig.board.totals(0).waiting, rig.board.totals(1).waiting) == (0, 1)
    await held.close()
    await eventually(lambda: rig.board.totals(1).waiting == 0)


def assert_not_found(answer: httpx.Response) -> None:
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
