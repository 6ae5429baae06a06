"""Whose gateways the tests are."""

import os

# On the bed the processes of pytest-xdist share one SkyPilot: each is an owner of its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
OWNER = f"0badca{_WORKER:02x}" if "SKYGATE_BED" in os.environ else "0badcafe"
