"""Request ids."""

from __future__ import annotations

import re

from gateway.ids import Ids


def test_ids_are_32_hexadecimal_digits_and_never_the_same() -> None:
    ids = Ids()
    given = [ids() for _ in range(2000)]
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in given)
    assert len(set(given)) == len(given)
