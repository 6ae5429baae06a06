"""The installer says whether SGLang is there, why it cannot be, and ends in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sglang import install
from tests.sglang.install import Installation, NotHere

SLEEPER = """\
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]])
"""


def running(marker: str) -> bool:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return any(marker.encode() in line for line in lines)


def test_a_folder_without_a_stamp_or_with_an_older_one_is_not_an_installation(tmp_path: Path) -> None:
    assert install.fault(tmp_path) == "not installed"
    (tmp_path / install.STAMP).write_text(json.dumps({"fingerprint": "other"}))
    assert install.fault(tmp_path) == "installed from other requirements"


def test_a_stamp_without_the_packages_is_not_an_installation(tmp_path: Path) -> None:
    (tmp_path / install.STAMP).write_text(json.dumps({"fingerprint": install.fingerprint()}))
    assert str(install.fault(tmp_path)).startswith("its Python does not run")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    assert "PackageNotFoundError" in str(install.fault(tmp_path))


def test_every_version_is_pinned() -> None:
    pins = install.pins()
    assert pins["sglang"] == "0.5.23"
    lines = [
        line
        for name in install.REQUIREMENTS
        for line in (install.HERE / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert {line.partition("==")[0] for line in lines} - set(pins) == {"certifi>=2026.10.19"}


def test_a_step_that_lasts_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    marker = f"skygate-{os.getpid()}"
    step = Installation(tmp_path, time.monotonic() + 1.0)
    with pytest.raises(NotHere, match="a sleep: not within the time limit"):
        step.run("a sleep", sys.executable, "-c", SLEEPER, marker)
    deadline = time.monotonic() + 10
    while running(marker):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # another process


def test_a_step_that_fails_says_its_own_error(tmp_path: Path) -> None:
    step = Installation(tmp_path, time.monotonic() + 30)
    code = "raise SystemExit('ERROR: No matching distribution found for sglang')"
    with pytest.raises(NotHere, match=r"pip: ERROR: No matching distribution found for sglang \(log: "):
        step.run("pip", sys.executable, "-c", code)


def test_our_own_files_are_copied_again_when_they_differ_and_only_then(tmp_path: Path) -> None:
    step = Installation(tmp_path, time.monotonic() + 30)
    script = install.HERE / "engine" / "serve.sh"
    assert step.copied(script)
    assert not step.copied(script)
    assert os.access(tmp_path / "engine/serve.sh", os.X_OK)
    (tmp_path / "engine/serve.sh").write_text("older")
    assert step.copied(script)


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOM", 1 << 60)
    with pytest.raises(NotHere, match="SKYGATE_SGLANG moves it"):
        install.refuse_other_machines(tmp_path)


def test_where_it_goes_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYGATE_SGLANG", str(tmp_path))
    assert install.home() == tmp_path
    monkeypatch.delenv("SKYGATE_SGLANG")
    assert install.home().name == "skygate-sglang"
