"""Load figures lag as SGLang's do: each channel speaks at its own tick."""

from __future__ import annotations

from replicas.simulator.config import SimConfig
from replicas.simulator.engine import Engine, Sequence
from replicas.simulator.profiles import PROFILES
from replicas.simulator.reports import Reports


class Line:
    """An engine with its reports; after each step, what both channels say."""

    def __init__(self, requests: int, *, slots: int, tokens: int) -> None:
        self.engine = Engine(PROFILES["fast"], slots)
        self.lines: list[str] = []
        config = SimConfig(max_running=slots, decode_log_interval=40, publish_interval=15)
        self.reports = Reports(config, self.engine, self.lines.append)
        for number in range(requests):
            self.engine.add(Sequence(f"r{number}", 10, tokens, tokens))

    def step(self) -> bool:
        seconds = self.engine.begin()
        self.reports.began()
        if seconds is not None:
            self.reports.stepped(len(self.engine.finish()))
        return seconds is not None

    @property
    def gauges(self) -> tuple[float, float]:
        """(running, queued) of /metrics."""
        text = self.reports.metrics().decode()
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("sglang:num_")]
        return float(values[0]), float(values[1])

    @property
    def loads(self) -> tuple[int, int]:
        """(running, waiting) of /v1/loads."""
        entry = self.reports.loads(core=True, hung=False)["loads"][0]
        return entry["num_running_reqs"], entry["num_waiting_reqs"]


def test_between_two_waves_metrics_reads_zero_running_and_loads_does_not():
    line = Line(8, slots=4, tokens=50)
    seen = []
    while line.step():
        if line.engine.kind == "prefill":
            seen.append((line.gauges, line.loads))
    assert seen == [((0.0, 4.0), (4, 4)), ((0.0, 0.0), (4, 0))]


def test_a_late_arrival_shows_in_loads_after_15_decode_steps_and_in_metrics_after_40():
    line = Line(1, slots=1, tokens=100)
    line.step()
    line.engine.add(Sequence("late", 10, 1, 1))
    shown: dict[str, int] = {}
    for step in range(1, 50):
        line.step()
        if line.loads[1]:
            shown.setdefault("loads", step)
        if line.gauges[1]:
            shown.setdefault("metrics", step)
    assert shown == {"loads": 15, "metrics": 40}


def test_going_idle_shows_at_once():
    line = Line(1, slots=1, tokens=3)
    while line.step():
        pass
    assert (line.gauges, line.loads) == ((0.0, 0.0), (0, 0))


def test_the_log_has_sglangs_batch_lines():
    line = Line(1, slots=1, tokens=50)
    while line.step():
        pass
    assert line.lines[0].startswith("Prefill batch, #new-seq: 1, #new-token: 10, #cached-token: 0, ")
    assert line.lines[1].startswith("Decode batch, #running-req: 1, #token: 51, token usage: 0.00, ")
