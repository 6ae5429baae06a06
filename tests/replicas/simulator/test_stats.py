"""The proof that nothing ran twice: GET /sim/stats, and the same in-process."""

from __future__ import annotations

import json

from replicas.simulator import SimConfig, Simulator


def test_a_simulator_can_be_made_before_there_is_a_loop():
    assert repr(Simulator()).startswith("<Simulator http://127.0.0.1:0 ")


async def test_each_run_is_counted_by_rid_and_by_the_clients_marker(get, chat, body):
    async with Simulator() as sim:
        await chat(sim.port, max_tokens=1, rid="r1", user="alice")
        for _ in range(2):
            await get(sim.port, "POST", "/v1/chat/completions", body(max_tokens=2), x_request_id="q-7")
        await chat(sim.port, temperature=-1)
        stats = (await get(sim.port, "GET", "/sim/stats")).json
    assert stats["requests"]["r1"] == 1
    assert stats["markers"] == {"alice": 1, "q-7": 2}
    assert stats["runs_total"] == 3
    assert stats == json.loads(json.dumps(sim.stats.to_json()))


async def test_the_log_tells_when_each_request_came_and_went(chat):
    async with Simulator() as sim:
        await chat(sim.port, max_tokens=3, stream=True, rid="r1")
    (entry,) = sim.stats.log
    assert entry["arrived_ns"] < entry["first_ns"] < entry["finished_ns"]
    assert (entry["rid"], entry["tokens"], entry["stream"], entry["end"]) == ("r1", 3, True, "complete")
    assert entry["prompt_tokens"] == 11


async def test_the_same_seed_jitters_alike(chat):
    draws = []
    for seed in (1, 1, 2):
        async with Simulator(SimConfig(jitter=0.5, seed=seed, speedup=100)) as sim:
            assert (await chat(sim.port, max_tokens=5)).status == 200
            draws.append(sim.runner.draw())
    assert draws[0] == draws[1] != draws[2]
