"""What `gateway status` shows of SkyPilot: its API server, and when each replica would end itself."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from gateway.display import status_view

REPLICA = {"id": "r1-gw-0badcafe-1", "state": "ready", "in_flight": 0, "hourly_cost": 60.0, "reason": ""}
SERVER = "SkyPilot API server http://127.0.0.1:46580, version 0.14.1"


def shown(provisioner: str, *replicas: dict[str, Any], says: str | None = None) -> str:
    service = {
        "name": "r1",
        "model": "m",
        "limits": {"min": 0, "max": 2},
        "target": {"replicas": 1},
        "demand": {"waiting": 0, "in_flight": 0},
        "cost": {"hourly": 60.0, "total": 1.0},
        "replicas": [REPLICA | replica for replica in replicas],
    }
    status = {
        "gateway": {"provisioner": provisioner},
        "provisioner": {"says": says, "trouble": False},
        "services": [service],
    }
    console = Console(width=160)
    with console.capture() as capture:
        console.print(status_view(status, now=0.0))
    return capture.get()


def test_the_api_server_is_the_first_line() -> None:
    assert shown("skypilot", {}, says=SERVER).splitlines()[0].strip() == SERVER


def test_each_replica_of_a_cloud_shows_when_it_would_end_itself_or_that_it_would_not() -> None:
    text = shown("skypilot", {"dead_man_seconds": 4980.0}, {"dead_man_seconds": None})
    assert "dead-man" in text
    first, second = (line for line in text.splitlines() if "r1-gw" in line)
    assert "in 83 min" in first
    assert "none" in second


def test_replicas_of_this_machine_have_no_such_column() -> None:
    assert "dead-man" not in shown("local", {"dead_man_seconds": None})
