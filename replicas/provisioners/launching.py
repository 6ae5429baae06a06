"""Launches of clusters: each looked for first, then made once, and given up when it does not end.

`run` must be submitted once and never twice, whoever dies when: a second one fights the first for its port.
What SkyPilot says is not enough to tell: after a crash of the API server a cluster on which nothing runs is
called UP by the next refresh. So a launch that returned is written down in the replica's folder, and where
that is missing the cluster is asked for its jobs; one that does not answer is ended and made anew.
"""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.plans import Plan
from replicas.provisioners import LaunchError, NoCapacity, attempt, clusters, folder, keeping, launcher
from replicas.provisioners.attempt import Extras
from replicas.provisioners.deadman import DeadMan
from replicas.provisioners.environment import secret_values
from replicas.provisioners.sky_errors import (
    is_away,
    is_other_hardware,
    is_unreachable,
    launch_error,
    reason,
)
from replicas.provisioners.task import build_task
from replicas.provisioners.threads import spawn

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky
    from replicas.spec import Service

log = logging.getLogger(__name__)

ATTEMPT_SECONDS = 1200.0   # from the submission of one attempt to giving it up
SUBMIT_SECONDS = 60.0      # that a termination waits for a launch which is being submitted
ASKED_MOST = 3             # times, over some 15 s, that a cluster is asked for its jobs before it is ended
UNREACHED_MOST = 8         # times, over some 4 min, if it cannot be reached: it may load its model meanwhile


class Launching:
    """Mutable: what is under way and what became of it, each under the lock of its id, which a launch keeps
    until it is submitted (with file mounts: minutes), so that none can follow its termination."""

    def __init__(
        self,
        root: Path,
        owner: str,
        dead_man: DeadMan,
        *,
        limit: float = ATTEMPT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.under_way: dict[str, folder.Output] = {}
        self.terminated: set[str] = set()
        self._root = root
        self._owner = owner
        self._dead_man = dead_man
        self._limit = limit
        self._clock = clock
        self._wall = wall
        self._locks: dict[str, threading.Lock] = {}
        self._given_up: set[str] = set()  # their last attempt did not end
        self._timeless: set[str] = set()  # their cloud has no autodown
        self._asked: dict[str, int] = {}  # how often it was in vain to ask for their jobs

    def __repr__(self) -> str:
        return f"<Launching {sorted(self.under_way)}>"

    def launch(
        self, sky: Sky, id: str, service: Service, env: Mapping[str, str], plan: Plan
    ) -> None:
        """Raises LaunchError. Nothing happens to what was launched before."""
        try:
            while not self._attempt(sky, id, service, env, plan):
                pass
        except LaunchError:
            raise
        except Exception as error:
            if is_other_hardware(sky.exceptions, error):
                self._note(self._root / id, plan=None)   # fits none: the next attempt ends it first
            raise launch_error(sky.exceptions, error) from error

    def end(self, id: str) -> bool:
        """No launch of it follows from here on. False: one is being submitted, and may yet be."""
        self.terminated.add(id)
        if not self._lock(id).acquire(timeout=SUBMIT_SECONDS):
            return False
        self._lock(id).release()
        return True

    def _lock(self, id: str) -> threading.Lock:
        return self._locks.setdefault(id, threading.Lock())

    def _attempt(
        self, sky: Sky, id: str, service: Service, env: Mapping[str, str], plan: Plan
    ) -> bool:
        """Whether it is launched. False: once more, without the timer that its cloud does not have."""
        directory = self._root / id
        with self._lock(id):
            asked = self._submit(sky, id, directory, service, env, plan)
            if asked is None:
                return True
            request, extras = asked
            self.under_way[id] = folder.Output(directory)
        late = self._clock() + self._limit
        try:
            attempt.follow(sky, request, id, directory, lambda: self._clock() >= late)
        except TimeoutError:
            self._given_up.add(id)
            spawn(lambda: sky.get(sky.api_cancel([request], silent=True)), "skypilot cancel")
            raise NoCapacity(
                f"SkyPilot did not end this attempt within {self._limit / 60:.0f} min, and it was given up"
            ) from None
        except Exception as error:
            if extras.timer is None or not attempt.cannot_end_itself(sky.exceptions, error):
                raise
            self._timeless.add(id)
            return False
        finally:
            del self.under_way[id]
        self._note(directory, submitted=True)
        if extras.timer is None:
            self._dead_man.unsupported(id)
        else:
            self._dead_man.armed(id, self._wall())
        return True

    def _submit(
        self, sky: Sky, id: str, directory: Path, service: Service, env: Mapping[str, str], plan: Plan
    ) -> tuple[str, Extras] | None:
        """The launch request, ours or one that is under way; None when there is nothing to do."""
        if id in self.terminated:
            raise LaunchError(f"{id} was terminated before it was launched", permanent=False)
        if id in self.under_way:
            return None
        if id in self._given_up:
            self._down(sky, id, "what it left when it was given up")
        timer = None if id in self._timeless else self._dead_man.minutes
        extras = Extras(labels=attempt.labels(id, service.name, self._owner), timer=timer)
        launches = clusters.launches(sky, id)
        up = not launches and any(map(clusters.was_up, clusters.listed(sky, id)))
        if up and self._has_run(sky, id, directory):
            return None
        if not launches and _on_another_plan(directory, plan):
            self._down(sky, id, "what it left on its last plan")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._note(directory, port=service.port, spec_hash=service.hash, plan=plan.name, submitted=False)
        keeping.keep_secrets(directory, secret_values(service, env, plan))
        if launches:   # by a gateway that has died since: it goes on in the API server
            return launches[0], extras

        def task(asked: Extras) -> Any:
            return build_task(sky, service, env, plan, ports=asked.ports, labels=asked.labels)

        return attempt.submit(sky, id, task, extras)   # anew, or on with what a failed launch left

    def _has_run(self, sky: Sky, id: str, directory: Path) -> bool:
        """Whether `run` was submitted, the machines being there. Raises LaunchError: not known yet."""
        if (folder.record(directory) or {}).get("submitted"):
            return True
        try:
            found = bool(sky.get(sky.queue(id)))
        except Exception as error:   # no runtime is on it, or it cannot be reached at the moment
            if is_away(sky.exceptions, error):
                raise
            asked = self._asked[id] = self._asked.get(id, 0) + 1
            if asked < (UNREACHED_MOST if is_unreachable(sky.exceptions, error) else ASKED_MOST):
                why = f"{id}: whether `run` was submitted cannot be told yet: {reason(error)}"
                raise LaunchError(why, permanent=False) from error
            self._down(sky, id, "a cluster that does not say whether `run` was submitted")
            found = False
        self._asked.pop(id, None)
        return found

    def _down(self, sky: Sky, id: str, what: str) -> None:
        log.info("%s: ending %s", id, what)
        if not clusters.down(sky, id):
            raise LaunchError(f"{id}: {what} is not gone yet", permanent=False)
        self._given_up.discard(id)

    def _note(self, directory: Path, **facts: Any) -> None:
        record = {**(folder.record(directory) or {}), **facts}
        launcher.write_atomically(str(directory / launcher.RECORD), record)


def _on_another_plan(directory: Path, plan: Plan) -> bool:
    """Whether an earlier attempt asked for other hardware: SkyPilot refuses to go on with its remains."""
    record = folder.record(directory)
    return record is not None and record.get("plan", plan.name) != plan.name
