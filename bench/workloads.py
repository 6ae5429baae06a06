"""What is asked of a gateway: a workload is a setting of the upstream and options of the load generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["request", "event"]


@dataclass(frozen=True, slots=True)
class Workload:
    """Times in seconds unless the name says otherwise; `connections` = streams, for streaming workloads."""

    name: str
    sentence: str
    connections: int
    seconds: float  # length of the measuring window
    warm: float = 1.0  # before it
    ramp: float = 0.0  # over which the connections are opened
    grace: float = 10.0  # for answers still to come after the window
    stream: bool = False
    once: bool = False  # each connection sends one request
    events: int = 1  # per stream
    interval_us: int = 0
    delay_us: int = 0  # before the first byte
    prompt: int = 400  # bytes
    total: int = 0  # requests at most
    abort_after_events: int = 0
    abort_after_ms: int = 0
    cold: bool = False  # no replica is ready: everything is held
    fresh: bool = False  # its memory counts: in a start of its own, for no process gives all of it back
    unit: Unit = "request"  # what CPU time is divided by

    def upstream_query(self) -> str:
        health = 503 if self.cold else 200
        return f"set?n={self.events}&interval={self.interval_us}&delay={self.delay_us}&health={health}"

    def loadgen_options(self) -> list[str]:
        options: dict[str, object] = {
            "connections": self.connections,
            "warm": self.warm,
            "seconds": self.seconds,
            "ramp": self.ramp,
            "grace": self.grace,
            "pad": self.prompt,
            "total": self.connections if self.once else self.total,
            "abort-after-events": self.abort_after_events,
            "abort-after-ms": self.abort_after_ms,
        }
        words = [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
        return words + ["--stream"] * self.stream + ["--beats"] * self.cold


_ALL = (
    Workload("idle", "nothing to do", 1, 5.0, warm=2.0, total=1),
    Workload("plain-1", "one connection, plain requests: latency at no load", 1, 2.0, warm=0.5),
    Workload(
        "ttft-1", "one connection, streams of 5 events, 2 ms apart: TTFT at no load", 1, 4.0, warm=0.5,
        stream=True, events=5, interval_us=2_000,
    ),
    Workload("A", "plain requests over 64 kept-alive connections: CPU per request", 64, 4.0),
    Workload("A32K", "the same with prompts of 32 KB", 64, 3.0, prompt=32_000),
    Workload(
        "B", "64 streams of 100 events without pause, many in one read: CPU per event in bursts", 64, 3.0,
        grace=20.0, stream=True, events=100, unit="event",
    ),
    Workload(
        "C200", "200 streams, 20 events/s each: CPU per event, none share a read", 200, 6.0,
        warm=1.5, ramp=1.0, grace=25.0, stream=True, once=True, events=160, interval_us=50_000, unit="event",
    ),
    Workload(
        "C1000", "1,000 streams, 20 events/s each", 1000, 6.0,
        warm=3.5, ramp=3.0, grace=40.0, stream=True, once=True, events=200, interval_us=50_000, unit="event",
        fresh=True,
    ),
    Workload(
        "C5000", "5,000 streams, 4 events/s each", 5000, 6.0,
        warm=5.5, ramp=5.0, grace=40.0, stream=True, once=True, events=48, interval_us=250_000, unit="event",
        fresh=True,
    ),
    Workload(
        "leave-stream", "clients leave in mid-stream: FIN to the close of the upstream", 32, 4.0,
        grace=1.0, stream=True, events=1_000, interval_us=20_000, abort_after_events=3,
    ),
    Workload(
        "leave-queued", "clients leave before the first byte", 32, 4.0,
        grace=1.0, stream=True, delay_us=20_000_000, abort_after_ms=60,
    ),
    Workload(
        "leave-plain", "clients of plain requests leave", 32, 4.0,
        grace=1.0, delay_us=20_000_000, abort_after_ms=60,
    ),
    Workload(
        "hold", "10,000 requests of 1 KiB held for a cold start: memory, CPU, beats", 10_000, 24.0,
        warm=18.0, ramp=8.0, grace=10.0, stream=True, once=True, prompt=750, cold=True, fresh=True,
    ),
    Workload(
        "hold-herd", "the same, all of them come within a second", 10_000, 24.0,
        warm=18.0, ramp=1.0, grace=10.0, stream=True, once=True, prompt=750, cold=True, fresh=True,
    ),
    Workload("soak", "1,000,000 plain requests: does memory stay flat?", 64, 400.0, total=1_000_000),
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in _ALL}
USUAL = tuple(name for name in WORKLOADS if name not in ("A32K", "leave-plain", "hold-herd", "soak"))
