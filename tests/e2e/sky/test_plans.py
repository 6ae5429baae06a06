"""Launch plans on a site that is full."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytestmark = pytest.mark.sky

NODES = int(os.environ.get("NODES", "8"))   # of the bed


@pytest.mark.alone   # while one waits for all nodes, Slurm starts nothing that was asked for later
def test_a_plan_without_capacity_is_given_up_with_skypilots_reason_and_the_next_one_answers(
    gateways: Callable[..., Any], site: Any, ask: Any, eventually: Any, lap: Any
) -> None:
    beats: list[str] = []
    with site.somebody_else(), ThreadPoolExecutor() as pool:
        gateway = gateways("plans", "--plan", f"H100:4x{NODES}", "--plan", "H100:4x1")
        asking = pool.submit(ask, gateway, beats=beats)
        (first,) = eventually(lambda: [r for r in gateway.replicas() if r["plan_place"] == "1/2"])
        (second,) = eventually(lambda: [r for r in gateway.replicas() if r["plan_place"] == "2/2"], 150)
        lap(f"{first['plan']}: given up")
        text, _ = asking.result()
        lap(f"{second['plan']}: answered")
        assert text.startswith("There are")
        assert (first["plan"], second["plan"]) == (f"H100:4x{NODES}", "H100:4x1")
        assert second["id"] == first["id"]
        assert second["attempt"] == 2
        (refused,) = [e for e in gateway.events() if e.get("code") == "no_capacity"]
        assert "Failed to acquire resources in main" in refused["reason"]   # main: Slurm's partition
        assert "plan=2/2 attempt=2 (H100:4x1)" in refused["reason"]
        told = gateway.logs(first["id"], "--provision")
        assert "did not get nodes allocated within 30 seconds. Last state: PENDING" in told
        places = [beat.split("plan=")[1].split()[0] for beat in beats if "plan=" in beat]
        assert list(dict.fromkeys(places)) == ["1/2", "2/2"], beats
        (ready,) = gateway.ready()
        assert (ready["id"], ready["plan"]) == (first["id"], "H100:4x1")
        assert site.clusters("plans") == [ready["id"]]
        assert len(site.nodes("plans")) == 1
        down = gateway.cli("down")
        assert down.returncode == 0, down.stderr
        lap("gateway down")
