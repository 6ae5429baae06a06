"""Metrics: the promised names and labels, what one request counts, many processes in one scrape."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics

PROMISED = {
    "gateway_requests_total": {"service", "endpoint", "code", "end"},
    "gateway_request_duration_seconds": {"service"},
    "gateway_time_to_first_token_seconds": {"service", "held"},
    "gateway_hold_seconds": {"service"},
    "gateway_in_flight": {"service", "replica"},
    "gateway_waiting": {"service"},
    "gateway_replicas": {"service", "state"},
    "gateway_target_replicas": {"service"},
    "gateway_replica_queue_depth": {"service", "replica"},
    "gateway_cold_start_seconds": {"service", "phase"},
    "gateway_launches_total": {"service", "outcome"},
    "gateway_retries_total": {"service", "cause"},
    "gateway_ejections_total": {"service", "replica"},
    "gateway_tokens_total": {"service", "direction"},
    "gateway_replica_cost_dollars_per_hour": {"service", "replica"},
    "gateway_replica_generation_tokens_per_second": {"service", "replica"},
    "gateway_replica_dead_man_seconds": {"service", "replica"},
    "gateway_replica_dead_man_limit_seconds": {"service", "replica"},
    "gateway_cost_dollars_total": {"service"},
    "gateway_frozen": {"service"},
    "gateway_strays": {"service"},
    "gateway_terminating_seconds": {"service"},
    "gateway_ends_failing": {"service"},
    "gateway_decisions_total": {"service", "reason"},
}


def status(**service: Any) -> dict[str, Any]:
    replica = {"id": "r-gw-1-1", "state": "ready", "in_flight": 3, "queue_depth": 5, "hourly_cost": 2.5}
    whole = {
        "name": "svc",
        "demand": {"waiting": 7, "in_flight": 3},
        "target": {"replicas": 1, "reason": "demand"},
        "replicas": [replica],
        "cost": {"hourly": 2.5, "total": 12.25},
    }
    return {"services": [whole | service]}


def samples(registry: CollectorRegistry) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return samples(registry).get((name, frozenset(labels.items())))


def test_exactly_the_promised_names_and_labels_are_declared() -> None:
    counted = {
        name.removesuffix("_created"): set(family._labelnames)
        for family in metrics.FAMILIES
        for name in [family._name + ("_total" if family._type == "counter" else "")]
    }
    levels = {name: set(labels) for name, (_, _, labels) in metrics.LEVELS.items()}
    assert counted | levels == PROMISED


def test_hold_and_cold_start_buckets_reach_ninety_minutes() -> None:
    for buckets in (metrics.HOLD_BUCKETS, metrics.TTFT_BUCKETS, metrics.DURATION_BUCKETS):
        assert buckets[-1] == 5400
        assert list(buckets) == sorted(buckets)


def test_machines_that_bill_for_nothing_are_counted_by_their_service() -> None:
    stray = {"id": "old-gw-0a1b2c3d-7", "service": "old", "tries": 3}
    more = {"strays": [stray, {**stray, "tries": 0}]}
    registry = metrics.build_registry(None, lambda: {**status(), **more})
    assert value(registry, "gateway_strays", service="old") == 2
    assert value(registry, "gateway_ends_failing", service="old") == 1
    assert value(registry, "gateway_ends_failing", service="svc") == 0


def test_one_request_counts_once_in_each_family_it_touches() -> None:
    counts = metrics.ServiceMetrics("one")
    counts.request_ended("chat", 200, "complete", 30.5, 20.25, 20.0, 11, 29)
    counts.request_ended("chat", 200, "complete", 1.0, 0.5)
    counts.request_ended("other", 404, "rejected", 0.001)
    counts.retry("dial")
    counts.ejection("one-gw-1-1")
    counts.flush()
    counts.flush()  # the second has nothing new to count
    registry = metrics.build_registry(None, status)
    expected = {"service": "one", "endpoint": "chat", "code": "200", "end": "complete"}
    assert value(registry, "gateway_requests_total", **expected) == 2
    assert value(registry, "gateway_request_duration_seconds_count", service="one") == 3
    assert value(registry, "gateway_time_to_first_token_seconds_sum", service="one", held="true") == 20.25
    assert value(registry, "gateway_time_to_first_token_seconds_sum", service="one", held="false") == 0.5
    assert value(registry, "gateway_hold_seconds_count", service="one") == 1
    assert value(registry, "gateway_tokens_total", service="one", direction="in") == 11
    assert value(registry, "gateway_tokens_total", service="one", direction="out") == 29
    assert value(registry, "gateway_retries_total", service="one", cause="dial") == 1
    assert value(registry, "gateway_ejections_total", service="one", replica="one-gw-1-1") == 1


def test_levels_and_dollars_come_from_the_status_at_scrape_time() -> None:
    registry = metrics.build_registry(None, status)
    assert value(registry, "gateway_waiting", service="svc") == 7
    assert value(registry, "gateway_target_replicas", service="svc") == 1
    assert value(registry, "gateway_in_flight", service="svc", replica="r-gw-1-1") == 3
    assert value(registry, "gateway_replica_queue_depth", service="svc", replica="r-gw-1-1") == 5
    assert value(registry, "gateway_replica_cost_dollars_per_hour", service="svc", replica="r-gw-1-1") == 2.5
    assert value(registry, "gateway_cost_dollars_total", service="svc") == 12.25
    assert value(registry, "gateway_replicas", service="svc", state="ready") == 1
    assert value(registry, "gateway_replicas", service="svc", state="starting") == 0
    assert value(registry, "gateway_strays", service="svc") == 0


def test_the_time_until_a_replica_ends_itself_is_a_gauge_of_those_that_would() -> None:
    quiet = {"state": "ready", "in_flight": 0, "queue_depth": 0, "hourly_cost": 1.0}
    timed, untimed = ({"id": id, **quiet} for id in "ab")
    timed |= {"dead_man_seconds": 4980.0, "dead_man_limit_seconds": 7200.0}
    untimed |= {"dead_man_seconds": None, "dead_man_limit_seconds": None}
    found = samples(metrics.build_registry(None, lambda: status(replicas=[timed, untimed])))
    series = {key: value for key, value in found.items() if "dead_man" in key[0]}
    labels = frozenset({("service", "svc"), ("replica", "a")})
    assert series == {
        ("gateway_replica_dead_man_seconds", labels): 4980.0,
        ("gateway_replica_dead_man_limit_seconds", labels): 7200.0,
    }


def test_a_replica_without_price_or_depth_has_no_such_sample() -> None:
    blank = {"id": "x", "state": "pending", "in_flight": 0, "queue_depth": None, "hourly_cost": None}
    registry = metrics.build_registry(None, lambda: status(replicas=[blank]))
    assert value(registry, "gateway_in_flight", service="svc", replica="x") == 0
    assert value(registry, "gateway_replica_queue_depth", service="svc", replica="x") is None


def test_the_controllers_observations_are_counted() -> None:
    observer = metrics.ControllerObserver()
    observer.decision("two", "from_zero")
    observer.launch("two", "ready")
    observer.cold_start("two", "load", 42.0)
    observer.cost("two", 1.0)
    registry = metrics.build_registry(None, status)
    assert value(registry, "gateway_decisions_total", service="two", reason="from_zero") == 1
    assert value(registry, "gateway_launches_total", service="two", outcome="ready") == 1
    assert value(registry, "gateway_cold_start_seconds_sum", service="two", phase="load") == 42


def test_counts_of_all_processes_add_up_dead_ones_included(tmp_path: Path) -> None:
    code = (
        "from gateway import metrics as m\n"
        "s = m.ServiceMetrics('svc')\n"
        "s.request_ended('chat', 200, 'complete', 1.0, 0.1)\n"
        "s.flush()\n"
        "m.worker_died('svc', 2)\n"
        "m.worker_died('svc', 0)\n"
    )
    for _ in range(2):
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=30)
    registry = metrics.build_registry(str(tmp_path), status)
    labels = {"service": "svc", "endpoint": "chat", "code": "200", "end": "complete"}
    assert value(registry, "gateway_requests_total", **labels) == 2
    died = {"service": "svc", "endpoint": "unknown", "code": "0", "end": "worker_died"}
    assert value(registry, "gateway_requests_total", **died) == 4
    assert value(registry, "gateway_time_to_first_token_seconds_count", service="svc", held="false") == 2
    assert value(registry, "gateway_waiting", service="svc") == 7


def test_a_process_that_is_started_again_counts_on_in_the_same_files(tmp_path: Path) -> None:
    code = "from gateway import metrics as m\nm.ServiceMetrics('svc').retry('dial')\n"
    place = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "GATEWAY_PROCESS": "worker-0"}
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], env=os.environ | place, check=True, timeout=30)
    registry = metrics.build_registry(str(tmp_path), status)
    assert value(registry, "gateway_retries_total", service="svc", cause="dial") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"counter_worker-0.db", "histogram_worker-0.db"}


def test_counting_one_request_costs_microseconds() -> None:
    """Five bound calls; measured 3 us. The bound of 60 us says "no look-up by labels, no I/O" on any
    machine."""
    counts = metrics.ServiceMetrics("fast")
    rounds = 2000
    started = time.process_time()
    for _ in range(rounds):
        counts.request_ended("chat", 200, "complete", 1.0, 0.1, None, 10, 20)
    assert (time.process_time() - started) / rounds < 60e-6
