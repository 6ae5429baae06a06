"""`gateway selftest FILE`: launch, stream, lose a replica, recover, go to zero, verify, for a few dollars.

The gateway is one of its own, as `gateway up` starts it, with a state dir of its own; we are its client, and
the one who takes its replica away. However it goes, it ends with nothing of it running, verified by asking
the provisioner itself; when that cannot be had, it says what is left and how to end it by hand.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from gateway import closing
from gateway.asking import Asking
from gateway.client import AdminClient, ClientError
from gateway.display import duration
from gateway.quote import environment
from gateway.settings import Settings
from gateway.tethered import Tethered, TetherError
from replicas import report
from replicas.provisioners import loss
from replicas.spec import Service

T = TypeVar("T")

POLL_SECONDS: Final = 0.25
LOSS_SECONDS: Final = 900.0  # for a cloud to take a machine away, and for the gateway to hear of it
ZERO_SECONDS: Final = 900.0  # from the end of the idle time to no replica
SILENT_SECONDS: Final = 60.0  # without a word from the admin port; it is started again within a few


class SelftestFailed(Exception):
    """A step that did not work. One line."""


class Run:
    """One self-test. Mutable: the steps that are done, and what has been spent by their end."""

    def __init__(
        self, settings: Settings, service: Service, folder: Path, max_cost: float, say: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._service = service
        self._max_cost = max_cost
        self._say = say
        self._began = time.monotonic()
        self._spent = self._total = self.total = 0.0
        self.step = "start"
        self.gateway = Tethered(folder, say)

    def __repr__(self) -> str:
        return f"<Run of {self._service.name} step={self.step} spent=${self._spent:.2f}>"

    # -- the steps ---------------------------------------------------------------------------------

    def steps(self) -> None:
        """All of them. Raises SelftestFailed at the first that does not work."""
        with self._timed("start") as done:
            self.gateway.launch([str(self._settings.file)], environment(self._settings, self._max_cost))
            done("the gateway serves, and no replica exists")
        with AdminClient(self.gateway.admin_url) as self._admin:
            first = self._served("launch", "")
            with self._timed("kill") as done:
                self._lose(first)
                done(f"{first} was taken away behind the gateway's back, and it noticed")
            self._served("recover", first)
            with self._timed("zero") as done:
                idle = f"{duration(self._settings.idle_timeout)} without a request"
                self._until(lambda s: not s["replicas"], (self._settings.idle_timeout or 0) + ZERO_SECONDS)
                done(f"no replica after {idle}")

    def _served(self, step: str, before: str) -> str:
        """A request that waits for its replica, and the whole answer. The id of a replica that is not
        `before`."""
        delay = self._service.probe.initial_delay_seconds
        limit = self._settings.provision_timeout + delay + report.HOLD_SPARE
        asking = Asking(self.gateway.url, self._service.model)
        asking.start()
        with self._timed(step) as done:
            self._until(lambda _: asking.first.is_set() or asking.over.is_set(), limit)
            if asking.error and not asking.first.is_set():
                raise SelftestFailed(f"no answer: {asking.error}")
            ready = self._until(lambda s: [r["id"] for r in s["replicas"] if r["state"] == "ready"], 30)
            if before in ready:
                raise SelftestFailed(f"{before} answers, although it was taken away")
            done(f"first token, from {ready[0]}")
        with self._timed("answer" if not before else "answer again") as done:
            self._until(lambda _: asking.over.is_set(), self._settings.upstream_timeout)
            if asking.error:
                raise SelftestFailed(f"the answer broke off: {asking.error}")
            done(f"streamed to its end, {asking.pieces} pieces")
        return str(ready[0])

    def _lose(self, replica: str) -> None:
        """Take it away, and wait until the gateway knows."""
        owner = closing.owner(self.gateway.folder)
        failed: list[Exception] = []

        def take() -> None:
            try:
                loss.take_away(self._settings.provisioner or "local", self.gateway.folder, owner, replica)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()

        def noticed(service: Mapping[str, Any]) -> bool:
            if failed:
                raise SelftestFailed(f"{replica} could not be taken away: {failed[0]}")
            ready = [r["id"] for r in service["replicas"] if r["state"] == "ready"]
            return not thread.is_alive() and replica not in ready

        self._until(noticed, LOSS_SECONDS)

    # -- between two looks -------------------------------------------------------------------------

    def _until(self, true: Callable[[Mapping[str, Any]], T], seconds: float) -> T:
        """The first true value for the service's status. Raises SelftestFailed when it takes longer than
        `seconds`, the gateway has ended, or more than --max-cost is spent."""
        began = heard = time.monotonic()
        while True:
            now = time.monotonic()
            if not self.gateway.alive:
                raise SelftestFailed(f"the gateway has ended; its log is {self.gateway.log}")
            try:
                service = self._admin.status()["services"][0]
            except ClientError as error:  # a controller that is being started again
                if now - heard > SILENT_SECONDS:
                    raise SelftestFailed(f"the gateway is silent: {error}") from None
            else:
                heard = now
                self._spend(service["cost"]["total"])
                if value := true(service):
                    return value
                if now - began > seconds:
                    raise SelftestFailed(f"not within {duration(seconds)}{_state(service)}")
            time.sleep(POLL_SECONDS)

    def _spend(self, total: float) -> None:
        self._total = total
        if total > self._max_cost:
            raise SelftestFailed(f"${total:.2f} is spent, more than --max-cost {self._max_cost:g}")

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[Callable[[str], None]]:
        """One line with what the step took; the step's name in what it raises."""
        self.step, began, said = step, time.monotonic(), [""]
        try:
            yield lambda text: said.__setitem__(0, text)
        except TetherError as error:
            raise SelftestFailed(f"{step}: {error}{_end_of(error.log)}") from None
        except (SelftestFailed, ClientError, OSError) as error:
            raise SelftestFailed(f"{step}: {error}") from None
        self._line(step, time.monotonic() - began, self._total - self._spent, said[0])
        self._spent = self._total

    def _line(self, step: str, seconds: float, dollars: float, text: str) -> None:
        self._say(f"  ok  {step:<13}{seconds:8.1f} s  ${max(0.0, dollars):7.4f}  {text}")

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> list[str]:
        """End all of it, verified, and say so; what is left, if that could not be had."""
        self.step, began = "absent", time.monotonic()
        left = closing.end(self.gateway, self._settings.provisioner or "local", self._say)
        self.total = closing.spent(self.gateway.folder)
        if not left:
            ended = "nothing of it exists any more; the provisioner was asked"
            self._line("absent", time.monotonic() - began, self.total - self._spent, ended)
        return left

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


def _state(service: Mapping[str, Any]) -> str:
    """What the replicas are doing, for the reason of a failure."""
    replicas = [f"{r['id']} is {r['state']}: {r['reason']}" for r in service["replicas"]]
    return f"; {'; '.join(replicas)}" if replicas else ""


def _end_of(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    return " " + " | ".join(log.read_text(errors="replace").splitlines()[-3:])


def run(
    settings: Settings, service: Service, max_cost: float, state_dir: str | None, say: Callable[[str], None]
) -> int:
    """The exit code: 0 passed, 1 failed, 130 interrupted. Nothing runs afterwards, or it says what does."""
    folder = Path(state_dir).expanduser().absolute() if state_dir else _temporary()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _as_interrupt)
    say(f"state dir {folder}, kept if it fails")
    test, why, code = Run(settings, service, folder, max_cost, say), "", 0
    try:
        test.steps()
    except SelftestFailed as error:
        why, code = str(error), 1
    except KeyboardInterrupt:
        why, code = f"{test.step}: interrupted", 130
    if why:
        say(f"FAILED at {why}")
    left = test.finish()
    spent = f"{duration(test.seconds)} and ${test.total:.2f} (an estimate)"
    if left:
        say(f"FAILED at absent: {closing.by_hand(left, folder, settings.provisioner or 'local')}")
        return code or 1
    if why:
        say(f"FAILED after {spent}. Nothing runs. Logs: {folder}")
        return code
    say(f"PASSED in {spent}")
    if not state_dir:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="gateway-selftest-"))


def _as_interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt
