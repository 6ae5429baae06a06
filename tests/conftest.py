"""For all tests: hypothesis draws the same examples every time, and times none of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")
