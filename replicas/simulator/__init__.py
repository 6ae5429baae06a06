"""An engine shaped like SGLang 0.5.23 on its HTTP port, without a GPU: for development, demos and tests.

As a process: `python -m replicas.simulator --port 30000`. In a test: `async with Simulator(SimConfig()) as
sim: sim.url`.
"""

from __future__ import annotations

from .config import SimConfig
from .server import Simulator

__all__ = ["SimConfig", "Simulator"]
