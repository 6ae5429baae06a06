"""A service to launch, a look at the processes that are really there, and a SkyPilot in memory."""
from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replicas import spec
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.local import LocalProvisioner
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

from .fake_sky import FakeSky
from .owner import OWNER


@pytest.fixture
def owner() -> str:
    return OWNER


@pytest.fixture
def service() -> Callable[..., Service]:
    """Builds a service whose replica runs these scripts; by default one that sleeps until it is ended."""

    def build(
        run: str = "exec sleep 1000", setup: str = "", more: str = "", resources: str = "{ports: 30000}"
    ) -> Service:
        script = "\n".join(f"  {line}" for line in f"# --port 30000\n{run}".splitlines())
        text = (
            f"resources: {resources}\n"
            "service:\n"
            "  readiness_probe: /health\n"
            "  replica_policy: {min_replicas: 0, max_replicas: 2}\n"
            f"{more}\n"
            f"run: |\n{script}\n"
        )
        if setup:
            text += "setup: |\n" + "\n".join(f"  {line}" for line in setup.splitlines()) + "\n"
        return spec.parse(text, "tiny.yaml")

    return build


def commands_under(folder: Path) -> dict[int, str]:
    """pid -> command line of every process whose REPLICA_DIR is in the folder (Linux: by /proc)."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if b"REPLICA_DIR=" + os.fsencode(folder) in Path(f"/proc/{name}/environ").read_bytes():
                    found[int(name)] = Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[[], dict[int, str]]]:
    """What runs for the replicas of this test, by the kernel's word. Nothing may be left at its end."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("looks at processes through /proc")
    yield lambda: commands_under(tmp_path)
    left = commands_under(tmp_path)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == {}


@pytest.fixture
async def local(tmp_path: Path, running: object) -> AsyncIterator[Callable[..., LocalProvisioner]]:
    """Builds local provisioners on this test's state folder; at the end all their replicas are terminated."""
    made: dict[str, list[LocalProvisioner]] = {}

    def build(owner: str = OWNER, *, grace: float = 5.0, price: float | None = None) -> LocalProvisioner:
        provisioner = LocalProvisioner(tmp_path, owner, grace=grace, price=price)
        made.setdefault(owner, []).append(provisioner)
        return provisioner

    yield build
    for owner in list(made):
        last = build(owner)
        for replica_id in await last.instances():
            await last.terminate(replica_id)
        for provisioner in made[owner]:
            await provisioner.close()


@pytest.fixture
def eventually(
    request: pytest.FixtureRequest,
) -> Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]:
    """Waits for something that a real process does in its own time; 20 s is for a very busy machine."""
    limit = 120 if request.node.get_closest_marker("sky") else 20

    async def wait(condition: Callable[[], Awaitable[object]]) -> None:
        deadline = time.monotonic() + limit
        while not await condition():
            assert time.monotonic() < deadline, f"did not happen within {limit} s"
            await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def fake_sky(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSky]:
    monkeypatch.setattr("replicas.provisioners.attendant.PAUSE_SECONDS", 0.01)
    fake = FakeSky()
    yield fake
    fake.clusters.clear()
    fake.closing.set()
    fake.may_finish.set()
    fake.submitting.set()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith(("attendant", "skypilot")):
            if isinstance(thread, Attendant):
                thread.stop()
            thread.join(10)


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def skypilot(fake_sky: FakeSky, tmp_path: Path, clock: Clock) -> Callable[..., SkyPilotProvisioner]:
    """Builds SkyPilot provisioners over one fake SkyPilot."""

    def build(owner: str = OWNER) -> SkyPilotProvisioner:
        return SkyPilotProvisioner(tmp_path, owner, sky=lambda: fake_sky, clock=clock, sleep=clock.sleep)

    return build


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Callable[..., SkyPilotProvisioner]]:
    """Builds provisioners over the real SkyPilot of tests/e2e/sky; at the end all their clusters are gone."""
    if "SKYGATE_BED" not in os.environ:
        pytest.fail("needs the bed: `make test-sky`")
    made: dict[str, list[SkyPilotProvisioner]] = {}

    def build(owner: str = OWNER) -> SkyPilotProvisioner:
        made.setdefault(owner, []).append(SkyPilotProvisioner(tmp_path, owner))
        return made[owner][-1]

    yield build
    for owner in list(made):
        last = build(owner)
        await asyncio.gather(*(last.terminate(replica) for replica in await last.instances()))
        assert await last.instances() == {}
