"""SIGKILL of the gateway at any instant: the next one finds its local replicas, and can end them."""
from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from replicas.provisioners import TerminateError, folder
from replicas.provisioners.local import LocalProvisioner
from replicas.spec import Service

ID = "tiny-gw-0badcafe-1"

GATEWAY = """
import asyncio, os, signal, sys
from pathlib import Path
from replicas import spec
from replicas.provisioners.local import LocalProvisioner

async def main():
    provisioner = LocalProvisioner(Path(sys.argv[1]), "0badcafe")
    await provisioner.launch(sys.argv[2], spec.parse(sys.argv[3], "tiny.yaml"), {})
    print("launched", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

Local = Callable[..., LocalProvisioner]
Build = Callable[..., Service]
Running = Callable[[], dict[int, str]]
Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


async def test_the_next_gateway_sees_and_ends_the_replicas_of_a_killed_one(
    local: Local, service: Build, running: Running, tmp_path: Path
) -> None:
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, str(tmp_path), ID, service().text, stdout=subprocess.PIPE,
        cwd=Path(folder.__file__).parents[2],
    )
    said, _ = await gateway.communicate()
    assert (said, gateway.returncode) == (b"launched\n", -signal.SIGKILL)

    provisioner = local()
    instance = (await provisioner.instances())[ID]
    assert instance.alive
    assert instance.url
    await provisioner.launch(ID, service("touch $REPLICA_DIR/twice"), {})   # it is there: nothing to do
    assert (await provisioner.instances())[ID] == instance
    assert not (tmp_path / "replicas" / ID / "twice").exists()
    await provisioner.terminate(ID)
    assert running() == {}
    assert await provisioner.instances() == {}


def begin_launcher(directory: Path, run: str, *, order_cut: int | None = None) -> subprocess.Popen[bytes]:
    """A gateway's launch up to the moment when the launcher has its order, or the first bytes of it."""
    directory.mkdir(mode=0o700, parents=True)
    lock = folder.take_lock(directory)
    assert lock is not None
    order = json.dumps({
        "dir": str(directory), "lock_fd": lock, "shell": "/bin/bash", "setup": "", "run": run,
        "record": {"id": directory.name, "port": 1, "spec_hash": "", "launched_at": 0.0},
    }).encode()
    with open(directory / "output.log", "ab") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(folder.__file__).parent / "launcher.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pass_fds=(lock,),
            env=os.environ | {"REPLICA_DIR": str(directory)},
        )
    assert launcher.stdin
    launcher.stdin.write(order[:order_cut])
    launcher.stdin.flush()
    os.close(lock)   # as the kernel does for a gateway that dies here
    return launcher


def gateway_dies(launcher: subprocess.Popen[bytes]) -> None:
    assert launcher.stdin
    assert launcher.stdout
    launcher.stdout.close()   # nobody reads the launcher's answer
    launcher.stdin.close()
    launcher.wait()


async def test_a_gateway_killed_while_it_gives_the_order_leaves_no_process(
    local: Local, service: Build, running: Running, tmp_path: Path
) -> None:
    directory = tmp_path / "replicas" / ID
    launcher = begin_launcher(directory, "sleep 1000", order_cut=40)
    gateway_dies(launcher)
    assert running() == {}
    provisioner = local()
    assert await provisioner.instances() == {}
    await provisioner.launch(ID, service(), {})   # the row was saved first, so the next gateway launches it
    assert (await provisioner.instances())[ID].alive


async def test_a_gateway_killed_after_it_gave_the_order_leaves_a_replica_that_is_found(
    local: Local, running: Running, tmp_path: Path, eventually: Eventually
) -> None:
    gateway_dies(begin_launcher(tmp_path / "replicas" / ID, "sleep 1000"))
    provisioner = local()

    async def found() -> bool:
        return ID in await provisioner.instances()

    await eventually(found)
    assert (await provisioner.instances())[ID].alive
    await provisioner.terminate(ID)
    assert running() == {}


async def test_launch_and_terminate_wait_for_a_launcher_that_a_dead_gateway_began(
    local: Local, service: Build, running: Running, tmp_path: Path
) -> None:
    directory = tmp_path / "replicas" / ID
    launcher = begin_launcher(directory, "sleep 1000")   # has the lock, waits for the end of its order
    provisioner = local()
    launching = asyncio.create_task(provisioner.launch(ID, service("touch $REPLICA_DIR/twice"), {}))
    await asyncio.sleep(0.05)
    assert not launching.done()
    gateway_dies(launcher)
    await launching
    assert (await provisioner.instances())[ID].url == "http://127.0.0.1:1"
    assert not (directory / "twice").exists()

    other = tmp_path / "replicas" / "tiny-gw-0badcafe-2"
    launcher = begin_launcher(other, "sleep 1000")
    terminating = asyncio.create_task(provisioner.terminate(other.name))
    await asyncio.sleep(0.05)
    assert not terminating.done()
    gateway_dies(launcher)
    await terminating
    assert other.name not in await provisioner.instances()
    assert not [command for command in running().values() if "tiny-gw-0badcafe-2" in command]


async def test_terminate_does_not_claim_success_over_a_launcher_that_stands_still(
    local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "RECORD_SECONDS", 0.05)
    directory = tmp_path / "replicas" / ID
    directory.mkdir(parents=True)
    lock = folder.take_lock(directory)
    assert lock is not None
    with pytest.raises(TerminateError, match="has not recorded itself"):
        await local().terminate(ID)
    os.close(lock)
