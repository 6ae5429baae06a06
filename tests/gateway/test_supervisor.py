"""The supervisor with small stub children: who is started, restarted, ended, in which order; what is said."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from gateway import sockets, statedir
from gateway.leaving import keeps_running
from gateway.metrics import build_registry

# What every stub child does first: say in a file that it lives, and end with the supervisor.
PRELUDE = """
import json, os, signal, socket, sys, time
from gateway.child import exit_with_supervisor, read_child
child = read_child()
exit_with_supervisor(child.alive_fd)
home = child.settings.state_dir
def note(text):
    with open(home / "notes", "a") as file:
        file.write(text + "\\n")
"""
WORKER = """
note(f"worker {child.index} started")
listener = socket.socket(fileno=child.fd)
def leave(*_):
    note(f"worker {child.index} leaves")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
while True:
    connection, _ = listener.accept()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
"""
CONTROLLER = """
note("controller started")
def leave(*_):
    note("controller leaves")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
listener = socket.socket(fileno=child.fd)
while True:
    connection, _ = listener.accept()
    connection.close()
"""
# Answers POST /admin/down with 202 and exits 64, GET /admin/status with one replica.
DOWN = """
note("controller started")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
listener = socket.socket(fileno=child.fd)
body = json.dumps({"services": [{"replicas": [{"id": "svc-gw-1-1", "state": "ready", "hourly_cost": 2.5}]}]})
while True:
    connection, _ = listener.accept()
    request = connection.recv(65536).decode()
    note(request.split(" HTTP")[0])
    connection.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    connection.close()
    if request.startswith("POST /admin/down"):
        time.sleep(0.1)
        sys.exit(64)
"""

MAIN = """
import json, sys
from gateway.settings import make
from gateway.supervisor import Supervisor
given = json.loads(sys.argv[1])
of = {"workers": given["workers"], "limits_file": given.get("limits_file")}
settings = make(state_dir=given["home"], port=0, admin_port=0, drain_timeout=2, **of)
commands = {role: [sys.executable, "-c", code] for role, code in given["code"].items()}
supervisor = Supervisor(settings, ("svc",), end_replicas=given["end_replicas"], commands=commands)
supervisor.trial = given.get("trial")
sys.exit(supervisor.run())
"""


class Gateway:
    """A supervisor process with stub children, and what can be seen of it from outside."""

    def __init__(
        self,
        home: Path,
        worker: str,
        controller: str,
        workers: int,
        end_replicas: bool,
        limits_file: Path | None = None,
        trial: str | None = None,
    ) -> None:
        self.home = home
        given = {
            "home": str(home),
            "workers": workers,
            "end_replicas": end_replicas,
            "limits_file": limits_file and str(limits_file),
            "trial": trial and [sys.executable, "-c", trial],
            "code": {"worker": PRELUDE + worker, "controller": PRELUDE + controller},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, json.dumps(given)], stderr=subprocess.PIPE, text=True
        )

    def notes(self) -> list[str]:
        path = self.home / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def until(self, what: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 20
        while not (result := what()):
            assert time.monotonic() < deadline, (self.notes(), self.process.poll())
            time.sleep(0.02)
        return result

    def started(self, count: int) -> None:
        self.until(lambda: sum("started" in note for note in self.notes()) >= count)

    def address(self) -> dict[str, Any]:
        return self.until(lambda: statedir.read_address(self.home))  # type: ignore[no-any-return]

    def ask(self) -> int:
        port = int(self.address()["url"].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            return int(connection.recv(100) or 0)

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


Start = Callable[..., Gateway]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    gateways: list[Gateway] = []

    def make(
        worker: str = WORKER,
        controller: str = CONTROLLER,
        workers: int = 1,
        end_replicas: bool = False,
        limits_file: Path | None = None,
        trial: str | None = None,
    ) -> Gateway:
        home = tmp_path / "state"
        gateways.append(Gateway(home, worker, controller, workers, end_replicas, limits_file, trial))
        return gateways[-1]

    yield make
    for gateway in gateways:
        gateway.process.kill()
        gateway.process.communicate(timeout=10)


def test_workers_leave_before_the_controller_and_the_address_is_forgotten(start: Start) -> None:
    gateway = start(workers=2)
    gateway.started(3)
    assert gateway.ask() > 0
    assert set(gateway.address()) == {"pid", "url", "admin_url", "services", "last", "home"}
    code, said = gateway.end()
    assert code == 0
    assert sorted(gateway.notes()[-3:-1]) == ["worker 0 leaves", "worker 1 leaves"]
    assert gateway.notes()[-1] == "controller leaves"
    assert statedir.read_address(gateway.home) is None
    assert statedir.last_start(gateway.home) == {"provisioner": None, "replica": []}
    assert "stopping" in said


def test_a_killed_worker_is_started_again_on_the_same_port(start: Start) -> None:
    gateway = start()
    gateway.started(2)
    pid = gateway.ask()
    os.kill(pid, signal.SIGKILL)
    gateway.until(lambda: not statedir.is_alive(pid))  # or it may yet accept, and die with the connection
    again = gateway.ask()  # queued in the socket that the supervisor kept
    assert again not in (0, pid)
    assert gateway.end()[0] == 0


def test_a_child_that_keeps_dying_is_tried_for_ever_with_back_off(start: Start) -> None:
    gateway = start(worker="note('worker started')\nsys.exit(3)")
    gateway.started(6)
    code, said = gateway.end()
    assert code == 0
    assert "worker 0 ended (exit code 3): started again in 0.1 s" in said
    assert "started again in 0.8 s" in said


def test_a_child_that_can_never_work_ends_the_gateway_with_an_error(start: Start) -> None:
    gateway = start(controller="print('no such cloud', file=sys.stderr)\nsys.exit(78)")
    _, said = gateway.process.communicate(timeout=20)
    assert gateway.process.returncode == 1
    assert "no such cloud" in said


def test_a_child_that_worked_and_then_finds_a_broken_yaml_does_not_end_what_serves(start: Start) -> None:
    edited = """
note("controller started")
sys.exit(1 if (home / "notes").read_text().count("controller started") == 1 else 78)
"""
    gateway = start(controller=edited)
    gateway.until(lambda: gateway.notes().count("controller started") > 2)
    assert gateway.ask() > 0
    assert gateway.process.poll() is None
    assert gateway.end()[0] == 0


def test_requests_of_a_dead_worker_are_accounted_and_its_row_is_zero(start: Start) -> None:
    worker = """
from replicas.board import Board
board = Board.open(home / "load.board")
row = board.worker(0)
if not (home / "died").exists():
    (home / "died").touch()
    board.cells[row.arrived] = 5
    board.cells[row.ended] = 2
    os.kill(os.getpid(), signal.SIGKILL)
note(f"arrived {board.cells[row.arrived]}")
"""
    gateway = start(worker=worker + WORKER)
    gateway.started(2)
    assert "arrived 0" in gateway.notes()
    registry = build_registry(str(gateway.home / "metrics"), lambda: {"services": []})
    lines = generate_latest(registry).decode().splitlines()
    assert 'gateway_requests_total{code="0",end="worker_died",endpoint="unknown",service="svc"} 3.0' in lines
    assert gateway.end()[0] == 0


def test_children_end_with_a_killed_supervisor_and_the_next_start_waits_for_them(start: Start) -> None:
    gateway = start()
    gateway.started(2)
    worker = gateway.ask()
    gateway.process.kill()
    gateway.process.wait(timeout=10)
    following = start()
    following.started(4)
    assert not statedir.is_alive(worker)
    assert following.end()[0] == 0


def test_a_second_gateway_in_the_same_state_dir_names_the_first(start: Start) -> None:
    gateway = start()
    gateway.started(2)
    second = start()
    _, said = second.process.communicate(timeout=20)
    assert second.process.returncode != 0
    assert f"(pid {gateway.process.pid}) already runs" in said
    assert gateway.ask() > 0


def test_down_finished_ends_the_whole_gateway_with_success(start: Start) -> None:
    gateway = start(controller=DOWN)
    gateway.started(2)
    port = int(gateway.address()["admin_url"].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /admin/down HTTP/1.1\r\n\r\n")
        connection.recv(1000)
    gateway.process.communicate(timeout=20)
    assert gateway.process.returncode == 0
    assert "worker 0 leaves" in gateway.notes()


def test_replicas_that_end_with_the_gateway_end_after_its_workers(start: Start) -> None:
    gateway = start(controller=DOWN, end_replicas=True)
    gateway.started(2)
    code, said = gateway.end(signal.SIGINT)
    assert code == 0
    assert gateway.notes()[-2:] == ["worker 0 leaves", "POST /admin/down"]
    assert "may still run" not in said


def test_stopping_says_what_keeps_running_and_how_to_end_it(start: Start) -> None:
    gateway = start(controller=DOWN)
    gateway.started(2)
    code, said = gateway.end()
    assert code == 0
    assert "1 replica keeps running and cost $2.50 an hour: svc-gw-1-1 (ready)" in said
    assert "`gateway down` ends them" in said
    assert "POST /admin/down" not in gateway.notes()


def test_a_second_signal_hurries_a_worker_that_drains(start: Start) -> None:
    worker = textwrap.dedent(
        """
        signal.signal(signal.SIGTERM, lambda *_: note("asked"))
        note("worker started")
        while True:
            time.sleep(60)
        """
    )
    gateway = start(worker=worker)
    gateway.started(2)
    gateway.process.send_signal(signal.SIGTERM)
    gateway.until(lambda: "asked" in gateway.notes())
    started = time.monotonic()
    assert gateway.end()[0] == 0
    assert time.monotonic() - started < 5  # not drain_timeout + 5 s


def test_a_busy_port_is_one_line_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(sockets.PortError, match=f"port {port} on 127.0.0.1 is in use.*change --port"):
            sockets.listen("127.0.0.1", port, 2, "--port")


def test_a_port_shared_by_another_gateway_is_busy_too() -> None:
    first = sockets.listen("127.0.0.1", 0, 2, "--port")
    try:
        port = first[0].getsockname()[1]
        with pytest.raises(sockets.PortError, match="in use"):
            sockets.listen("127.0.0.1", port, 1, "--port")
    finally:
        for listener in first:
            listener.close()


def test_a_host_that_is_not_ours_is_one_line() -> None:
    with pytest.raises(sockets.PortError, match="not an address of this machine"):
        sockets.listen("192.0.2.1", 0, 1, "--host")


def test_nothing_is_said_about_running_replicas_when_there_are_none() -> None:
    assert keeps_running([{"replicas": []}]) == []
    free = {"replicas": [{"id": "a", "state": "ready", "hourly_cost": None}] * 2}
    assert keeps_running([free])[0].startswith("2 replicas keep running: a (ready), a (ready)")
