"""What the gateway is to reach, and whether these measurements show it.

A bar judges the build that `pip install .` gives, the interpreted one. Those against peers are there once
more for the compiled one, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench import table
from bench.rig import Measurement
from bench.table import Column, Values

OURS, TWO, COMPILED = "gateway", "gateway-2w", "gateway-compiled"
RUST, NGINX = "best Rust router", "nginx"


@dataclass(frozen=True, slots=True)
class Bar:
    """`most`: of the value, or of its ratio to `base`. `least`: of the value. None: no such bound."""

    sentence: str
    column: Column
    most: float | None
    base: str = ""
    target: str = OURS
    least: float | None = None


def _column(workload: str, value: table.Value, *, added: bool = False) -> Column:
    return Column(workload, "", value, added=added)


_PER_UNIT = {name: _column(name, table.cpu_us) for name in ("A", "B", "C200")}
_TTFT = _column("ttft-1", table.quantile("ttft", "p50"), added=True)
_SHARE = _column("C200", table.share)
_FAULTS = Column("C5000", "", table.faults, fold=max)  # those of one round are not outvoted
_DELAY = _column("C5000", table.quantile("delay", "p50"), added=True)

_BARS = (
    Bar("CPU per request", _PER_UNIT["A"], 0.7, RUST),
    Bar("CPU per event, slow streams", _PER_UNIT["C200"], 0.95, RUST),
    Bar("CPU per event, bursts", _PER_UNIT["B"], 0.6, RUST),
    Bar("added TTFT p50", _TTFT, 1.7, NGINX),
    Bar("stretch: CPU per request", _PER_UNIT["A"], 3.0, NGINX),
    Bar("stretch: CPU per event, slow streams", _PER_UNIT["C200"], 1.1, NGINX),
    Bar("5,000 streams: faults", _FAULTS, 0),
    Bar("5,000 streams: added delay of a chunk p50", _DELAY, 2.0, NGINX),
    Bar("two workers: CPU per request", _PER_UNIT["A"], 1.1, OURS, TWO),
    Bar("two workers: CPU per event, slow streams", _PER_UNIT["C200"], 1.1, OURS, TWO),
    Bar("two workers: the smaller's share of 200, %", _SHARE, None, target=TWO, least=35),
    Bar("held over 8 s: KiB each", _column("hold", table.memory_each), 25),
    Bar("held over 8 s: CPU, % of a core", _column("hold", table.cpu_percent), 10),
    Bar("held over 8 s: fullest 100 ms of beats / mean", _column("hold", table.fullest), 2),
    Bar("held at once: CPU, % of a core", _column("hold-herd", table.cpu_percent), 10),
    Bar("held at once: fullest 100 ms of beats / mean", _column("hold-herd", table.fullest), 2),
    Bar("FIN to upstream close p99, ms: in mid-stream", _column("leave-stream", table.leaving("p99")), 50),
    Bar("the same before the first byte", _column("leave-queued", table.leaving("p99")), 50),
    Bar("the same, plain requests", _column("leave-plain", table.leaving("p99")), 50),
    Bar("memory over 1,000,000 requests, %", _column("soak", table.flatness), 5, least=-5),
    Bar("start to first answer, s", _column("idle", lambda m: m["start_s"]), 2),
)  # fmt: skip

BARS = _BARS + tuple(
    replace(bar, sentence=f"compiled: {bar.sentence}", target=COMPILED)
    for bar in _BARS
    if bar.target == OURS and bar.base in (RUST, NGINX)
)


def verdicts(measurements: Iterable[Measurement]) -> str:
    """One line of Markdown for each bar that something was measured for; "" for none."""
    values = Values(measurements)
    lines = [line for bar in BARS if (line := _verdict(bar, values))]
    return "\n".join(["| bar | measured | bound | |", "| --- | --- | --- | --- |", *lines]) if lines else ""


def _verdict(bar: Bar, values: Values) -> str:
    value = values.get(bar.target, bar.column)
    if value is None:
        return ""
    unit = ""
    if bar.base:
        base = values.best(bar.column, "rust") if bar.base == RUST else values.get(bar.base, bar.column)
        if not base or base <= 0:
            return ""
        value, unit = value / base, f" x {bar.base}"
    bounds, held = [], True
    if bar.least is not None:
        bounds.append(f"at least {bar.least:g}")
        held = value >= bar.least
    if bar.most is not None:
        bounds.append(f"at most {bar.most:g}")
        held = held and value <= bar.most
    verdict = "held" if held else "**missed**"
    return f"| {bar.sentence} | {value:.3g}{unit} | {', '.join(bounds)} | {verdict} |"
