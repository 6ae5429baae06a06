"""Executors of the bed's API server import networkx before they serve: bed.sh puts this folder on their path.

SkyPilot 0.14.1 imports it within the first launch of each, where a cancelled request interrupts it. The half
that stays breaks every later launch of that executor ("module 'networkx' has no attribute ..."; SkyPilot's
pull request 10152). The gateway rides it out, as it should; a test that counts launches fails of it.
"""

import importlib.util
import sys

if "--multiprocessing-fork" in sys.orig_argv and importlib.util.find_spec("networkx"):
    import networkx  # noqa: F401
