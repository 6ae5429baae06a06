"""Measurements -> Markdown. Medians over the rounds; in brackets the ratio to the best peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.rig import Measurement
from bench.targets import targets
from bench.workloads import WORKLOADS

Value = Callable[[Measurement], float | None]


@dataclass(frozen=True, slots=True)
class Column:
    """`added`: what the direct connection takes is subtracted. `ratio`: less is better, so it is compared.
    `fold`: makes one of the rounds' values. `short`: its title in the README's table, if it is there."""

    workload: str
    title: str
    value: Value
    digits: int = 0
    added: bool = False
    ratio: bool = True
    fold: Callable[[list[float]], float] = statistics.median
    short: str = ""


def cpu_us(m: Measurement) -> float | None:
    """CPU time per request or event, all the gateway's processes, microseconds."""
    count = m["events" if WORKLOADS[m["workload"]].unit == "event" else "requests"]
    return float(m["cpu"]) / count * 1e6 if count and m["cpu"] else None


def quantile(name: str, q: str, scale: float = 1.0) -> Value:
    return lambda m: m[name][q] / scale if m[name]["n"] else None


def memory_each(m: Measurement) -> float | None:
    """KiB that the most memory of the run is above that before it, per connection."""
    if not m["rss_peak_kib"]:
        return None
    return float(m["rss_peak_kib"] - m["rss_before_kib"]) / WORKLOADS[m["workload"]].connections


def leaving(q: str) -> Value:
    return lambda m: m["leave_us"][q] / 1000 if q in m.get("leave_us", {}) else None


def fullest(m: Measurement) -> float | None:
    ratio: float | None = m.get("beat_spread", {}).get("max_to_mean")
    return ratio


def flatness(m: Measurement) -> float | None:
    """Percent by which the memory at the end differs from that after the first tenth."""
    rss = m["rss_kib"]
    return 100 * (rss[-1] / rss[len(rss) // 10] - 1) if len(rss) > 20 else None


def cpu_percent(m: Measurement) -> float:
    """CPU time of all the gateway's processes, percent of a core."""
    return 100 * float(m["cpu"]) / float(m["window"])


def faults(m: Measurement) -> float:
    """Requests that failed, never ended, or ended without their end marker."""
    return float(m["errors"] + m["no_done"] + m["unfinished"])


def share(m: Measurement) -> float | None:
    return 100 * m["connections"][0] / sum(m["connections"]) if m["connections"] else None


COLUMNS = (
    Column("A", "CPU per request, µs", cpu_us, 1, short="CPU per request, µs"),
    Column("A32K", "CPU per 32 KB request, µs", cpu_us, 1),
    Column("B", "CPU per event in a burst, µs", cpu_us, 1, short="per event in a burst"),
    Column("C200", "CPU per event, 200 streams, µs", cpu_us, 1, short="per event, 200 slow streams"),
    Column("C1000", "CPU per event, 1,000 streams, µs", cpu_us, 1),
    Column("C5000", "CPU per event, 5,000 streams, µs", cpu_us, 1),
    Column("plain-1", "added latency p50, µs", quantile("latency", "p50"), added=True),
    Column("ttft-1", "added TTFT p50, µs", quantile("ttft", "p50"), added=True, short="added TTFT p50, µs"),
    Column("ttft-1", "added TTFT p99, µs", quantile("ttft", "p99"), added=True, short="p99"),
    Column("C5000", "added chunk delay p50, 5,000 streams, ms", quantile("delay", "p50", 1000), 2, True),
    Column("C1000", "KiB per stream, 1,000 streams", memory_each, 1, short="KiB per stream, of 1,000"),
    Column("C5000", "KiB per stream, 5,000 streams", memory_each, 1, short="of 5,000"),
    Column("leave-stream", "FIN to upstream close p99, ms", leaving("p99"), 1, ratio=False),
    Column("leave-queued", "the same before the first byte, ms", leaving("p99"), 1, ratio=False),
    Column("leave-plain", "the same, plain requests, ms", leaving("p99"), 1, ratio=False),
    Column("hold", "held: KiB each", memory_each, 1, ratio=False),
    Column("hold", "held: CPU, %", cpu_percent, 1, ratio=False),
    Column("hold", "fullest 100 ms of beats / mean", fullest, 1, ratio=False),
    Column("hold-herd", "held at once: KiB each", memory_each, 1, ratio=False),
    Column("hold-herd", "held at once: CPU, %", cpu_percent, 1, ratio=False),
    Column("hold-herd", "held at once: fullest 100 ms / mean", fullest, 1, ratio=False),
    Column("C200", "smallest worker's share of 200, %", share, ratio=False),
    Column("idle", "idle: CPU, %", cpu_percent, 2, ratio=False),
    Column("idle", "idle: MiB", lambda m: m["rss_peak_kib"] / 1024, ratio=False),
    Column("idle", "start to first answer, s", lambda m: m["start_s"], 1, ratio=False),
    Column("soak", "memory over 1,000,000 requests, %", flatness, 1, ratio=False),
)  # fmt: skip


class Values:
    """The figure of each target in each column, over its rounds."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.found: dict[tuple[str, str], list[Measurement]] = {}
        for m in measurements:
            self.found.setdefault((m["target"], m["workload"]), []).append(m)
        self.names = list(dict.fromkeys(name for name, _ in self.found if name != "direct"))
        self._kinds = {name: target.kind for name, target in targets().items()}

    def kind(self, name: str) -> str:
        """As `Target.kind`."""
        return self._kinds.get(name, "")

    def get(self, name: str, column: Column) -> float | None:
        """None: it was not measured."""
        value = self._folded(name, column)
        if value is None or not column.added:
            return value
        direct = self._folded("direct", column)
        return value - direct if direct is not None else None

    def best(self, column: Column, *kinds: str) -> float | None:
        """The least of the targets of these kinds."""
        found = [self.get(name, column) for name in self.names if self.kind(name) in kinds]
        return min((value for value in found if value is not None and value > 0), default=None)

    def _folded(self, name: str, column: Column) -> float | None:
        values = [column.value(m) for m in self.found.get((name, column.workload), [])]
        known = [value for value in values if value is not None]
        return column.fold(known) if known else None


def table(measurements: Iterable[Measurement]) -> str:
    """All figures in Markdown, a gateway to a column; ours beside nginx and the best Rust router."""
    values = Values(measurements)
    figures = [c for c in COLUMNS if any(values.get(n, c) is not None for n in values.names)]
    ours = [name for name in values.names if values.kind(name) == "ours"]
    head = ["", *values.names, *(f"{n} / {base}" for n in ours for base in ("nginx", "best Rust router"))]
    rows = [head, ["---"] * len(head)]
    for c in figures:
        bases = values.get("nginx", c), values.best(c, "rust")
        beside = [_ratio(values.get(name, c), base, c) for name in ours for base in bases]
        rows.append([c.title, *(cell(values, name, c) for name in values.names), *beside])
    rows.append(["errors", *(_faults(values.found, name) for name in values.names), *[""] * 2 * len(ours)])
    return markdown(rows)


def markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(values: Values, name: str, column: Column) -> str:
    """The figure, and in brackets its ratio to the best peer's."""
    value = values.get(name, column)
    if value is None:
        return "-"
    text, ratio = f"{value:,.{column.digits}f}", _ratio(value, values.best(column, "peer", "rust"), column)
    return f"{text} ({ratio})" if ratio else text


def _ratio(value: float | None, base: float | None, column: Column) -> str:
    if value is None or not base or base < 0 or not column.ratio:
        return ""
    ratio = value / base
    return f"{ratio:,.{2 if abs(ratio) < 10 else 1 if abs(ratio) < 100 else 0}f}"


def _faults(found: dict[tuple[str, str], list[Measurement]], name: str) -> str:
    """Requests that failed, never ended, or ended without their end marker; and closes that never came."""
    mine = [m for (target, _), ms in found.items() if target == name for m in ms]
    bad = sum(faults(m) for m in mine)
    never = sum(m.get("leave_us", {}).get("never", 0) for m in mine)
    restarted = sum(not m["same_processes"] for m in mine)
    words = [f"{bad:,.0f}"] + [f"{never:,} not closed"] * bool(never)
    words += ["process restarted"] * bool(restarted)
    return ", ".join(words)
