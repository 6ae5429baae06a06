"""`gateway restart` as the supervisor does it, with small stub children: the order, and what a failure leaves
behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway import processes, statedir
from gateway.settings import make

from .test_supervisor import Gateway, Start, start

__all__ = ["start"]  # the fixture

CONTROLLER = """
note("controller started")
def leave(*_):
    note("controller leaves")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
child.serves()
while True:
    time.sleep(60)
"""
# Retires, and leaves once the file `done` is there.
WORKER = """
def note_worker(what):
    note(f"worker {child.index} {what}")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
def retire(*_):
    note_worker("retires")
    while not (home / "done").exists():
        time.sleep(0.02)
    sys.exit(0)
signal.signal(signal.SIGUSR1, retire)
note_worker("started")
child.serves()
while True:
    time.sleep(60)
"""


def restart(gateway: Gateway) -> dict[str, Any]:
    """Ask for one; how it went."""
    before = gateway.address().get("restart", {}).get("number", 0)
    gateway.process.send_signal(signal.SIGUSR2)

    def over() -> dict[str, Any] | None:
        now: dict[str, Any] = gateway.address().get("restart", {})
        return now if now.get("number", 0) > before and now["state"] != "running" else None

    return dict(gateway.until(over))


def test_the_controller_is_replaced_and_then_each_worker_once_its_successor_serves(start: Start) -> None:
    gateway = start(worker=WORKER, controller=CONTROLLER, workers=2)
    gateway.started(3)
    assert restart(gateway)["state"] == "done"
    gateway.until(lambda: len(gateway.notes()) == 9)
    assert gateway.notes()[3:5] == ["controller leaves", "controller started"]
    assert [note for note in gateway.notes()[5:] if "started" in note] == [
        "worker 2 started",
        "worker 3 started",
    ]
    assert gateway.notes().index("worker 0 retires") > gateway.notes().index("worker 2 started")
    assert gateway.notes().index("worker 1 retires") > gateway.notes().index("worker 3 started")
    code, said = gateway.end()
    assert code == 0
    assert "started again in" not in said


def test_another_one_waits_for_those_who_still_retire_and_then_has_their_rows(start: Start) -> None:
    gateway = start(worker=WORKER, controller=CONTROLLER)
    gateway.started(2)
    assert restart(gateway)["state"] == "done"
    gateway.until(lambda: "worker 0 retires" in gateway.notes())
    failed = restart(gateway)
    assert failed["state"] == "failed"
    assert "1 workers of the last restart still finish" in failed["message"]
    assert gateway.notes().count("controller leaves") == 1  # nothing was begun
    (gateway.home / "done").touch()
    gateway.until(lambda: restart(gateway)["state"] == "done")
    assert gateway.notes().count("worker 0 started") == 2
    assert gateway.end()[0] == 0


@pytest.mark.parametrize("who", ["controller", "worker"])
def test_a_process_that_does_not_come_to_serve_ends_the_restart_and_the_old_workers_serve_on(
    start: Start, who: str
) -> None:
    broken = 'if (home / "broken").exists():\n    note("broken")\n    sys.exit(3)\n'
    worker, controller = (
        broken * (who == role) + code for role, code in (("worker", WORKER), ("controller", CONTROLLER))
    )
    gateway = start(worker=worker, controller=controller)
    gateway.started(2)
    (gateway.home / "broken").touch()
    failed = restart(gateway)
    assert failed["state"] == "failed"
    assert f"the new {who}" in failed["message"]
    assert "exit code 3" in failed["message"]
    assert "worker 0 retires" not in gateway.notes()
    (gateway.home / "broken").unlink()
    gateway.until(lambda: gateway.notes().count("controller started") == 2)  # it is tried for ever, as ever
    (gateway.home / "done").touch()
    assert restart(gateway)["state"] == "done"
    assert gateway.end()[0] == 0


def test_code_that_cannot_be_imported_costs_nothing_that_runs(start: Start, tmp_path: Path) -> None:
    trial = f"""import pathlib
if not pathlib.Path({str(tmp_path / "mended")!r}).exists():
    import a_module_that_the_update_left_out
print("ok")
"""
    gateway = start(worker=WORKER, controller=CONTROLLER, trial=trial)
    gateway.started(2)
    failed = restart(gateway)
    assert failed["state"] == "failed"
    assert "No module named 'a_module_that_the_update_left_out'" in failed["message"]
    assert "controller leaves" not in gateway.notes()
    (tmp_path / "mended").touch()
    assert restart(gateway)["state"] == "done"
    assert gateway.end()[0] == 0


@pytest.mark.parametrize(("yaml", "says"), [("run: x\n", "ok"), ("run: [\n", "x.yaml")])
def test_the_trial_reads_the_yaml_as_a_controller_would(tmp_path: Path, yaml: str, says: str) -> None:
    (tmp_path / "x.yaml").write_text(yaml + "resources: {ports: 1}\nservice: {readiness_probe: /health}\n")
    settings = make(tmp_path / "x.yaml", state_dir=tmp_path / "state", provisioner="local")
    done = subprocess.run(
        processes.trial_command(), input=json.dumps(settings.to_json()), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert says in done.stdout
    assert (done.stdout == "ok\n") == (says == "ok")
    assert not (tmp_path / "state").exists()


def test_a_stop_while_the_code_is_tried_does_not_wait_for_that(start: Start) -> None:
    gateway = start(worker=WORKER, controller=CONTROLLER, trial="import time; time.sleep(600)")
    gateway.started(2)
    gateway.process.send_signal(signal.SIGUSR2)
    gateway.until(lambda: gateway.address().get("restart", {}).get("state") == "running")
    assert gateway.end()[0] == 0


def test_a_stop_in_the_middle_of_a_restart_ends_everything(start: Start) -> None:
    never = WORKER.replace("child.serves()", "if child.index == 0:\n    child.serves()")
    gateway = start(worker=never, controller=CONTROLLER)
    gateway.started(2)
    gateway.process.send_signal(signal.SIGUSR2)
    gateway.until(lambda: "worker 1 started" in gateway.notes())
    assert gateway.address()["restart"]["state"] == "running"
    assert gateway.end()[0] == 0
    assert statedir.read_address(gateway.home) is None


def test_a_worker_that_dies_while_it_retires_is_not_started_again(start: Start) -> None:
    worker = WORKER.replace('note_worker("retires")', 'note_worker(f"retires as {os.getpid()}")')
    gateway = start(worker=worker, controller=CONTROLLER)
    gateway.started(2)
    assert restart(gateway)["state"] == "done"
    (note,) = gateway.until(lambda: [n for n in gateway.notes() if n.startswith("worker 0 retires")])
    os.kill(int(note.split()[-1]), signal.SIGKILL)
    gateway.until(lambda: not statedir.is_alive(int(note.split()[-1])))
    assert gateway.end()[0] == 0
    assert gateway.notes().count("worker 0 started") == 1
