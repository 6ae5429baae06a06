"""`gateway down`: progress, a limit that names what is left, and the replicas of a dead gateway."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from gateway import cli, orphans, statedir
from gateway.assembly import TABLE_FILE
from gateway.settings import SETTINGS
from replicas.provisioners import Instance, InstancesUnknown, Other, TerminateError
from replicas.table import Table

if TYPE_CHECKING:
    from .conftest import AdminPort, FakeController

Invoke = Callable[..., Result]
OWNER = "deadbeef"
ONE, TWO = f"r1-gw-{OWNER}-1", f"r1-gw-{OWNER}-2"
ALIVE = "r1-gw-0a1b2c3d-9"


@dataclass
class Machines:
    """A provisioner: what exists, and which of it does not go."""

    machines: dict[str, Other]
    stuck: set[str] = field(default_factory=set)
    lingers: set[str] = field(default_factory=set)
    unknown: bool = False
    ended: list[str] = field(default_factory=list)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    looked_as: list[str] = field(default_factory=list)

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        if self.unknown:
            raise InstancesUnknown("SkyPilot does not say what exists")
        self.looked_as.append(self.asked[0][1])
        return {}

    async def others(self, services: Collection[str]) -> list[Other]:
        return list(self.machines.values())

    async def terminate(self, id: str) -> None:
        self.ended.append(id)
        if id in self.stuck:
            raise TerminateError(f"{id} is not verified gone: the cloud does not answer")
        if id not in self.lingers:
            self.machines.pop(id)

    async def close(self) -> None: ...


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> Machines:
    found = Machines(
        {
            ONE: Other(ONE, "UP", 59.5),
            TWO: Other(TWO, "INIT"),
            ALIVE: Other(ALIVE, "UP", 1.0),
            "r1-A100": Other("r1-A100", "UP", 1.0),
        }
    )

    def make(name: str, folder: Path, owner: str) -> Machines:
        found.asked.append((name, owner))
        return found

    monkeypatch.setattr(orphans, "make_provisioner", make)
    monkeypatch.setattr(orphans, "POLL_SECONDS", 0.01)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, home: Path) -> Invoke:
    for row in SETTINGS:
        monkeypatch.delenv(row.env, raising=False)
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(home))
    monkeypatch.delenv("GATEWAY_ADMIN_URL", raising=False)
    return lambda *words, **more: CliRunner().invoke(cli.main, list(words), **more)


def test_orphans_are_listed_with_prices_and_ended_only_after_a_yes(sky: Machines, invoke: Invoke) -> None:
    result = invoke("down", "--orphans", OWNER, input="n\n")
    assert (result.exit_code, sky.ended) == (1, [])
    for words in (f"{ONE}  UP  $59.50 an hour", f"{TWO}  INIT  price unknown", "elsewhere"):
        assert words in result.output, words
    assert "End 2 ($59.50 an hour)? [y/N]" in result.output
    assert "0a1b2c3d" not in result.output
    assert "A100" not in result.output

    result = invoke("down", "--orphans", OWNER, input="y\n")
    assert result.exit_code == 0, result.output
    assert sorted(sky.ended) == [ONE, TWO]
    assert "2 ended, verified: skypilot has no replica of deadbeef" in result.output
    assert set(sky.machines) == {ALIVE, "r1-A100"}
    assert set(sky.asked) == {("skypilot", orphans.NOBODY), ("skypilot", OWNER)}
    assert set(sky.looked_as) == {orphans.NOBODY}, "whoever looks as an owner cares for its replicas"


def test_without_a_terminal_it_ends_nothing_unless_told_yes(sky: Machines, invoke: Invoke) -> None:
    assert invoke("down", "--orphans", OWNER).exit_code == 1
    assert sky.ended == []
    assert invoke("down", "--orphans", ONE, "--yes").exit_code == 0, "the name of one replica says the owner"
    assert sorted(sky.ended) == [ONE, TWO]


def test_orphans_that_do_not_go_are_named_with_the_reason(sky: Machines, invoke: Invoke) -> None:
    sky.stuck = {TWO}
    result = invoke("down", "--orphans", OWNER, "--yes")
    assert result.exit_code == 1
    assert f"billing on: {TWO}" in result.output
    assert "the cloud does not answer. Give the same command again" in result.output
    assert f"{ONE} is gone" in result.output
    sky.stuck, sky.lingers = set(), {TWO}
    result = invoke("down", "--orphans", OWNER, "--yes")
    assert (result.exit_code, f"billing on: {TWO}: still listed" in result.output) == (1, True)


def test_nothing_to_end_says_whose_replicas_there_are(sky: Machines, invoke: Invoke) -> None:
    del sky.machines[ONE], sky.machines[TWO]
    result = invoke("down", "--orphans", OWNER)
    assert result.exit_code == 0
    assert "nothing to end; replicas of other gateways there are of 0a1b2c3d (1)" in result.output


def test_nothing_is_ended_while_nobody_can_say_what_exists(sky: Machines, invoke: Invoke) -> None:
    sky.unknown = True
    result = invoke("down", "--orphans", OWNER, "--yes")
    assert (result.exit_code, sky.ended) == (1, [])
    assert "SkyPilot does not say what exists" in result.output


@pytest.mark.parametrize("wrong", ["r1", "DEADBEEF", "deadbeef1", "r1-A100", ""])
def test_what_is_no_owner_is_refused(sky: Machines, invoke: Invoke, wrong: str) -> None:
    result = invoke("down", "--orphans", wrong, "--yes")
    assert (result.exit_code, sky.asked) == (1, [])
    assert "8 hex digits" in result.output


def test_our_own_replicas_are_no_orphans(sky: Machines, invoke: Invoke, home: Path) -> None:
    home.mkdir()
    with Table(home / TABLE_FILE) as table:
        owner = table.owner
    result = invoke("down", "--orphans", owner, "--yes")
    assert (result.exit_code, sky.asked) == (1, [])
    assert f"`gateway down --state-dir {home}` ends its replicas" in result.output


def test_those_of_a_gateway_that_lives_on_this_machine_are_no_orphans(
    sky: Machines, invoke: Invoke, tmp_path: Path
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("other gateways are found through /proc")
    other = tmp_path / "other"
    held = statedir.lock(other)
    try:
        with Table(other / TABLE_FILE) as table:
            owner = table.owner
        assert other in statedir.running()
        result = invoke("down", "--orphans", owner, "--yes")
        assert (result.exit_code, sky.asked) == (1, [])
        assert f"`gateway down --state-dir {other}`" in result.output
    finally:
        os.close(held)
    assert other not in statedir.running()


def test_its_flags_go_with_orphans_alone(invoke: Invoke) -> None:
    assert invoke("down", "--yes").exit_code == 2
    assert invoke("down", "--timeout", "soon").exit_code == 2


def test_a_person_who_stops_waiting_is_told_how_to_go_on(
    invoke: Invoke, port: AdminPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    watch = SimpleNamespace(monotonic=time.monotonic, sleep=interrupted)  # no other thread's sleep
    monkeypatch.setattr("gateway.ending.time", watch)
    result = invoke("down", env={"GATEWAY_ADMIN_URL": port.url})
    assert result.exit_code == 1
    assert "`gateway down` again goes on from here" in result.output


def test_down_gives_up_waiting_and_names_what_is_left(
    invoke: Invoke, port: AdminPort, controller: FakeController
) -> None:
    controller.service["replicas"][0] |= {"state": "terminating", "end_failures": 3, "reason": "no answer"}
    result = invoke("down", "--timeout", "1", env={"GATEWAY_ADMIN_URL": port.url})
    assert result.exit_code == 1
    assert "ending svc-gw-0a1b2c3d-1: terminating (no answer)" in result.output
    assert "billing on: svc-gw-0a1b2c3d-1: terminating (no answer). The gateway goes on" in result.output
