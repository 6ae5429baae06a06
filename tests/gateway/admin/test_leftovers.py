"""`gateway down` without a gateway: what a killed one left behind is ended, and nothing else."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from gateway import statedir
from gateway.assembly import TABLE_FILE, end_leftovers
from replicas import lifecycle, spec
from replicas.lifecycle import Event
from replicas.provisioners.local import LocalProvisioner
from replicas.table import Table

YAML = """
name: tiny
run: echo model --model-path org/tiny; exec sleep 300
service: {readiness_probe: /health, replicas: 1, ports: 8080}
"""


def leave_a_replica(home: Path) -> str:
    """What a gateway looks like from the disk after kill -9: a row, a process, and how it was started."""
    service = spec.parse(YAML, "tiny.yaml")
    home.mkdir()
    with Table(home / TABLE_FILE) as table:
        n = table.next_n(service.name)
        id = f"{service.name}-gw-{table.owner}-{n}"
        facts = {"spec_hash": service.hash, "spec_text": service.text, "now": time.time(), "reason": "a test"}
        row = lifecycle.advance(lifecycle.new(id, service.name, n, 0, **facts), Event.LAUNCH, time.time())
        table.save([row])
        owner = table.owner
    statedir.write_address(home, {"pid": 0, "last": {"provisioner": "local", "replica": []}})

    async def launch() -> None:
        local = LocalProvisioner(home, owner)
        await local.launch(id, service, {})
        assert (await local.instances())[id].alive
        await local.close()

    asyncio.run(launch())
    return id


def test_replicas_of_a_killed_gateway_are_ended_and_verified(tmp_path: Path) -> None:
    home = tmp_path / "state"
    id = leave_a_replica(home)
    assert end_leftovers(home) == 1
    with Table(home / TABLE_FILE) as table:
        assert table.replicas() == []
        left = asyncio.run(LocalProvisioner(home, table.owner).instances())
    assert id not in left
    assert end_leftovers(home) == 0


def test_a_gateway_that_runs_is_not_disturbed(tmp_path: Path) -> None:
    with Table(tmp_path / TABLE_FILE):
        pass
    held = statedir.lock(tmp_path)
    with pytest.raises(statedir.StateDirBusy):
        end_leftovers(tmp_path)
    os.close(held)


def test_a_folder_that_never_was_a_state_dir_stays_untouched(tmp_path: Path) -> None:
    assert end_leftovers(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
