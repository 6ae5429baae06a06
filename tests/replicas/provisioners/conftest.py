"""A service to launch, and a look at the processes that are really there."""
from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from replicas import spec
from replicas.provisioners.local import LocalProvisioner
from replicas.spec import Service

OWNER = "0badcafe"


@pytest.fixture
def owner() -> str:
    return OWNER


@pytest.fixture
def service() -> Callable[..., Service]:
    """Builds a service whose replica runs these scripts; by default one that sleeps until it is ended."""

    def build(run: str = "exec sleep 1000", setup: str = "", more: str = "") -> Service:
        script = "\n".join(f"  {line}" for line in f"# --port 30000\n{run}".splitlines())
        text = (
            "resources: {ports: 30000}\n"
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
    made: list[LocalProvisioner] = []

    def build(owner: str = OWNER, *, grace: float = 5.0, price: float | None = None) -> LocalProvisioner:
        made.append(LocalProvisioner(tmp_path, owner, grace=grace, price=price))
        return made[-1]

    yield build
    for provisioner in made:
        for replica_id in await provisioner.instances():
            await provisioner.terminate(replica_id)
        await provisioner.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]:
    """Waits for something that a real process does in its own time; 20 s is for a very busy machine."""

    async def wait(condition: Callable[[], Awaitable[object]]) -> None:
        deadline = time.monotonic() + 20
        while not await condition():
            assert time.monotonic() < deadline, "did not happen within 20 s"
            await asyncio.sleep(0.01)

    return wait

