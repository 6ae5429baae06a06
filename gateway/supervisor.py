"""The process of `gateway up`: owns sockets, board and metrics folder; starts, restarts and reaps the
children.

No business logic and no event loop: signals arrive through a pipe, one `select` waits for everything.
Children live in sessions of their own, so that Ctrl-C reaches this process alone and the order of stopping is
ours: workers stop accepting, end held requests, drain; (replicas, where they end with the gateway);
controller; we.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from typing import Any

from gateway import processes, sockets, statedir
from gateway.child import EXIT_CONFIG, EXIT_DOWN, RESTART, VARIABLE, Child
from gateway.leaving import keeps_running
from gateway.restarting import RestartFailed, Role, Slot, restart
from gateway.settings import SETTINGS, Settings, SettingsError, with_files
from replicas.board import Board

log = logging.getLogger("gateway.supervisor")

BOARD_FILE = "load.board"
# A child that dies young is started again after 0.1 s, 0.2 s ... 5 s, by its deaths within the last 10 s.
FIRST_RESTART_SECONDS, LAST_RESTART_SECONDS, DEATHS_REMEMBERED_SECONDS = 0.1, 5.0, 10.0
# Beyond drain_timeout, for a worker to write what it has and leave; and for the controller to save.
GRACE_SECONDS = 5.0
# What is left of a worker's life after a second signal.
HURRY_SECONDS = 2.0
# `local` replicas get SIGTERM, then SIGKILL after a while; verified gone well within this.
END_REPLICAS_SECONDS = 60.0

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# SIGHUP reads keys and limits again; from a terminal that is closed it stops.
_OTHER_SIGNALS = (signal.SIGHUP, RESTART, signal.SIGCHLD)

Commands = Mapping[Role, list[str]]


class Supervisor:
    """`run()` blocks until the gateway has ended and returns the exit code.

    `services`: names by service index, for accounting a dead worker's requests. `end_replicas`: replicas end
    with the gateway (demo, `local` on a terminal). `commands`: how each role is started (stubs in tests).
    `say`: lines for the person who started it. `started`: called once, when `url` and `admin_url` are known.
    `leash`: a descriptor whose end counts as a stop signal: whoever has the other side is gone.
    """

    def __init__(
        self,
        settings: Settings,
        services: tuple[str, ...],
        *,
        end_replicas: bool = False,
        commands: Commands | None = None,
        say: Callable[[str], None] | None = None,
        started: Callable[[Supervisor], None] | None = None,
        leash: int | None = None,
    ) -> None:
        self._given = settings
        self.settings = with_files(settings)
        self.services = services
        self.end_replicas = end_replicas
        self.url = self.admin_url = ""
        self._commands = commands or {
            "controller": processes.module_command("gateway.admin"),
            "worker": processes.module_command("gateway.app"),
        }
        self.trial = None if commands else processes.trial_command()
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._started = started
        self._leash = leash
        self.slots: list[Slot] = []
        self.rows = 2 * settings.workers  # of the board: a restart has successors beside those who retire
        self._restarts = 0  # asked for and not begun
        self._restarted: dict[str, Any] = {}
        self._reloads = 0
        self._terminal = os.isatty(0)
        self._stops = 0  # stop signals so far
        self._stopping = False
        self._verdict: int | None = None  # exit code, once a child's exit decided it
        self._wake_r = -1

    def __repr__(self) -> str:
        alive = sum(slot.running for slot in self.slots)
        return f"<Supervisor {self.url} children={alive}/{len(self.slots)} stops={self._stops}>"

    def run(self) -> int:
        """Raises StateDirBusy and PortError (one line each) before anything has been started."""
        processes.raise_file_limit()
        folder = self.settings.state_dir
        with ExitStack() as stack:
            self._lock_fd = statedir.lock(folder)
            stack.callback(os.close, self._lock_fd)
            count = self.settings.workers
            listeners = sockets.listen(self.settings.host, self.settings.port, count, "--port")
            for listener in listeners:
                stack.callback(listener.close)
            (admin,) = sockets.listen(self.settings.admin_host, self.settings.admin_port, 1, "--admin-port")
            stack.callback(admin.close)
            self.url = sockets.url(listeners[0], self.settings.host)
            self.admin_url = sockets.url(admin, self.settings.admin_host)
            self._metrics_folder = statedir.empty_metrics(folder)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._metrics_folder)
            self._board = stack.enter_context(Board.create(folder / BOARD_FILE, self.rows))
            self._news = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            self._write_news()
            self._alive_r, alive_w = os.pipe()
            stack.callback(os.close, self._alive_r)
            stack.callback(os.close, alive_w)
            self._wake_r = stack.enter_context(processes.signals_as_bytes(*_STOP_SIGNALS, *_OTHER_SIGNALS))
            self.slots = [Slot("controller", 0, admin)]
            self.slots += [Slot("worker", i, listeners[i % len(listeners)]) for i in range(count)]
            statedir.write_address(folder, self._address())
            stack.callback(statedir.forget_address, folder)
            stack.callback(self._kill_all)
            for slot in self.slots:
                self.start(slot)
            if self._started is not None:
                self._started(self)
            return self._watch()

    # -- the three phases: watch, stop, done -------------------------------------------------------

    @property
    def ending(self) -> bool:
        return self._verdict is not None or self._stops > 0

    def _watch(self) -> int:
        while not self.ending:
            self.attend(None)
            if self._restarts:
                self._restart()
        return self._stop()

    def attend(self, seconds: float | None) -> None:
        """Wait that long, or until something happens, and start again those whose pause is over."""
        now = time.monotonic()
        due = [slot.restart_at - now for slot in self.slots if slot.restart_at is not None]
        self._wait(min(due if seconds is None else [*due, seconds], default=None))
        now = time.monotonic()
        for slot in self.slots:
            if slot.restart_at is not None and slot.restart_at <= now and not self.ending:
                self.start(slot)
        if self._reloads:
            self._reload()

    def _reload(self) -> None:
        """Keys and limits of the files; what cannot be in force as a whole changes nothing."""
        self._reloads = 0
        if self._given.api_keys_file is None and self._given.limits_file is None:
            self._say("SIGHUP: nothing to read again, without --api-keys-file and --limits-file")
            return
        try:
            self.settings = with_files(self._given)
        except SettingsError as error:
            self._say(f"SIGHUP: keys and limits stay as they were: {error}")
            return
        self._write_news()
        for slot in self.slots:
            if slot.role == "worker":
                slot.behind = not slot.serves  # a process that cannot hear it yet would die of the signal
                if slot.serves:
                    slot.send(signal.SIGHUP)
        self._say(f"SIGHUP: keys and limits read again, {len(self.settings.api_key)} keys")

    def _write_news(self) -> None:
        data = json.dumps(self.settings.to_json()).encode()
        self._news.truncate(0)
        os.pwrite(self._news.fileno(), data, 0)

    def _restart(self) -> None:
        number, self._restarts = self._restarted.get("number", 0) + 1, 0
        self._tell_restart(number, "running")
        self._say("restarting")
        try:
            restart(self)
        except RestartFailed as error:
            self._say(f"the restart failed: {error}")
            self._tell_restart(number, "failed", str(error))
        else:
            self._say("restarted")
            self._tell_restart(number, "done")

    def _tell_restart(self, number: int, state: str, message: str = "") -> None:
        self._restarted = {"number": number, "state": state, "message": message}
        statedir.write_address(self.settings.state_dir, self._address())

    def _stop(self) -> int:
        workers = [slot for slot in self.slots if slot.role == "worker"]
        controller = self.slots[0]
        self._stopping = True
        keep = self._verdict is None and not self.end_replicas
        if keep:
            self._tell_what_keeps_running()
        else:
            self._say("stopping" if self._verdict is None else "ending the gateway")
        for slot in workers:
            slot.listener.close()  # or the kernel would go on queueing connections that nobody answers
        self._end(workers, self.settings.drain_timeout + GRACE_SECONDS)
        if self.end_replicas and self._verdict is None:
            self._end_replicas(controller)
        self._end([controller], GRACE_SECONDS)
        return 0 if self._verdict is None else self._verdict

    def _end(self, slots: Iterable[Slot], seconds: float) -> None:
        """SIGTERM, then SIGKILL when `seconds` are over, or 2 s after a person asked to hurry."""
        slots = list(slots)
        for slot in slots:
            slot.restart_at = None
            slot.send(signal.SIGTERM)
        deadline, hurried = time.monotonic() + seconds, self._stops
        while any(slot.running for slot in slots):
            now = time.monotonic()
            if now >= deadline:
                for slot in slots:
                    if slot.running:
                        log.warning("%s did not end in time: killed", slot.name)
                        slot.send(signal.SIGKILL)
                deadline = now + GRACE_SECONDS
            self._wait(deadline - now)
            if self._stops > hurried:
                hurried, deadline = self._stops, min(deadline, time.monotonic() + HURRY_SECONDS)
                for slot in slots:
                    slot.send(signal.SIGTERM)

    def _end_replicas(self, controller: Slot) -> None:
        """Ask the controller for `down` and wait until it says (by its exit code) that every replica is
        gone."""
        deadline, asked, hurried = time.monotonic() + END_REPLICAS_SECONDS, False, self._stops
        controller.exit_code = None
        while controller.exit_code != EXIT_DOWN:
            now = time.monotonic()
            if now >= deadline or self._stops > hurried:
                self._say("replicas may still run: `gateway down` ends them")
                return
            if not controller.running and (controller.restart_at is None or controller.restart_at <= now):
                self.start(controller)
                asked = False
            if not asked:
                asked = self._admin("POST", "/admin/down") is not None
            self._wait(min(deadline - now, 1.0 if asked else 0.2))

    # -- children ----------------------------------------------------------------------------------

    def start(self, slot: Slot) -> None:
        listener = slot.listener.fileno()
        slot.ready_fd, ready_w = os.pipe()
        slot.serves = slot.behind = False
        news = self._news.fileno()
        child = Child(self.settings, slot.index, listener, self._alive_r, self._lock_fd, ready_w, news)
        ours = {row.env for row in SETTINGS}
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment[VARIABLE] = child.to_env()
        environment["GATEWAY_PROCESS"] = slot.name.replace(" ", "-")  # see metrics.py
        slot.restart_at = None
        slot.starts += 1
        slot.process = subprocess.Popen(
            self._commands[slot.role],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=(listener, self._alive_r, self._lock_fd, ready_w, news),
            start_new_session=True,
        )
        os.close(ready_w)
        log.debug("%s is pid %d", slot.name, slot.process.pid)

    def _wait(self, seconds: float | None) -> None:
        """Sleep until a signal, a child's death or the time; then look after all of them."""
        watched = [self._wake_r] if self._leash is None else [self._wake_r, self._leash]
        watched += [slot.ready_fd for slot in self.slots if slot.ready_fd is not None]
        ready, _, _ = select.select(watched, [], [], None if seconds is None else max(0.0, seconds))
        if self._leash in ready and not os.read(self._leash, 4096):
            self._leash = None
            self._stops += 1
        if self._wake_r in ready:
            for number in os.read(self._wake_r, 4096):
                closed = self._terminal and number == signal.SIGHUP and not os.isatty(0)
                self._stops += number in _STOP_SIGNALS or closed
                self._reloads += number == signal.SIGHUP and not closed
                self._restarts += number == RESTART
        for slot in self.slots:
            if slot.ready_fd in ready:
                slot.serves = bool(os.read(slot.ready_fd, 1))
                _close_ready(slot)
                if slot.serves and slot.behind:
                    slot.behind = False
                    slot.send(signal.SIGHUP)
        for slot in list(self.slots):
            if slot.process is not None and slot.process.poll() is not None:
                self._reap(slot, slot.process.returncode)
        if os.getpid() == 1:
            processes.reap_orphans({slot.process.pid for slot in self.slots if slot.process is not None})

    def _reap(self, slot: Slot, code: int) -> None:
        now = time.monotonic()
        slot.process, slot.exit_code, slot.serves = None, code, False
        _close_ready(slot)
        if slot.role == "worker":
            self._account(slot.index)
        if slot.role == "controller" and code == EXIT_DOWN:
            self._verdict = 0
        elif slot.retiring:
            self.slots.remove(slot)
        elif slot.leaving:
            pass
        elif code == EXIT_CONFIG and slot.starts == 1 and not self._stopping:
            self._verdict = 1  # not later: a YAML that is being edited must not end a gateway that serves
        elif not self._stopping or (slot.role == "controller" and self.end_replicas):
            slot.deaths.append(now)
            while slot.deaths[0] < now - DEATHS_REMEMBERED_SECONDS:
                slot.deaths.popleft()
            pause = min(LAST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2 ** (len(slot.deaths) - 1))
            slot.restart_at = now + pause
            how = processes.describe_exit(code)
            log.warning("%s ended (%s): started again in %.1f s", slot.name, how, pause)

    def _account(self, worker: int) -> None:
        lost = self._board.zero_worker(worker)
        if lost:
            from gateway import metrics  # only now: PROMETHEUS_MULTIPROC_DIR must be set before

            for service, count in lost.items():
                name = self.services[service] if service < len(self.services) else str(service)
                metrics.worker_died(name, count)
                log.warning("worker %d died with %d open requests of %s", worker, count, name)

    def _kill_all(self) -> None:
        for slot in self.slots:
            if slot.process is not None:
                slot.send(signal.SIGKILL)
                slot.process.wait()
                slot.process = None
            _close_ready(slot)

    # -- talking -----------------------------------------------------------------------------------

    def _address(self) -> dict[str, Any]:
        last = {"provisioner": self.settings.provisioner, "replica": self.settings.replica}
        where = {"url": self.url, "admin_url": self.admin_url}
        restarted = {"restart": self._restarted} if self._restarted else {}
        return {"pid": os.getpid(), **where, "services": self.services, "last": last, **restarted}

    def _admin(self, method: str, path: str) -> dict[str, Any] | None:
        """One short call to our own controller; None when it does not answer."""
        host, _, port = self.admin_url.removeprefix("http://").rpartition(":")
        key = self.settings.admin_key
        connection = HTTPConnection(host.strip("[]"), int(port), timeout=2.0)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
            response = connection.getresponse()
            body = response.read()
            values = json.loads(body) if response.status < 300 else None
        except (OSError, HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return values if isinstance(values, dict) else None

    def _tell_what_keeps_running(self) -> None:
        self._say("stopping the gateway")
        status = self._admin("GET", "/admin/status") if self.slots[0].running else None
        cloud = self.settings.provisioner == "skypilot"
        for line in keeps_running((status or {}).get("services", ()), cloud=cloud):
            self._say(line)


def _close_ready(slot: Slot) -> None:
    if slot.ready_fd is not None:
        os.close(slot.ready_fd)
        slot.ready_fd = None
