"""What a run is told as: the heading, all its figures, the bars; and its part of the READMEs."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from bench.bars import verdicts
from bench.rig import Measurement
from bench.table import COLUMNS, Values, cell, markdown, table
from bench.targets import HERE

README, OWN_README = HERE.parent / "README.md", HERE / "README.md"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->"
SHOWN = [column for column in COLUMNS if column.short]
LABELS = {
    "gateway-2w": "gateway, two workers",
    "gateway-compiled": "gateway, compiled",
    "nginx-2w": "nginx, two workers",
    "skyserve": "SkyServe's balancer",
}


class MixedRuns(ValueError):
    """Measurements of different commits or machines, which say nothing about each other."""


def where(command: str) -> dict[str, str]:
    """The machine, the code, and the command that measures them, as each measurement keeps them."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": f"commit {commit or 'unknown'}",
        "machine": f"{os.cpu_count()} CPUs ({cpu[1] if cpu else platform.machine()})",
        "command": f"`{command}`",
        "system": f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}",
    }


def report(measurements: Sequence[Measurement]) -> str:
    """Everything, as Markdown."""
    if not measurements:
        return "nothing was measured"
    parts = [heading(measurements), table(measurements), verdicts(measurements)]
    return "\n\n".join(part for part in parts if part)


def summary(measurements: Sequence[Measurement]) -> str:
    """What the README of the project shows of a run, as Markdown: a gateway to a row."""
    values = Values(measurements)
    head = ["", *(c.short for c in SHOWN)]
    rows = [[_label(values, name), *(cell(values, name, c) for c in SHOWN)] for name in values.names]
    return f"{heading(measurements)}\n\n{markdown([head, ['---'] * len(head), *rows])}"


def heading(measurements: Sequence[Measurement]) -> str:
    """When, where and of what the figures are, and what to think of them."""
    days = sorted({m["at"][:10] for m in measurements})
    words = [" to ".join(dict.fromkeys(map(_day, (days[0], days[-1]))))]
    words += [" and ".join(_all(measurements, name)) for name in ("commit", "machine", "system")]
    return f"{', '.join(words)}; {_quality(measurements)} In brackets the ratio to the best peer."


def _all(measurements: Iterable[Measurement], name: str) -> list[str]:
    return sorted({m["where"][name] if "where" in m else f"{name} unknown" for m in measurements})


def _quality(measurements: Iterable[Measurement]) -> str:
    """Over how many rounds, and how busy others kept the CPU that was measured."""
    found = Values(measurements).found
    others = []
    for (target, _), rounds in found.items():
        busy = [(m, next(iter(m["busy"].values()), None)) for m in rounds if target != "direct"]
        others += [first - m["cpu"] / m["window"] for m, first in busy if first is not None]
    most = max(map(len, found.values()), default=0)
    text = f"medians of {most} round{'s' * (most != 1)}"
    if commands := sorted({m["where"]["command"] for ms in found.values() for m in ms if "where" in m}):
        text += f" of {' and '.join(commands)}"
    if others:
        percent = 100 * max(0.0, statistics.median(others))
        text += f", others used {percent:.0f} % of the gateway's CPU (median)"
    return f"{text}."


def _day(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%d %B %Y}".lstrip("0")


def _label(values: Values, name: str) -> str:
    """A peer goes by its version at that time."""
    label, comma, how = LABELS.get(name, name).partition(",")
    if values.kind(name) == "ours":
        return f"{label}{comma}{how}"
    mine = [m for (target, _), rounds in values.found.items() if target == name for m in rounds]
    versions = sorted({m.get("version", "").rpartition(" ")[2] for m in mine} - {""})
    return f"{label} {', '.join(versions)}".rstrip() + comma + how


def publish(measurements: Sequence[Measurement], readme: Path = README, own: Path = OWN_README) -> None:
    """Into both READMEs, between their marks: the summary, and everything.

    Raises ValueError where that cannot be done, MixedRuns for one.
    """
    for name in ("commit", "machine", "system"):
        if len(found := _all(measurements, name)) > 1:
            raise MixedRuns(f"these measurements are of {' and of '.join(found)}: publish one run")
    measured = {m["workload"] for m in measurements if m["target"] == "gateway"}
    if missing := sorted({column.workload for column in SHOWN} - measured):
        raise ValueError(f"the README shows more than this run has; not measured: {', '.join(missing)}")
    pages: list[tuple[Path, str]] = []
    for path, text in ((readme, summary(measurements)), (own, report(measurements))):
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{path} has no {BEGIN.strip()} ... {END}")
        pages.append((path, f"{before}{begin}{text}\n{end}{after}"))
    for path, page in pages:
        path.write_text(page, encoding="utf-8")
