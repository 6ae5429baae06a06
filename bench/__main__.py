"""`python -m bench run | table | readme | peers`: see README.md here, or --help."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import install
from bench.report import publish, report, where
from bench.rig import BenchError, Measurement, rig
from bench.table import cpu_us
from bench.targets import HERE, Target, targets
from bench.workloads import USUAL, WORKLOADS, Workload

RESULTS = HERE / "results"


def main() -> int:
    options = arguments().parse_args()
    if options.command == "peers":
        return 1 if install.install(options.names) else 0
    if options.command == "table":
        print(report(_read(options.files)))
        return 0
    if options.command == "readme":
        try:
            publish(_read(options.files))
        except ValueError as error:
            sys.exit(str(error))
        return 0
    return run(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure, and print the table")
    cpus = sorted(os.sched_getaffinity(0))
    one.add_argument("-w", "--workloads", default=",".join(USUAL), help=f"of {', '.join(WORKLOADS)}")
    one.add_argument("-t", "--targets", help=f"of {', '.join(targets())} (default: all that are installed)")
    one.add_argument("-r", "--rounds", type=int, default=3)
    one.add_argument("-o", "--out", type=Path, help="file to add to (default: a new one in results/)")
    one.add_argument("--gateway-cpu", type=int, default=cpus[0], help="-1: any")
    one.add_argument("--load-cpu", type=int, default=cpus[-1], help="-1: any")
    one.add_argument("--priority", type=int, default=0, help="niceness: -10 on a busy machine")
    two = commands.add_parser("table", help="print the table of earlier measurements")
    two.add_argument("files", nargs="+", type=Path)
    shown = commands.add_parser("readme", help="put the table of a run into README.md and bench/README.md")
    shown.add_argument("files", nargs="+", type=Path)
    three = commands.add_parser("peers", help="install the peers into the cache folder")
    known = ", ".join([*install.DEBIAN, *install.PYTHON])
    three.add_argument("names", nargs="*", help=f"of {known} (default: all)")
    return parser


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    workloads = _chosen(options.workloads, WORKLOADS)
    chosen = _targets(options.targets)
    out = options.out or RESULTS / time.strftime("%Y%m%d-%H%M%S.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    here = where(same_again(options))
    cpus = [None if cpu < 0 else cpu for cpu in (options.gateway_cpu, options.load_cpu)]
    try:
        with rig(cpus[0], cpus[1], options.priority) as bench:
            for round in range(options.rounds):
                # Every other round backwards: a machine that gets busier favours nobody.
                for target in chosen if round % 2 == 0 else chosen[::-1]:
                    try:
                        for measurement in bench.run(target, workloads):
                            measurement |= {"round": round, "where": here}
                            _keep(measurement, out)
                    except BenchError as error:
                        print(f"FAILED {target.name}: {error}", flush=True)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was measured so far:")
    if out.exists():
        print(f"\n{report(_read([out]))}\n\nMeasurements: {out}")
    return 0


def same_again(options: argparse.Namespace) -> str:
    """How to measure the same again, wherever the results go."""
    defaults, words = arguments().parse_args(["run"]), []
    for letter, name in (("w", "workloads"), ("t", "targets"), ("r", "rounds"), ("-priority", "priority")):
        if (value := getattr(options, name)) != getattr(defaults, name):
            words.append(f"-{letter} {value}")
    return f'make bench ARGS="{" ".join(words)}"' if words else "make bench"


def _chosen(text: str, known: dict[str, Workload]) -> list[Workload]:
    if unknown := [name for name in text.split(",") if name not in known]:
        sys.exit(f"no such workload: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def _targets(text: str | None) -> list[Target]:
    """`direct` is always the first: added latency needs it."""
    known = targets()
    names = text.split(",") if text else [name for name, target in known.items() if target.installed]
    for name in names:
        if name not in known:
            sys.exit(f"no such target: {name}; there are {', '.join(known)}")
        if not known[name].installed:
            sys.exit(f"{name} is not installed: {known[name].installed_by}")
    return [known[name] for name in dict.fromkeys(["direct", *names])]


def _keep(m: Measurement, out: Path) -> None:
    with out.open("a") as file:
        file.write(json.dumps(m) + "\n")
    unit, us = WORKLOADS[m["workload"]].unit, cpu_us(m)
    words: list[Any] = [m["at"][11:], f"r{m['round']}", f"{m['target']:14}", f"{m['workload']:12}"]
    words.append(f"{m[unit + 's'] / m['window']:9,.0f} {unit}s/s  CPU {100 * m['cpu'] / m['window']:5.1f} %")
    words.append(f"{us:8.1f} us/{unit}" if us else "")
    seen = [(name, m[name]) for name in ("latency", "ttft", "delay") if m[name]["n"]]
    words += [f"{name} {durations['p50']}/{durations['p99']} us" for name, durations in seen]
    if "leave_us" in m:
        words.append("closed after " + " ".join(f"{k}={v:.0f}" for k, v in m["leave_us"].items()))
    words.append(f"errors {m['errors']} unfinished {m['unfinished']} RSS {m['rss_peak_kib'] // 1024} MiB")
    words.append("busy " + "/".join(f"{value:.2f}" for value in m["busy"].values()))
    print("  ".join(words), flush=True)


def _read(files: Iterable[Path]) -> list[Measurement]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


if __name__ == "__main__":
    sys.exit(main())
