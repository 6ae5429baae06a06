"""`gateway restart`: new processes from the code on disk, one by one, on the sockets the supervisor kept.

Code and YAML are tried before: an update that went wrong must not cost the controller, whose place only a new
one can take. The controller first: without one, workers go on with the last list of replicas. Then, worker by
worker, the successor in a free row of the board; once it serves, the old one *retires*: it accepts nothing
more, and ends with its last request, held ones included. Whatever does not come to serve ends the restart:
what ran, runs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.child import RETIRE
from gateway.processes import describe_exit
from gateway.settings import Settings

log = logging.getLogger("gateway.supervisor")

# A controller that imports SkyPilot's SDK takes some seconds more than a worker.
SERVE_SECONDS = 60.0
TRIAL_SECONDS = 60.0
# For a controller to save and leave.
LEAVE_SECONDS = 5.0

Role = Literal["controller", "worker"]


@dataclass(slots=True, eq=False)
class Slot:
    """One child's place: the process may change, role and index do not. Mutable, by the supervisor alone.

    `index`: a worker's row of the board. `listener`: its socket, which a successor shares. `serves`: the
    process has said so. `behind`: keys and limits changed before it did. `leaving`: it is not started again
    when it ends. `retiring`: a successor serves.
    """

    role: Role
    index: int
    listener: socket.socket
    process: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=deque)
    restart_at: float | None = None
    starts: int = 0
    exit_code: int | None = None
    ready_fd: int | None = None
    serves: bool = False
    behind: bool = False
    leaving: bool = False
    retiring: bool = False

    @property
    def name(self) -> str:
        return "controller" if self.role == "controller" else f"worker {self.index}"

    @property
    def running(self) -> bool:
        return self.process is not None

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)  # does nothing when it is dead already


class Supervision(Protocol):
    """What a restart needs of the supervisor. `trial`: says `ok` where code and YAML can be used."""

    settings: Settings
    slots: list[Slot]
    rows: int
    trial: list[str] | None

    @property
    def ending(self) -> bool: ...
    def start(self, slot: Slot) -> None: ...
    def attend(self, seconds: float) -> None: ...


class RestartFailed(Exception):
    """It ended half-way; what ran before runs on. The text is one line."""


def restart(gateway: Supervision) -> None:
    """Returns when every process is a new one; old workers may retire for long after. Raises
    RestartFailed."""
    workers = [slot for slot in gateway.slots if slot.role == "worker" and not slot.retiring]
    free = _free_rows(gateway)
    if len(free) < len(workers):
        count = sum(slot.retiring for slot in gateway.slots)
        raise RestartFailed(
            f"{count} workers of the last restart still finish their requests: try again later"
        )
    if gateway.trial is not None:
        _try(gateway, gateway.trial)
    _replace_controller(gateway, gateway.slots[0])
    for old, row in zip(workers, free, strict=False):
        _replace_worker(gateway, old, row)


def _try(gateway: Supervision, command: list[str]) -> None:
    # Not in the metrics folder: it would write over the supervisor's file there.
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    deadline = time.monotonic() + TRIAL_SECONDS
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(json.dumps(gateway.settings.to_json()).encode())
        given.seek(0)
        process = subprocess.Popen(command, env=environment, stdin=given, stdout=said, stderr=said)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                gateway.attend(deadline - time.monotonic())
                _go_on(gateway)
            code = process.returncode
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
    if "ok" not in lines:
        how = "its trial has no end" if code is None else f"its trial ended with {describe_exit(code)}"
        why = next((line for line in reversed(lines) if line.strip()), how)
        raise RestartFailed(f"what is on disk cannot be used ({why.strip()}). All runs on as before")


def _free_rows(gateway: Supervision) -> list[int]:
    used = {slot.index for slot in gateway.slots if slot.role == "worker"}
    return [row for row in range(gateway.rows) if row not in used]


def _replace_controller(gateway: Supervision, controller: Slot) -> None:
    controller.leaving = True
    controller.restart_at = None
    controller.send(signal.SIGTERM)
    deadline = time.monotonic() + LEAVE_SECONDS
    while controller.running:
        if time.monotonic() >= deadline:
            controller.send(signal.SIGKILL)
            deadline += LEAVE_SECONDS
        gateway.attend(deadline - time.monotonic())
        _go_on(gateway)
    controller.leaving = False
    gateway.start(controller)
    _until_it_serves(gateway, controller)


def _replace_worker(gateway: Supervision, old: Slot, row: int) -> None:
    new = Slot("worker", row, old.listener, leaving=True)
    gateway.slots.append(new)
    gateway.start(new)
    try:
        _until_it_serves(gateway, new)
    except RestartFailed:
        new.send(signal.SIGKILL)
        while new.running and not gateway.ending:
            gateway.attend(LEAVE_SECONDS)
        if not new.running:
            gateway.slots.remove(new)
        raise
    new.leaving = False
    old.retiring = True
    old.restart_at = None
    if old.running:
        old.send(RETIRE)
    else:
        gateway.slots.remove(old)
    log.info("%s took over from %s", new.name, old.name)


def _until_it_serves(gateway: Supervision, slot: Slot) -> None:
    deadline = time.monotonic() + SERVE_SECONDS
    while not slot.serves:
        if not slot.running:
            how = describe_exit(slot.exit_code or 0)
            raise RestartFailed(f"the new {slot.name} ended ({how}); see the log. What ran before runs on")
        left = deadline - time.monotonic()
        if left <= 0:
            raise RestartFailed(f"the new {slot.name} did not serve within {SERVE_SECONDS:.0f} s")
        gateway.attend(left)
        _go_on(gateway)


def _go_on(gateway: Supervision) -> None:
    if gateway.ending:
        raise RestartFailed("the gateway stops")
