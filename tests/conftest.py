"""For all tests: hypothesis draws the same examples every time, and times none of them; tables are shown."""

from __future__ import annotations

import importlib.util
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")

# What the tests' own parent ignores (nohup: hang-ups; a shell's background job: Ctrl-C), every process that a
# test starts would ignore, too.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TEST_COMPILED"):  # `make test-compiled`
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["modules"]:
        found = importlib.util.find_spec(name)
        if found is None or not str(found.origin).endswith(".so"):
            pytest.exit(f"{name} is not compiled: it is {found}", 3)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TEST_COMPILED"):  # mypyc's own await, from Python 3.12 on; ignored by default
        config.addinivalue_line("filterwarnings", r"ignore:the \(type, exc, tb\) signature of throw")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests gave to `record_property("table", text)`."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"\n{report.nodeid}\n{text}")
