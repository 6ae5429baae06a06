"""How the ending of machines goes, in lines for the person who waits for it and pays meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

EVERY: Final = 15.0  # s until the same words are said again
LEAST: Final = 1.0  # s; nothing is said of a shorter time


class NotEnded(Exception):
    """Machines that are not verified gone within the time given. The text is one line that names each."""


class Progress:
    """Mutable: what was said of each machine, and when."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._begun: dict[str, float] = {}
        self._said: dict[str, tuple[str, float]] = {}

    def __repr__(self) -> str:
        return f"<Progress {sorted(self._said)}>"

    def show(self, machines: Mapping[str, str]) -> None:
        """`machines`: what is still there, and what it does. Says what is new, and at times repeats it."""
        now = self._clock()
        for id, words in machines.items():
            begun = self._begun.setdefault(id, now)
            before, at = self._said.get(id, ("", 0.0))
            if words != before or now - at >= EVERY:
                self._said[id] = words, now
                self._say(f"ending {id}: {words}{_after(now - begun)}")
        for id in [id for id in self._said if id not in machines]:
            del self._said[id]
            self._say(f"{id} is gone{_after(now - self._begun[id])}")


def _after(seconds: float) -> str:
    if seconds < LEAST:
        return ""
    return f", after {seconds:.0f} s" if seconds < 90 else f", after {seconds / 60:.0f} min"


def machines(status: Mapping[str, Any]) -> dict[str, str]:
    """What GET /admin/status says is still there, replicas and strays: id -> what it does, in words."""
    found = {}
    for service in status["services"]:
        for replica in service["replicas"]:
            failed = f" ({replica['reason']})" if replica.get("end_failures") else ""
            found[str(replica["id"])] = f"{replica['state']}{failed}"
    for stray in status.get("strays", ()):
        found[str(stray["id"])] = str(stray["reason"])
    return found


def not_ended(left: Mapping[str, str], seconds: float) -> NotEnded:
    """`left`: as `machines`."""
    names = ", ".join(f"{id}: {words}" if words else id for id, words in sorted(left.items()))
    return NotEnded(f"not verified gone{_after(seconds).removeprefix(',')}, and billing on: {names}")
