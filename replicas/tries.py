"""What failed is tried again, later each time: launches and ends."""

from __future__ import annotations

from typing import Final

PAUSE_MOST: Final = 300.0  # s between two tries of anything


def back_off(failed: int, first: float, most: float) -> float:
    """Seconds from the `failed`th failure in a row (1 = the first) to the next try: `first`, doubling."""
    return min(most, first * 2.0 ** min(failed - 1, 16))


class Tries:
    """Mutable, by its owner: how often each id has failed, and until when it is let alone (unix seconds)."""

    def __init__(self) -> None:
        self._failed: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Tries {self._failed}>"

    def failed(self, id: str, now: float, first: float, most: float) -> float:
        """One more failure; returns the pause after it, seconds."""
        self._failed[id] = self.failures(id) + 1
        return self.pause(id, now, back_off(self._failed[id], first, most))

    def pause(self, id: str, now: float, seconds: float) -> float:
        """Let it alone for so long, which is returned."""
        self._not_before[id] = now + seconds
        return seconds

    def failures(self, id: str) -> int:
        return self._failed.get(id, 0)

    def due(self, id: str, now: float) -> bool:
        """No pause is longer than PAUSE_MOST: one that seems to be comes of a clock that was set back."""
        return not 0 < self._not_before.get(id, 0.0) - now <= PAUSE_MOST

    def forget(self, id: str) -> None:
        self._failed.pop(id, None)
        self._not_before.pop(id, None)
