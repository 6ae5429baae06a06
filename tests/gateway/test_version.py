"""Which skygate runs, and whether its hot modules are compiled, can be asked and is in the log."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from gateway import relay
from gateway.version import build


def test_the_version_says_whether_the_hot_modules_are_compiled(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = "compiled" if "TEST_COMPILED" in os.environ else build()
    assert done.stdout == f"gateway, version {importlib.metadata.version('skygate')}, {said}\n", done.stderr


def test_it_is_said_of_the_modules_that_are_in_use() -> None:
    assert build() == ("interpreted" if str(relay.__file__).endswith(".py") else "compiled")
