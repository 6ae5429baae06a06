"""The admin port: what it answers, what it refuses, and to whom."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from gateway import statedir
from gateway.admin import Admin
from gateway.metrics import build_registry

if TYPE_CHECKING:
    from .conftest import AdminPort, FakeController

LIMITS = "/admin/services/svc/limits"


def client(admin: Admin, key: str | None = None, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(admin.app(key), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8001", headers=headers)


@pytest.fixture
async def http(admin: Admin) -> AsyncIterator[httpx.AsyncClient]:
    async with client(admin) as opened:
        yield opened


def write_log(home: Path, replica: str, text: str) -> Path:
    folder = home / "replicas" / replica
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.log").write_text(text)
    return folder / "output.log"


async def test_the_status_is_the_controllers_with_facts_of_the_gateway(http: httpx.AsyncClient) -> None:
    status = (await http.get("/admin/status")).json()
    assert (status["generation"], status["owner"]) == (7, "0a1b2c3d")
    assert status["services"][0]["replicas"][0]["phase"] == "load"
    assert status["gateway"] == {"version": "0", "down": None, "restart": None}


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({"min": 1, "max": 4}, ("set_limits", "svc", 1, 4)),
        ({"max": 4}, ("set_limits", "svc", None, 4)),
        ({"min": 2}, ("set_limits", "svc", 2, None)),
        ({"max": 0}, ("set_limits", "svc", None, 0)),
        ({"reset": True}, ("reset_limits", "svc")),
    ],
)
async def test_limits_change_and_the_service_is_answered(
    http: httpx.AsyncClient, controller: FakeController, body: dict[str, Any], call: tuple[Any, ...]
) -> None:
    answer = await http.put(LIMITS, json=body)
    assert answer.status_code == 200
    assert answer.json()["limits"] == controller.service["limits"]
    assert controller.calls == [call]


async def test_max_zero_pauses_whatever_the_minimum_was(
    http: httpx.AsyncClient, controller: FakeController
) -> None:
    controller.service["limits"] = {"min": 2, "max": 3, "override": True}
    assert (await http.put(LIMITS, json={"max": 0})).status_code == 200
    assert controller.calls == [("set_limits", "svc", None, 0)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"min": 3}, "min 3 is more than max 2: give max too"),
        ({"min": 3, "max": 1}, "min 3 is more than max 1"),
        ({"max": -1}, "from 0 to 64"),
        ({"max": 65}, "from 0 to 64"),
        ({"max": "2"}, "whole number"),
        ({"max": 1.5}, "whole number"),
        ({"max": True}, "whole number"),
        ({"max": None}, "whole number"),
        ({}, "give min, max or both"),
        ({"reset": True, "max": 1}, "reset goes alone"),
        ({"maximum": 1}, "allowed: min, max, reset"),
        ([1], "JSON object"),
    ],
)
async def test_limits_that_cannot_be_say_what_is_allowed(
    http: httpx.AsyncClient, controller: FakeController, body: Any, says: str
) -> None:
    answer = await http.put(LIMITS, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert controller.calls == []


async def test_errors_have_the_openai_shape_on_every_path(http: httpx.AsyncClient) -> None:
    for answer, status in [
        (await http.get("/admin/nothing"), 404),
        (await http.post("/admin/status"), 405),
        (await http.put("/admin/services/other/limits", json={"max": 1}), 404),
        (await http.post("/admin/services/other/retry"), 404),
        (await http.put(LIMITS, content=b"{broken"), 400),
        (await http.put(LIMITS, content=b" " * 70_000), 413),
    ]:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_fault_is_500_in_the_same_shape(http: httpx.AsyncClient, controller: FakeController) -> None:
    controller.broken = True
    answer = await http.get("/admin/status")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"


async def test_retry_reaches_the_controller(http: httpx.AsyncClient, controller: FakeController) -> None:
    assert (await http.post("/admin/services/svc/retry")).status_code == 200
    assert controller.calls == [("retry", "svc")]


async def test_the_bill_is_told_by_day_unless_asked_otherwise(
    http: httpx.AsyncClient, controller: FakeController
) -> None:
    bill = (await http.get("/admin/cost")).json()
    assert (bill["estimate"], bill["by"], bill["total"]) == (True, "day", 5.0)
    by_key = (await http.get("/admin/cost", params={"by": "key", "since": "2h"})).json()
    assert [(row["key"], row["dollars"]) for row in by_key["rows"]] == [("alice", 3.75)]
    assert controller.calls == [("cost", None, "day"), ("cost", "2h", "key")]
    for params, says in (({"by": "week"}, "day, replica, key"), ({"since": "soon"}, "neither a time ago")):
        answer = await http.get("/admin/cost", params=params)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]


async def test_down_answers_at_once_runs_once_and_its_end_is_known(
    http: httpx.AsyncClient, controller: FakeController, admin: Admin
) -> None:
    first = await http.post("/admin/down")
    assert first.status_code == 202
    assert first.json()["gateway"]["down"] == {"done": False, "error": None}
    await http.post("/admin/down")
    assert not admin.ended.is_set()
    controller.down_gate.set()
    await asyncio.wait_for(admin.ended.wait(), 5)
    assert controller.calls == [("down",)]
    assert (await http.get("/admin/status")).json()["gateway"]["down"]["done"]


async def test_a_restart_is_asked_of_the_supervisor_and_how_it_goes_is_in_the_status(
    controller: FakeController, tmp_path: Path
) -> None:
    asked: list[str] = []
    admin = Admin(
        controller,
        tmp_path,
        lambda status: build_registry(None, status),
        {},
        restart=lambda: asked.append("restart"),
    )
    transport = httpx.ASGITransport(app=admin.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.post("/admin/restart")
        assert (answer.status_code, answer.json()["gateway"]["restart"]) == (202, None)
        assert asked == ["restart"]
        going = {"number": 1, "state": "running", "message": ""}
        statedir.write_address(tmp_path, {"pid": os.getpid(), "restart": going})
        assert (await http.get("/admin/status")).json()["gateway"]["restart"] == going
        assert (await http.get("/admin/restart")).status_code == 405


async def test_a_failed_down_says_why_and_can_be_asked_again(
    http: httpx.AsyncClient, controller: FakeController, admin: Admin
) -> None:
    controller.down_error = RuntimeError("the cloud does not answer")
    controller.down_gate.set()
    await http.post("/admin/down")
    await asyncio.sleep(0)
    status = (await http.get("/admin/status")).json()
    assert status["gateway"]["down"] == {"done": False, "error": "the cloud does not answer"}
    controller.down_error = None
    await http.post("/admin/down")
    await asyncio.wait_for(admin.ended.wait(), 5)


async def test_logs_of_dead_replicas_are_there_and_ids_cannot_leave_the_folder(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    write_log(tmp_path, "svc-gw-0a1b2c3d-9", "one\ntwo\nthree\n")
    (tmp_path / "output.log").write_text("secret")
    logs = "/admin/replicas/svc-gw-0a1b2c3d-9/logs"
    assert (await http.get(logs)).text == "one\ntwo\nthree\n"
    assert (await http.get(logs, params={"tail": 2})).text == "two\nthree\n"
    assert (await http.get(logs, params={"tail": 0})).text == ""
    assert (await http.get(logs, params={"tail": "x"})).status_code == 400
    for path in ("..", "%2e%2e", "..%2f..", "svc-gw-0a1b2c3d-1", "%00", "a%2Fb"):
        assert (await http.get(f"/admin/replicas/{path}/logs")).status_code == 404, path


TWO_RANKS = "".join(
    f"(head, rank=0, pid=5) zero {n}\n(worker1, rank=1, pid=6, ip=10.0.0.12) one {n}\n" for n in range(9)
)


async def test_logs_of_one_rank_and_of_the_provisioning_are_asked_for_by_name(
    http: httpx.AsyncClient, tmp_path: Path
) -> None:
    folder = write_log(tmp_path, "svc-gw-0a1b2c3d-9", TWO_RANKS).parent
    logs = "/admin/replicas/svc-gw-0a1b2c3d-9/logs"

    async def ask(**params: str) -> tuple[int, str]:
        answer = await http.get(logs, params=params)
        refused = answer.status_code >= 400
        return answer.status_code, answer.json()["error"]["message"] if refused else answer.text

    one = "(worker1, rank=1, pid=6, ip=10.0.0.12) one 8\n"
    assert await ask(rank="1", tail="1") == (200, one)
    status, message = await ask(rank="2")
    assert (status, message) == (
        404, "svc-gw-0a1b2c3d-9 has printed nothing as rank 2: its ranks are 0, 1",
    )  # fmt: skip
    status, message = await ask(provision="1")
    assert status == 404
    assert "has no provision.log: SkyPilot writes one some seconds after a launch has begun" in message
    (folder / "provision.log").write_text("head\n")
    (folder / "provision-1.log").write_text("worker\n")
    assert await ask(provision="1") == (200, "head\n")
    assert await ask(provision="1", rank="1") == (200, "worker\n")
    (folder / "rank-1.log").write_text("saved before its end\n")
    assert await ask(rank="1") == (200, "saved before its end\n")
    answer = await http.get("/admin/replicas/svc-gw-0a1b2c3d-7/logs")
    assert answer.json()["error"]["message"].endswith("'svc-gw-0a1b2c3d-7': there is svc-gw-0a1b2c3d-9")


async def test_one_rank_is_followed_though_the_other_prints_too(
    port: AdminPort, controller: FakeController, tmp_path: Path
) -> None:
    path = write_log(tmp_path, "svc-gw-0a1b2c3d-1", TWO_RANKS)
    url = f"{port.url}/admin/replicas/svc-gw-0a1b2c3d-1/logs"
    params = {"follow": "1", "rank": "1", "tail": "1"}
    async with httpx.AsyncClient() as http, http.stream("GET", url, params=params) as answer:
        chunks = answer.aiter_text()
        assert (await anext(chunks)).endswith("one 8\n")
        with path.open("a") as file:
            file.write("(head, rank=0, pid=5) zero 9\n(worker1, rank=1, pid=6) o")
            file.flush()
            file.write("ne 9\n(head, rank=0, pid=5) zero 10\n")
        assert await anext(chunks) == "(worker1, rank=1, pid=6) one 9\n"
        controller.service["replicas"] = []
        assert [chunk async for chunk in chunks] == []


async def test_replicas_with_output_are_listed_dead_ones_too(http: httpx.AsyncClient, tmp_path: Path) -> None:
    write_log(tmp_path, "svc-gw-0a1b2c3d-0", "x\n")
    write_log(tmp_path, "svc-gw-0a1b2c3d-1", "yy\n")
    listed = (await http.get("/admin/replicas")).json()
    assert {r["id"]: (r["bytes"], r["live"]) for r in listed} == {
        "svc-gw-0a1b2c3d-0": (2, False),
        "svc-gw-0a1b2c3d-1": (3, True),
    }


async def test_followed_logs_go_on_until_the_replica_is_gone(
    port: AdminPort, controller: FakeController, tmp_path: Path
) -> None:
    path = write_log(tmp_path, "svc-gw-0a1b2c3d-1", "one\n")
    url = f"{port.url}/admin/replicas/svc-gw-0a1b2c3d-1/logs"
    async with httpx.AsyncClient() as http, http.stream("GET", url, params={"follow": "1"}) as answer:
        chunks = answer.aiter_text()
        assert await anext(chunks) == "one\n"
        with path.open("a") as file:
            file.write("two\n")
        assert await anext(chunks) == "two\n"
        controller.service["replicas"] = []
        assert [chunk async for chunk in chunks] == []


async def test_events_are_streamed_as_they_come(port: AdminPort) -> None:
    async with httpx.AsyncClient() as http, http.stream("GET", f"{port.url}/admin/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("data:"):
                assert line == 'data: {"type": "decision", "reason": "first"}'
                break


async def test_metrics_show_the_status_of_now(http: httpx.AsyncClient, controller: FakeController) -> None:
    controller.service["replicas"][0]["generation_tokens_per_second"] = 11.5
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'gateway_waiting{service="svc"} 3.0' in answer.text
    assert 'gateway_cost_dollars_total{service="svc"} 1.25' in answer.text
    speed = 'gateway_replica_generation_tokens_per_second{replica="svc-gw-0a1b2c3d-1",service="svc"} 11.5'
    assert speed in answer.text


async def test_the_page_needs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.status_code == 200
    assert "/admin/status" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


async def test_with_a_key_only_its_holder_reads_or_changes_anything(admin: Admin) -> None:
    async with client(admin, "admin-secret") as http:
        for path in ("/admin/status", "/metrics", "/admin/events", "/admin/replicas"):
            assert (await http.get(path)).status_code == 401, path
        for given in ("Bearer wrong", "Basic admin-secret", "Bearer", "Bearer admin-secre\u00e9"):
            headers = {"Authorization": given.encode("latin-1")}
            assert (await http.get("/admin/status", headers=headers)).status_code == 401  # type: ignore[arg-type]
        good = {"Authorization": "Bearer admin-secret"}
        assert (await http.get("/admin/status", headers=good)).status_code == 200
        assert (await http.get("/")).status_code == 200
        assert (await http.get("/health")).status_code == 200


async def test_a_web_page_of_another_origin_can_neither_change_nor_read(admin: Admin) -> None:
    async with client(admin) as http:
        foreign = {"Origin": "http://evil.example"}
        assert (await http.post("/admin/down", headers=foreign)).status_code == 403
        ours = {"Origin": "http://127.0.0.1:8001"}
        assert (await http.post("/admin/services/svc/retry", headers=ours)).status_code == 200
        for host, status in [("evil.example:8001", 403), ("localhost:8001", 200), ("[::1]:8001", 200)]:
            assert (await http.get("/admin/status", headers={"Host": host})).status_code == status
