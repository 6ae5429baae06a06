"""The benchmark's tables: in the README by one command, with date, versions and ratios to the best peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import arguments, same_again
from bench.report import BEGIN, END, OWN_README, README, MixedRuns, publish, report, summary
from bench.rig import starts
from bench.workloads import WORKLOADS

HERE = {
    "commit": "commit abc1234",
    "machine": "2 CPUs (EPYC)",
    "system": "Linux 6, Python 3.11.7",
    "command": "`make bench`",
}


def measured(target: str, workload: str, cpu: float = 1.0, **more: Any) -> dict[str, Any]:
    """10,000 requests or events, served in `cpu` seconds; nothing else is remarkable."""
    return {
        "target": target,
        "workload": workload,
        "requests": 10_000,
        "events": 10_000,
        "cpu": cpu,
        "window": 4.0,
        "at": "2026-11-05 12:00:00",
        "where": HERE,
        "busy": {"0": cpu / 4.0},
        "connections": [],
        "start_s": 1.0,
        "errors": 0,
        "no_done": 0,
        "unfinished": 0,
        "same_processes": True,
        "ttft": {"n": 0},
        "delay": {"n": 0},
        "latency": {"n": 0},
        "rss_before_kib": 0,
        "rss_peak_kib": 0,
        "rss_kib": [],
        "version": "",
    } | more


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def ttft(p50: int, p99: int) -> dict[str, Any]:
    return {"ttft": {"n": 1, "p50": p50, "p99": p99}}


def memory(mib: int) -> dict[str, Any]:
    return {"rss_before_kib": 1024, "rss_peak_kib": 1024 * (1 + mib)}


def everything(scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        measured("direct", "ttft-1", **ttft(100, 200)),
        *(
            measured(name, workload, cpu * scale, version=version, **ttft(*times), **memory(mib))
            for name, cpu, version, times, mib in (
                ("gateway", 0.5, "skygate 1.0", (300, 700), 40),
                ("nginx", 0.25, "nginx 1.22.1", (200, 400), 20),
                ("vllm-router", 1.0, "vllm-router 0.1.17", (400, 900), 80),
            )
            for workload in ("A", "B", "C200", "C1000", "C5000", "ttft-1")
        ),
    ]


def test_the_readme_has_every_figure_and_beside_it_the_ratio_to_the_best_peer() -> None:
    text = summary(everything())
    assert row(text, "") == [
        "",
        "CPU per request, µs",
        "per event in a burst",
        "per event, 200 slow streams",
        "added TTFT p50, µs",
        "p99",
        "KiB per stream, of 1,000",
        "of 5,000",
    ]
    assert row(text, "gateway")[1:] == [
        "50.0 (2.00)",
        "50.0 (2.00)",
        "50.0 (2.00)",
        "200 (2.00)",
        "500 (2.50)",
        "41.0 (2.00)",
        "8.2 (2.00)",
    ]


def test_who_is_better_than_every_peer_has_a_ratio_below_one() -> None:
    text = summary([measured("gateway", "A", 0.5), measured("nginx", "A", 1.0), measured("smg", "A", 300.0)])
    assert row(text, "gateway")[1] == "50.0 (0.50)"
    assert row(text, "nginx")[1] == "100.0 (1.00)"
    assert row(text, "smg")[1] == "30,000.0 (300)"


def test_the_heading_tells_date_commit_machine_and_how_busy_others_were() -> None:
    rounds = [measured(name, "A", busy={"0": 0.5}) for name in ("gateway", "nginx") for _ in range(3)]
    assert summary(rounds).splitlines()[0] == (
        "5 November 2026, commit abc1234, 2 CPUs (EPYC), Linux 6, Python 3.11.7; medians of 3 rounds of"
        " `make bench`, others used 25 % of the gateway's CPU (median). In brackets the ratio to the best"
        " peer."
    )


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], "make bench"),
        (["-o", "/somewhere/x.jsonl"], "make bench"),
        (["--priority", "-10", "-w", "A,B", "-r", "2"], 'make bench ARGS="-w A,B -r 2 --priority -10"'),
    ],
)
def test_the_command_is_that_of_anybody_who_measures_the_same(words: list[str], command: str) -> None:
    assert same_again(arguments().parse_args(["run", *words])) == command


def test_peers_go_by_the_versions_that_ran() -> None:
    more = [measured("gateway-2w", "A"), measured("nginx-2w", "A", version="nginx 1.22.1")]
    lines = summary([*everything(), *more]).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[4:]] == [
        *("gateway", "nginx 1.22.1", "vllm-router 0.1.17"),
        *("gateway, two workers", "nginx 1.22.1, two workers"),
    ]


def test_the_whole_report_sets_ours_beside_nginx_and_the_best_rust_router() -> None:
    text = report(everything())
    assert row(text, "CPU per request, µs") == [
        "CPU per request, µs",
        "50.0 (2.00)",
        "25.0 (1.00)",
        "100.0 (4.00)",
        "2.00",
        "0.50",
    ]
    assert "| CPU per request | 0.5 x best Rust router | at most 0.7 | held |" in text
    assert row(text, "errors")[1:4] == ["0", "0", "0"]


def test_one_command_renews_both_readmes_and_nothing_but_their_tables(tmp_path: Path) -> None:
    copies = [tmp_path / "README.md", tmp_path / "bench.md"]
    for copy, original in zip(copies, (README, OWN_README), strict=True):
        copy.write_text(original.read_text())
    publish(everything(), *copies)
    once = [copy.read_text() for copy in copies]
    for text, original in zip(once, (README, OWN_README), strict=True):
        before, _, rest = original.read_text().partition(BEGIN)
        assert text.startswith(before + BEGIN)
        assert text.endswith(END + rest.partition(END)[2])
    assert summary(everything()) in once[0]
    assert report(everything()) in once[1]
    publish(everything(), *copies)
    assert [copy.read_text() for copy in copies] == once


def test_both_readmes_are_written_or_none(tmp_path: Path) -> None:
    marked, unmarked = tmp_path / "README.md", tmp_path / "bench.md"
    marked.write_text(f"{BEGIN}old\n{END}")
    unmarked.write_text("no marks")
    with pytest.raises(ValueError, match=r"bench\.md has no"):
        publish(everything(), marked, unmarked)
    assert marked.read_text() == f"{BEGIN}old\n{END}"


def test_runs_of_two_commits_are_not_published_as_one(tmp_path: Path) -> None:
    other = measured("nginx", "A", where=HERE | {"commit": "commit fff0000"})
    with pytest.raises(MixedRuns, match="commit abc1234 and of commit fff0000"):
        publish([measured("gateway", "A"), other], tmp_path / "untouched", tmp_path / "untouched")


def test_a_run_that_lacks_a_figure_of_the_readme_is_refused_and_says_what_to_measure(tmp_path: Path) -> None:
    some = [m for m in everything() if m["workload"] not in ("B", "C5000")]
    with pytest.raises(ValueError, match="not measured: B, C5000"):
        publish(some, tmp_path / "untouched", tmp_path / "untouched")


def test_what_is_measured_for_its_memory_has_a_start_of_its_own() -> None:
    names = ("A", "C1000", "C5000", "hold", "B", "hold-herd")
    together = [[w.name for w in group] for group in starts([WORKLOADS[name] for name in names])]
    assert together == [["A", "B"], ["C1000"], ["C5000"], ["hold"], ["hold-herd"]]


def test_no_start_serves_both_with_and_without_ready_replicas() -> None:
    for group in starts(list(WORKLOADS.values())):
        assert len({workload.cold for workload in group}) == 1
