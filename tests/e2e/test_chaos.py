"""2,000 requests while everything breaks (tests/chaos): nothing is lost, told twice, or told wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_thousand_requests_under_faults_keep_every_promise() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--requests", "2000", "--rate", "150", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [line.split() for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert [name for *name, _ in verdicts] == [
        ["board"], ["clients"], ["well", "again"], ["ends"], ["runs"], ["sockets"], ["processes"], ["log"],
    ]  # fmt: skip
