"""What clusters cost an hour, without letting anybody wait for a catalogue.

SkyPilot keeps the catalogue of a cloud on disk and fetches it when it is missing or some hours old, by a
request without a limit (0.14.1, sky/catalog/common.py: read_catalog): minutes, each time, behind a firewall
that drops it. So each price is looked up in a thread, one at a time; until it has come the last one holds.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

from replicas.provisioners import clusters

AGAIN_SECONDS: Final = 60.0
WAIT_SECONDS: Final = 2.0   # for one that is on disk


class Prices:
    """Mutable, by any thread: what was found, when it was looked up, and whether somebody looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[tuple[str, str], tuple[float, float | None]] = {}
        self._looking = threading.Lock()

    def __repr__(self) -> str:
        return f"<Prices of {len(self._found)} clusters>"

    def of(self, cluster: Any) -> float | None:
        """Dollars per hour of all its nodes; None: not known (yet). Takes WAIT_SECONDS at most."""
        key = cluster.name, str(cluster.status.value)   # a cluster that is being made changes places
        now = self._clock()
        at, price = self._found.get(key, (float("-inf"), None))
        if cluster.handle is None or now - at < AGAIN_SECONDS or not self._looking.acquire(blocking=False):
            return price
        done = threading.Event()

        def look() -> None:
            try:
                self._found[key] = now, clusters.hourly_cost(cluster)
            finally:
                self._looking.release()
                done.set()

        threading.Thread(target=look, name="skypilot price", daemon=True).start()
        done.wait(WAIT_SECONDS)
        return self._found.get(key, (at, price))[1]

    def keep(self, names: set[str]) -> None:
        """Forget all others."""
        for key in [key for key in list(self._found) if key[0] not in names]:
            self._found.pop(key, None)
