"""Request ids: random, and drawn from the system many at a time (one at a time it costs 1 us)."""

from __future__ import annotations

import os

_BYTES = 16  # of one id
_DRAWN = 256  # ids


class Ids:
    """Each call gives another 32 hexadecimal digits. Mutable: what is drawn and not given yet."""

    def __init__(self) -> None:
        self._drawn = ""

    def __repr__(self) -> str:
        return f"<Ids drawn={len(self._drawn) // (2 * _BYTES)}>"

    def __call__(self) -> str:
        drawn = self._drawn
        if not drawn:
            drawn = os.urandom(_BYTES * _DRAWN).hex()
        self._drawn, given = drawn[: -2 * _BYTES], drawn[-2 * _BYTES :]
        return given
