"""The benchmark's verdicts: computed from measurements, and able to say that a bar is missed."""

from __future__ import annotations

from typing import Any

import pytest

from bench.bars import BARS, verdicts


def plain(target: str, cpu: float, workload: str = "A") -> dict[str, Any]:
    """10,000 requests or events, served in `cpu` seconds."""
    return {
        "target": target, "workload": workload, "requests": 10_000, "events": 10_000, "connections": [],
        "cpu": cpu, "window": 4.0,
    }  # fmt: skip


def line(text: str, sentence: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {sentence} |"))


@pytest.mark.parametrize(("ours", "verdict"), [(0.70, "held"), (0.71, "**missed**")])
def test_the_bar_per_request_is_against_the_best_rust_router(ours: float, verdict: str) -> None:
    text = verdicts([plain("gateway", ours), plain("vllm-router", 1.0), plain("smg", 2.0)])

    assert line(text, "CPU per request") == (
        f"| CPU per request | {ours:.3g} x best Rust router | at most 0.7 | {verdict} |"
    )


def test_the_compiled_build_has_the_bars_against_peers_under_its_own_name() -> None:
    text = verdicts([plain("gateway", 0.8), plain("gateway-compiled", 0.6), plain("vllm-router", 1.0)])

    assert line(text, "CPU per request").endswith("| at most 0.7 | **missed** |")
    assert line(text, "compiled: CPU per request").endswith("| 0.6 x best Rust router | at most 0.7 | held |")


def test_a_bar_takes_the_median_of_the_rounds() -> None:
    rounds = [plain("gateway", cpu) for cpu in (0.5, 0.6, 9.0)]

    assert "0.6 x" in line(verdicts([*rounds, plain("vllm-router", 1.0)]), "CPU per request")


def test_what_was_not_measured_gets_no_verdict() -> None:
    assert verdicts([plain("nginx", 1.0)]) == ""
    assert "per request" not in verdicts([plain("gateway", 1.0)])


@pytest.mark.parametrize(("delay", "verdict"), [(250, "held"), (350, "**missed**")])
def test_delays_are_compared_by_what_a_gateway_adds(delay: float, verdict: str) -> None:
    def streams(target: str, p50: float) -> dict[str, Any]:
        delays = {"n": 1, "p50": p50}
        return plain(target, 1.0, "C5000") | {"delay": delays, "errors": 0, "no_done": 0, "unfinished": 0}

    text = verdicts([streams("direct", 50), streams("nginx", 150), streams("gateway", delay)])

    assert line(text, "5,000 streams: added delay of a chunk p50").endswith(f"| at most 2 | {verdict} |")


def test_one_round_with_a_failed_stream_misses_the_bar_of_none() -> None:
    rounds = [
        plain("gateway", 1.0, "C5000") | {"delay": {"n": 0}, "errors": errors, "no_done": 0, "unfinished": 0}
        for errors in (0, 1, 0)
    ]

    assert line(verdicts(rounds), "5,000 streams: faults").endswith("| 1 | at most 0 | **missed** |")


@pytest.mark.parametrize(("share", "verdict"), [(34, "**missed**"), (35, "held")])
def test_two_workers_share_the_connections(share: int, verdict: str) -> None:
    two = plain("gateway-2w", 1.0, "C200") | {"connections": [share, 100 - share]}

    assert line(verdicts([two]), "two workers: the smaller's share of 200, %").endswith(f"{verdict} |")


def test_each_bar_is_named_once() -> None:
    assert len({bar.sentence for bar in BARS}) == len(BARS)
