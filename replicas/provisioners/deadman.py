"""The dead-man's timers of clusters: SkyPilot's autodown, which is told to wait for nothing, again and again.

On the head node SkyPilot's skylet looks once a minute whether the last order is `minutes` old and then ends
the cluster, whatever runs on it (0.14.1, sky/skylet/events.py: StopEvent; each order begins the time anew). A
launch gives the first order; a gateway that lives repeats it every ARM_SECONDS; when all of us are gone, the
cluster outlives us by the limit and not more. A `run` that crashed meanwhile ends with it.

Clouds without autodown (NotSupportedError) have no timer. On Slurm it acts by `scancel` on the head node.
"""
from __future__ import annotations

import functools
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from replicas.provisioners import launcher, threads

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky

log = logging.getLogger(__name__)

LIMIT: Final = 7200.0   # s
ARM_SECONDS: Final = 600.0
AGAIN_SECONDS: Final = 60.0   # after one that failed
HUNG_SECONDS: Final = 300.0   # an order that has no answer by then has none; doubling, so that few wait
HUNG_MOST: Final = 1800.0
FILE: Final = "dead-man.json"


@dataclass(slots=True)
class _Timer:
    """`acts_at`: unix seconds; None: not armed as far as is known, or `none`: the cloud has no such thing."""

    acts_at: float | None = None
    none: bool = False
    due: float = float("-inf")   # the next order
    failed: bool = False
    unanswered: int = 0   # orders in a row


class DeadMan:
    """Mutable: the timers, under a lock. They are on disk as well, for the next gateway to count on."""

    def __init__(
        self,
        root: Path,
        limit: float = LIMIT,
        *,
        clock: Callable[[], float] = time.time,
        spawn: Callable[[Callable[[], None], str], object] = threads.spawn,
    ) -> None:
        self.minutes = math.ceil(limit / 60)
        self._root = root
        self._clock = clock
        self._spawn = spawn
        self._lock = threading.Lock()
        self._timers: dict[str, _Timer] = {}
        self._gone: set[str] = set()   # an order that was under way may yet be answered

    def __repr__(self) -> str:
        return f"<DeadMan {self.minutes} min, {len(self._timers)} clusters>"

    def acts_at(self, id: str) -> float | None:
        """Unix seconds when the cluster ends itself unless it is armed again; None: it does not."""
        timer = self._timers.get(id)   # without the lock: somebody may be writing to a slow disk under it
        return (timer or self._read(id)).acts_at

    def armed(self, id: str, at: float) -> None:
        """An order that was given at `at` (unix seconds) has arrived."""
        with self._lock:
            again = self._timer(id).failed
            self._keep(id, _Timer(at + 60 * self.minutes, due=at + ARM_SECONDS))
        if again:
            log.warning("%s: its dead-man's timer is armed again", id)

    def unsupported(self, id: str) -> None:
        """Its cloud has no autodown."""
        with self._lock:
            self._keep(id, _Timer(none=True, due=math.inf))

    def forget(self, id: str) -> None:
        """It is gone, for ever: an id is not used again."""
        with self._lock:
            self._gone.add(id)
            self._timers.pop(id, None)
            (self._root / id / FILE).unlink(missing_ok=True)

    def known(self) -> list[str]:
        """Those that were ever armed and not forgotten, by an earlier gateway too."""
        return [path.parent.name for path in self._root.glob(f"*/{FILE}")]

    def keep(self, sky: Sky, ids: Iterable[str]) -> None:
        """Arm what is due, of clusters that are up; returns at once."""
        now = self._clock()
        for id in ids:
            with self._lock:
                timer = self._timer(id)
                # No pause is longer: the clock was set back, and the cluster's own was not.
                if now < timer.due and (timer.none or timer.due - now <= HUNG_MOST):
                    continue
                timer.due = now + min(HUNG_MOST, HUNG_SECONDS * 2.0 ** min(timer.unanswered, 16))
                timer.unanswered += 1
            self._spawn(functools.partial(self._arm, sky, id, now), "skypilot dead-man")

    def _arm(self, sky: Sky, id: str, now: float) -> None:
        try:
            sky.get(sky.autostop(id, self.minutes, wait_for=wait_for_nothing(sky), down=True))
        except sky.exceptions.NotSupportedError:
            self.unsupported(id)
        except Exception as error:
            with self._lock:
                timer = self._timer(id)
                first, timer.failed, timer.due = not timer.failed, True, self._clock() + AGAIN_SECONDS
                timer.unanswered = 0
            if first:
                log.warning("%s: its dead-man's timer could not be armed again: %s", id, error)
        else:
            self.armed(id, now)

    def _timer(self, id: str) -> _Timer:
        found = self._timers.get(id)
        if found is None:
            found = self._timers[id] = self._read(id)
        return found

    def _read(self, id: str) -> _Timer:
        """As the last gateway left it, and due at once."""
        try:
            said = json.loads((self._root / id / FILE).read_bytes())
            return _Timer(said["acts_at"], said["none"])
        except (OSError, ValueError, KeyError, TypeError):
            return _Timer()

    def _keep(self, id: str, timer: _Timer) -> None:
        if id in self._gone:
            return
        self._timers[id] = timer
        folder = self._root / id
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            launcher.write_atomically(str(folder / FILE), {"acts_at": timer.acts_at, "none": timer.none})
        except OSError as error:   # a full disk: the next gateway counts from its own first order
            log.warning("%s: %s", id, error)


def wait_for_nothing(sky: Sky) -> object:
    """Else a `run` that never ends, as a server's, would put the timer off for ever."""
    return sky.skylet.autostop_lib.AutostopWaitFor.NONE
