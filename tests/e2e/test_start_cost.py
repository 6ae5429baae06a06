"""What a start takes until the first byte is served, in CPU: a clock would tell of the machine's other
programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Gateways = Callable[..., Any]
MOST_CPU_SECONDS = 2.5  # 1.8 where others crowd the caches; started side by side, on a clock it is less
HEAVY = ("sky", "openai", "httpx", "pydantic", "yaml", "rich", "sqlite3", "fastapi", "numpy")
READS_YAML = ("pydantic", "yaml", "sqlite3")  # and keeps a table: the controller
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS  # its own and its reaped children's, user and system


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_all_processes_together_use_little_until_the_first_byte_is_served(
    gateways: Gateways,
) -> None:
    gateway = gateways(min=0)
    pids = [gateway.process.pid, *gateway.children("gateway.")]
    assert len(pids) == 3
    used = {pid: cpu_seconds(pid) for pid in pids}
    print(f"CPU until ready: {sum(used.values()):.2f} s, of {sorted(used.values())}")
    assert sum(used.values()) < MOST_CPU_SECONDS


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        ("gateway.app", HEAVY),
        ("gateway.admin, gateway.assembly", tuple(name for name in HEAVY if name not in READS_YAML)),
    ],
    ids=["worker", "controller"],
)
def test_a_process_imports_nothing_that_it_does_not_need_to_serve(
    modules: str, unneeded: tuple[str, ...], tmp_path: Path
) -> None:
    code = f"import sys, {modules}; print([m for m in {unneeded} if m in sys.modules])"
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
