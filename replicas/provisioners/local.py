"""Replicas as processes of this machine: the YAML's `setup` and `run`, with SkyPilot's variables.

Everything about a replica is in `<state>/replicas/<id>/`: `process.json` while it may be alive, `exit.json`
once it ended by itself, `output.log` for good. No process of ours needs to live for a replica to live on; the
next gateway finds it by that folder (launcher.py says why none can be missed).
"""
from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from replicas.plans import Plan
from replicas.provisioners import (
    YAML_DECIDES,
    Instance,
    LaunchError,
    Other,
    TerminateError,
    concerns,
    folder,
    launcher,
    owned_by,
    processes,
)
from replicas.provisioners.environment import (
    environment,
    inherited_secrets,
    secret_values,
    working_directory,
)

if TYPE_CHECKING:
    from replicas.spec import Service

T = TypeVar("T")

_PORTS = range(20_000, 30_000)
"""Below the ports that Linux (32768) and macOS (49152) give to outgoing connections: one of those could take
the port between now and the minute in which the server has loaded and listens."""


class LocalProvisioner:
    """Provisioner of processes.

    `price`: dollars per hour to show for a replica. `grace`: seconds from SIGTERM to SIGKILL.
    """

    def __init__(
        self, state_dir: Path, owner: str, *, price: float | None = None, grace: float = 10.0
    ) -> None:
        self._root = Path(state_dir).resolve() / "replicas"
        self._owner = owner
        self._price = price
        self._grace = grace
        # Ending a replica keeps a thread for up to the grace; `instances` must not queue behind that.
        self._threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="local-replica")
        # Mutable under the lock of the id: a launch that comes after its terminate must not start anything.
        self._locks: dict[str, threading.Lock] = {}
        self._ended: set[str] = set()
        # Mutable by `instances` alone, one at a time: how far each output was read.
        self._looking = threading.Lock()
        self._outputs: dict[str, folder.Output] = {}

    def __repr__(self) -> str:
        return f"<LocalProvisioner {self._root} owner={self._owner}>"

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """See Provisioner. Returns some 50 ms later, when the launcher has recorded itself. The hardware is
        this machine, whatever the plan says."""
        variables = {**plan.envs, **plan.secrets, **env}
        secrets = [*secret_values(service, env, plan), *inherited_secrets()]
        await self._in_thread(lambda: self._launch(replica_id, service, variables, secrets))

    async def terminate(self, replica_id: str) -> None:
        """See Provisioner. Ends every process of the replica, those that left its process group included."""
        await self._in_thread(lambda: self._terminate(replica_id))

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        """See Provisioner."""
        return await self._in_thread(self._instances)

    async def others(self, services: Collection[str]) -> list[Other]:
        """See Provisioner: what a gateway left that owned this state dir when it had another state.db."""
        found = await self._in_thread(lambda: self._recorded(ours=False))
        running = [path.name for path, r in found if processes.is_running(r["pid"], r["started"])]
        return [Other(name, "running", self._price) for name in running if concerns(name, services)]

    async def close(self) -> None:
        """See Provisioner."""
        self._threads.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _lock(self, replica_id: str) -> threading.Lock:
        return self._locks.setdefault(replica_id, threading.Lock())

    def _launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], secrets: list[str]
    ) -> None:
        if not owned_by(replica_id, self._owner):
            raise LaunchError(f"{replica_id} is not a name of this gateway (owner {self._owner})")
        with self._lock(replica_id):
            if replica_id in self._ended:
                raise LaunchError(f"{replica_id} was terminated before it was launched", permanent=False)
            directory = self._root / replica_id
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.record(directory) is not None:
                return
            lock = folder.take_lock(directory)
            if lock is None:   # started just now by a gateway that has died since
                try:
                    if folder.await_record(directory):
                        return
                except TimeoutError as error:
                    raise LaunchError(str(error), permanent=False) from None
                raise LaunchError(f"{replica_id}: its launcher ended at once", permanent=False)
            try:
                self._start(replica_id, directory, service, env, lock, secrets)
            finally:
                os.close(lock)

    def _start(
        self,
        replica_id: str,
        directory: Path,
        service: Service,
        env: Mapping[str, str],
        lock: int,
        secrets: list[str],
    ) -> None:
        shell = shutil.which("bash")
        if shell is None:
            raise LaunchError("there is no bash on this machine; setup and run are bash scripts")
        port = self._free_port()
        order = {
            "dir": str(directory),
            "lock_fd": lock,
            "shell": shell,
            "setup": service.setup or "",
            "run": service.run or "",
            "secrets": secrets,
            "record": {
                "id": replica_id, "port": port, "spec_hash": service.hash, "launched_at": time.time()
            },
        }
        log = os.open(directory / launcher.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", launcher.__file__],
                input=json.dumps(order).encode(),
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(replica_id, service, port, directory) | dict(env),
                cwd=working_directory(service, directory),
                pass_fds=(lock,),
                timeout=folder.RECORD_SECONDS,
                check=False,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise LaunchError(f"cannot start a process on this machine: {error}", permanent=False) from error
        finally:
            os.close(log)
        if done.stdout != b"ok":
            said = done.stdout.decode(errors="replace") or folder.last_words(directory)
            raise LaunchError(f"cannot start a process on this machine: {said}", permanent=False)

    def _free_port(self) -> int:
        """A port on which nothing listens and that no recorded replica has (it may not listen yet)."""
        taken = {record["port"] for _, record in self._recorded()}
        for port in random.SystemRandom().sample(_PORTS, k=200):
            if port not in taken and _can_listen(port):
                return port
        raise LaunchError(f"no free port in {_PORTS.start}..{_PORTS.stop - 1}", permanent=False)

    def _terminate(self, replica_id: str) -> None:
        if not owned_by(replica_id, self._owner):
            return   # to us it does not exist
        with self._lock(replica_id):
            self._ended.add(replica_id)
            directory = self._root / replica_id
            if not directory.is_dir():
                return
            try:
                folder.await_record(directory)   # no wait unless a launcher is starting right now
            except TimeoutError as error:
                raise TerminateError(str(error)) from None
            record = folder.record(directory)
            if record is None:
                return
            left = processes.end(record["pid"], record["started"], directory, grace=self._grace)
            if left:
                pids = ", ".join(str(pid) for pid in sorted(process.pid for process in left))
                raise TerminateError(f"{replica_id}: SIGKILL did not end process {pids}")
            folder.forget(directory)

    def _instances(self) -> dict[str, Instance]:
        with self._looking:
            found = {
                directory.name: self._instance(directory, record) for directory, record in self._recorded()
            }
            self._outputs = {name: output for name, output in self._outputs.items() if name in found}
            return found

    def _instance(self, directory: Path, record: dict[str, Any]) -> Instance:
        name = directory.name
        alive = processes.is_running(record["pid"], record["started"])
        if not alive or folder.ended(directory) is not None:
            why = folder.why_ended(directory)
            return Instance(name, alive=False, hourly_cost=self._price, detail=why)
        output = self._outputs.get(name)
        if output is None:
            output = self._outputs[name] = folder.Output(directory)
            output.phases.reach("provision")   # of which there is none: the machine is this one
        phases = output.read()
        return Instance(
            name,
            alive=True,
            url=f"http://127.0.0.1:{record['port']}",
            phase=phases.phase,
            progress=phases.progress,
            generation=output.generation,
            hourly_cost=self._price,
        )

    def _recorded(self, *, ours: bool = True) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and record of each of our owner's replicas, or of all others, that was launched and not
        terminated."""
        try:
            names = sorted(os.listdir(self._root))
        except FileNotFoundError:
            return []
        folders = [self._root / name for name in names if owned_by(name, self._owner) is ours]
        return [(path, record) for path in folders if (record := folder.record(path)) is not None]


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
