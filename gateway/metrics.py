"""Every metric of the gateway, declared in one place; `config/grafana` and the README's table are checked
against it.

Workers and the controller count into the families below (one mmap file per process in
PROMETHEUS_MULTIPROC_DIR, which the supervisor empties before it starts them). Levels and dollars are never
counted: `Levels` reads them from the controller's status at scrape time, so they cannot drift. Cost: a bound
`inc()` is 0.37 us in one process and 0.82 us with mmap files, a `labels()` look-up 0.8 us more, so
`ServiceMetrics` binds each child once.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from replicas.lifecycle import State

# Name of this process among those of one gateway, set by the supervisor: `worker-0`, `controller`.
PROCESS_VARIABLE = "GATEWAY_PROCESS"
if "PROMETHEUS_MULTIPROC_DIR" in os.environ and PROCESS_VARIABLE in os.environ:
    # Files named after the place and not the pid: a worker that is started again counts on where it died, and
    # one that dies every five seconds for a day does not leave 17,000 files for each scrape to read.
    _NAME = os.environ[PROCESS_VARIABLE]
    values.ValueClass = values.MultiProcessValue(lambda: _NAME)  # type: ignore[no-untyped-call]

# From a cached prefill (tens of ms) over queueing (minutes) to a whole cold start.
TTFT_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60, 180, 600, 1800, 3600, 5400)
# A chat answer takes seconds, a reasoning answer up to 15 minutes, a held one as long as its cold start.
DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 5400)
# 30-60 minutes are normal for DeepSeek-R1 671B on spot machines: dense there, up to 90 minutes.
HOLD_BUCKETS = (1, 5, 15, 30, 60, 120, 300, 600, 900, 1200, 1800, 2700, 3600, 5400)

# What this process counts; a scrape in multiprocess mode reads the files instead.
REGISTRY = CollectorRegistry()

REQUESTS = Counter(
    "gateway_requests_total",
    "Requests by endpoint, HTTP status sent (0 = none) and typed end; paths not served are endpoint other.",
    ("service", "endpoint", "code", "end"),
    registry=REGISTRY,
)
DURATION = Histogram(
    "gateway_request_duration_seconds",
    "From the request's head to its end, hold included.",
    ("service",),
    buckets=DURATION_BUCKETS,
    registry=REGISTRY,
)
TTFT = Histogram(
    "gateway_time_to_first_token_seconds",
    "From the request's head to the replica's first body byte; held=true waited for a cold start.",
    ("service", "held"),
    buckets=TTFT_BUCKETS,
    registry=REGISTRY,
)
HOLD = Histogram(
    "gateway_hold_seconds",
    "Time that held requests waited for a replica.",
    ("service",),
    buckets=HOLD_BUCKETS,
    registry=REGISTRY,
)
COLD_START = Histogram(
    "gateway_cold_start_seconds",
    "Duration of each phase of a cold start, and of the whole (phase=total).",
    ("service", "phase"),
    buckets=HOLD_BUCKETS,
    registry=REGISTRY,
)
LAUNCHES = Counter(
    "gateway_launches_total",
    "Launches of replicas by outcome: ready, failed, cancelled.",
    ("service", "outcome"),
    registry=REGISTRY,
)
RETRIES = Counter(
    "gateway_retries_total",
    "Attempts repeated before any response byte, by cause.",
    ("service", "cause"),
    registry=REGISTRY,
)
EJECTIONS = Counter(
    "gateway_ejections_total",
    "Times a worker took a replica out of rotation for its errors.",
    ("service", "replica"),
    registry=REGISTRY,
)
TOKENS = Counter(
    "gateway_tokens_total",
    "Tokens by direction (in, out), from usage, where the reply carries it.",
    ("service", "direction"),
    registry=REGISTRY,
)
DECISIONS = Counter(
    "gateway_decisions_total",
    "Changes the controller decided on, by reason.",
    ("service", "reason"),
    registry=REGISTRY,
)
FAMILIES = (
    REQUESTS, DURATION, TTFT, HOLD, COLD_START, LAUNCHES, RETRIES, EJECTIONS, TOKENS, DECISIONS,
)  # fmt: skip

# name -> (kind, help, labels): read from the controller's status by `Levels`.
LEVELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gateway_in_flight": ("gauge", "Requests at a replica now, over all workers.", ("service", "replica")),
    "gateway_waiting": ("gauge", "Requests held now.", ("service",)),
    "gateway_replicas": ("gauge", "Replicas by state.", ("service", "state")),
    "gateway_target_replicas": ("gauge", "Replicas wanted now.", ("service",)),
    "gateway_frozen": (
        "gauge",
        "1 while all replicas fail at once, or the provisioner knows none: nothing is ended or launched.",
        ("service",),
    ),
    "gateway_terminating_seconds": (
        "gauge",
        "How long the slowest ending replica has not been verified gone; it may cost money; 0 = none.",
        ("service",),
    ),
    "gateway_replica_queue_depth": (
        "gauge",
        "Queue depth that routing compares: in-flight and foreign requests.",
        ("service", "replica"),
    ),
    "gateway_replica_generation_tokens_per_second": (
        "gauge",
        "Tokens per second that a replica says it generates, requests of others included.",
        ("service", "replica"),
    ),
    "gateway_replica_cost_dollars_per_hour": ("gauge", "Price of a replica.", ("service", "replica")),
    "gateway_strays": (
        "gauge",
        "Machines under our name that no row knows: they bill, and are being ended.",
        ("service",),
    ),
    "gateway_ends_failing": (
        "gauge",
        "Replicas and strays that bill on because their end could not be verified at the last try.",
        ("service",),
    ),
    "gateway_replica_dead_man_seconds": (
        "gauge",
        "Until a replica ends itself unless this gateway goes on.",
        ("service", "replica"),
    ),
    "gateway_replica_dead_man_limit_seconds": (
        "gauge",
        "That time in full: `--dead-man`, or a cold start or `--keep-failed` if one of them is longer.",
        ("service", "replica"),
    ),
    "gateway_cost_dollars_total": ("counter", "Dollars spent on replicas, restarts included.", ("service",)),
}
# Each state is always present, 0 included, so that a panel or alert does not lose its series.
STATES = tuple(state.value for state in State if state is not State.GONE)


class _Tally:
    """A histogram's child, fed from plain numbers: observing costs 0.2 us instead of 1.8 (mmap files)."""

    __slots__ = ("_bounds", "_buckets", "_child", "_sum")

    def __init__(self, child: Histogram) -> None:
        self._child = child
        self._bounds: list[float] = child._upper_bounds
        self._buckets = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._buckets[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def flush(self) -> None:
        if not any(self._buckets):
            return
        for i, count in enumerate(self._buckets):
            if count:
                self._child._buckets[i].inc(count)
        self._child._sum.inc(self._sum)
        self._buckets = [0] * len(self._bounds)
        self._sum = 0.0


class ServiceMetrics:
    """What one process counts for one service. Children are bound on first use and kept: label sets are
    small. Ends are counted at once, so that not one is lost with a killed worker; times and tokens are
    gathered here and counted by `flush`, about once a second."""

    def __init__(self, service: str) -> None:
        self.service = service
        self._requests: dict[tuple[str, int, str], Counter] = {}
        self._retries: dict[str, Counter] = {}
        self._ejections: dict[str, Counter] = {}
        self._duration = _Tally(DURATION.labels(service))
        self._ttft_served = _Tally(TTFT.labels(service, "false"))
        self._ttft_held = _Tally(TTFT.labels(service, "true"))
        self._hold = _Tally(HOLD.labels(service))
        self._tokens = (TOKENS.labels(service, "in"), TOKENS.labels(service, "out"))
        self._tokens_in = self._tokens_out = 0

    def request_ended(
        self,
        endpoint: str,
        code: int,
        end: str,
        duration_s: float,
        ttft_s: float | None = None,
        held_s: float | None = None,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
    ) -> None:
        """One request reached its typed end. `code`: HTTP status sent, 0 for none; seconds; None = did not
        happen."""
        key = (endpoint, code, end)
        child = self._requests.get(key)
        if child is None:
            child = self._requests[key] = REQUESTS.labels(self.service, endpoint, str(code), end)
        child.inc()
        self._duration.observe(duration_s)
        if ttft_s is not None:
            (self._ttft_served if held_s is None else self._ttft_held).observe(ttft_s)
        if held_s is not None:
            self._hold.observe(held_s)
        if tokens_in:
            self._tokens_in += tokens_in
        if tokens_out:
            self._tokens_out += tokens_out

    def flush(self) -> None:
        """Count what has been gathered."""
        for tally in (self._duration, self._ttft_served, self._ttft_held, self._hold):
            tally.flush()
        for child, tokens in zip(self._tokens, (self._tokens_in, self._tokens_out), strict=True):
            if tokens:
                child.inc(tokens)
        self._tokens_in = self._tokens_out = 0

    def retry(self, cause: str) -> None:
        child = self._retries.get(cause)
        if child is None:
            child = self._retries[cause] = RETRIES.labels(self.service, cause)
        child.inc()

    def ejection(self, replica: str) -> None:
        child = self._ejections.get(replica)
        if child is None:
            child = self._ejections[replica] = EJECTIONS.labels(self.service, replica)
        child.inc()


class ControllerObserver:
    """Counts what the controller tells (its `Observer`). Dollars are read from its status instead, see
    `Levels`."""

    def decision(self, service: str, code: str) -> None:
        DECISIONS.labels(service, code).inc()

    def launch(self, service: str, outcome: str) -> None:
        LAUNCHES.labels(service, outcome).inc()

    def cold_start(self, service: str, phase: str, seconds: float) -> None:
        COLD_START.labels(service, phase).observe(seconds)

    def cost(self, service: str, dollars: float) -> None:
        """Nothing: the total lives in state.db, outlives this process and reaches a scrape by `Levels`."""


def worker_died(service: str, open_requests: int) -> None:
    """Account the requests that a dead worker had open. The supervisor calls it after reaping; their endpoint
    died with the worker, and code 0 says that the client saw the connection break."""
    if open_requests > 0:
        REQUESTS.labels(service, "unknown", "0", "worker_died").inc(open_requests)


class Levels(Collector):
    """Gauges and dollars, made from the controller's status (the `/admin/status` shape) at each scrape."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not run a status

    def collect(self) -> Iterator[Metric]:
        families = {
            name: CounterMetricFamily(name, text, labels=labels)
            if kind == "counter"
            else GaugeMetricFamily(name, text, labels=labels)
            for name, (kind, text, labels) in LEVELS.items()
        }

        def put(name: str, labels: tuple[str, ...], value: float | None) -> None:
            if value is not None:
                families[name].add_metric(labels, float(value))

        status = self._status()
        strays: list[Mapping[str, Any]] = status.get("strays", [])
        failing = Counted([s["service"] for s in strays if s["tries"]])
        for service in status["services"]:
            failing[service["name"]] += sum(1 for r in service["replicas"] if r.get("end_failures"))
        alone = Counted([stray["service"] for stray in strays])
        for name in {s["name"] for s in status["services"]} | set(alone):
            put("gateway_strays", (name,), alone[name])
            put("gateway_ends_failing", (name,), failing[name])
        for service in status["services"]:
            name = service["name"]
            replicas = service["replicas"]
            put("gateway_waiting", (name,), service["demand"]["waiting"])
            put("gateway_target_replicas", (name,), service["target"]["replicas"])
            put("gateway_cost_dollars_total", (name,), service["cost"]["total"])
            put("gateway_frozen", (name,), service.get("frozen") is not None)
            put("gateway_terminating_seconds", (name,), service.get("terminating_seconds"))
            for state in STATES:
                put("gateway_replicas", (name, state), sum(r["state"] == state for r in replicas))
            for replica in replicas:
                key = (name, replica["id"])
                put("gateway_in_flight", key, replica["in_flight"])
                put("gateway_replica_queue_depth", key, replica["queue_depth"])
                speed = replica.get("generation_tokens_per_second")
                put("gateway_replica_generation_tokens_per_second", key, speed)
                put("gateway_replica_cost_dollars_per_hour", key, replica["hourly_cost"])
                put("gateway_replica_dead_man_seconds", key, replica.get("dead_man_seconds"))
                put("gateway_replica_dead_man_limit_seconds", key, replica.get("dead_man_limit_seconds"))
        yield from families.values()


class _OwnCounts(Collector):
    """This process's own families: what a scrape shows outside multiprocess mode (tests)."""

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        return iter(REGISTRY.collect())


def build_registry(
    multiproc_dir: str | None, controller_status: Callable[[], Mapping[str, Any]]
) -> CollectorRegistry:
    """What one scrape shows: all processes' counts, the dead ones' included, and the levels of now. Made
    afresh for each scrape, as prometheus_client asks in multiprocess mode."""
    registry = CollectorRegistry(support_collectors_without_names=True)
    if multiproc_dir is None:
        registry.register(_OwnCounts())
    else:
        MultiProcessCollector(registry, path=multiproc_dir)  # type: ignore[no-untyped-call]
    registry.register(Levels(controller_status))
    return registry
