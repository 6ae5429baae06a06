"""`gateway down` without a gateway: what a killed one left behind is ended, and nothing else."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway import cli, statedir
from gateway.assembly import TABLE_FILE, Elsewhere, claim, end_leftovers
from gateway.progress import NotEnded
from replicas import lifecycle, spec
from replicas.lifecycle import Event, State
from replicas.provisioners import InstancesUnknown
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


def test_a_yaml_that_cannot_be_read_any_more_keeps_no_machine_running(tmp_path: Path) -> None:
    home = tmp_path / "state"
    leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        table.save([replace(row, spec_text="service: [") for row in table.replicas()])
    assert end_leftovers(home) == 1


def test_a_machine_whose_row_is_gone_is_ended_too(tmp_path: Path) -> None:
    home = tmp_path / "state"
    id = leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        table.save([replace(row, state=State.GONE) for row in table.replicas()])
    said: list[str] = []
    assert end_leftovers(home, said.append) == 1
    assert said[0] == f"ending {id}"
    assert end_leftovers(home, said.append) == 0


def test_nothing_is_verified_while_nobody_can_say_what_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are gone, and what may be left without one bills on."""
    home = tmp_path / "state"
    leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        table.save([replace(row, state=State.GONE) for row in table.replicas()])

    async def unknown(*_: object) -> None:
        raise InstancesUnknown("the API server does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(LocalProvisioner, "instances", unknown)
        with pytest.raises(NotEnded, match="the API server does not answer"):
            end_leftovers(home, limit=0.3)
    assert end_leftovers(home) == 1


def test_the_table_knows_best_who_has_to_end_them(tmp_path: Path) -> None:
    home = tmp_path / "state"
    leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        claim(table, "local")
    statedir.write_address(home, {"last": {"provisioner": "static", "replica": ["http://127.0.0.1:9"]}})
    assert end_leftovers(home) == 1


def test_replicas_that_this_start_could_not_end_are_not_taken_over(tmp_path: Path) -> None:
    home = tmp_path / "state"
    id = leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        table.provisioner = "skypilot"
        with pytest.raises(Elsewhere, match=f"replicas of skypilot are left .*: {id}"):
            claim(table, None)
        assert table.provisioner == "skypilot"
        claim(table, "skypilot")
        table.provisioner = "static"  # somebody else's servers: let go
        claim(table, "local")
        table.save([replace(row, state=State.GONE) for row in table.replicas()])
        claim(table, "skypilot")
        assert table.provisioner == "skypilot"
        table.save([replace(row, state=State.TERMINATING) for row in table.replicas(gone=True)])
        table.provisioner = "local"
    assert end_leftovers(home) == 1


def up(home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "up", f"--state-dir={home}", "--port=0", "--admin-port=0"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)


def test_up_says_in_one_line_what_stands_in_the_way(tmp_path: Path) -> None:
    home = tmp_path / "state"
    leave_a_replica(home)
    with Table(home / TABLE_FILE) as table:
        table.provisioner = "skypilot"
    started = up(home)
    assert started.returncode == 1
    assert started.stderr.count("replicas of skypilot are left") == 1
    assert "Traceback" not in started.stderr
    with Table(home / TABLE_FILE) as table:
        table.provisioner = "local"
    assert end_leftovers(home) == 1


def test_up_and_down_on_a_damaged_table_say_so_once_and_touch_nothing(tmp_path: Path) -> None:
    (tmp_path / TABLE_FILE).write_bytes(b"no database" * 100)
    started = up(tmp_path)
    assert (started.returncode, started.stderr.count("is not a SQLite database")) == (1, 1)
    assert "Traceback" not in started.stderr
    done = CliRunner().invoke(cli.main, ["down", f"--state-dir={tmp_path}"])
    assert done.exit_code == 1
    assert "is not a SQLite database" in done.output
    assert (tmp_path / TABLE_FILE).read_bytes() == b"no database" * 100


def test_a_gateway_that_runs_is_not_disturbed(tmp_path: Path) -> None:
    with Table(tmp_path / TABLE_FILE):
        pass
    held = statedir.lock(tmp_path)
    with pytest.raises(statedir.StateDirBusy):
        end_leftovers(tmp_path)
    os.close(held)


def test_a_copy_of_a_state_dir_cannot_end_the_replicas_of_the_original(tmp_path: Path) -> None:
    home, copy, moved = tmp_path / "state", tmp_path / "copy", tmp_path / "moved"
    leave_a_replica(home)
    shutil.copytree(home, copy)
    with pytest.raises(statedir.StateDirBusy, match="is a copy of"):
        end_leftovers(copy)
    started = up(copy)
    assert (started.returncode, started.stderr.count("is a copy of")) == (1, 1)
    home.rename(moved)
    assert end_leftovers(moved) == 1
    assert end_leftovers(copy) == 1  # the original is gone: this is a restored one


def test_a_folder_that_never_was_a_state_dir_stays_untouched(tmp_path: Path) -> None:
    assert end_leftovers(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
