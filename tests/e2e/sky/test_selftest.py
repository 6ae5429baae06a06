"""`gateway selftest` on a real SkyPilot: what a newcomer to a cloud runs first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import HF_TOKEN, ROOT, YAML

pytestmark = pytest.mark.sky


def test_selftest_launches_asks_loses_recovers_goes_to_zero_and_verifies(
    site: Any, tmp_path: Path, lap: Any
) -> None:
    file = tmp_path / "bed.yaml"
    file.write_text(YAML.format(name="selftest", root=ROOT, here=Path(__file__).parent, nodes=1, before=":"))
    command = [
        sys.executable, "-m", "gateway", "selftest", str(file), "--provisioner", "skypilot", "--price", "1",
        "--max-cost", "2", "--idle-timeout", "10", "--secret", "HF_TOKEN",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, "HF_TOKEN": HF_TOKEN},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout, done.stderr[-8000:])
    lap("gateway selftest")
    assert done.returncode == 0
    assert "PASSED" in done.stdout
    assert site.clusters("selftest") == []
    assert site.jobs("selftest") == {}
