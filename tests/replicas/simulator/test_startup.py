"""The cold start's phases and lines, on a clock that only counts."""

from __future__ import annotations

import pytest

from replicas import phases
from replicas.simulator import SimConfig
from replicas.simulator.faults import Faults
from replicas.simulator.startup import DiedAtStart, Startup, StartupError, parse_phases

SECONDS = {"provision": 120.0, "setup": 30.0, "download": 600.0, "load": 65.0, "warmup": 60.0}


class Tape:
    """Writes down what is printed, and when."""

    def __init__(self, seconds: dict[str, float], *faults: str) -> None:
        self.now = 0.0
        self.lines: list[tuple[float, str]] = []
        faulty = Faults.parse(faults)
        self.startup = Startup(SimConfig(), seconds, faulty, say=self.say, sleep=self.sleep)

    def say(self, line: str) -> None:
        self.lines.append((self.now, line))

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def at(self, words: str) -> float:
        """When the first line with these words came."""
        return next(now for now, line in self.lines if words in line)

    async def run(self) -> Tape:
        await self.startup.before_port()
        await self.startup.warmup("http://127.0.0.1:30000", lambda: self.say("ready now"))
        return self


async def test_each_phase_takes_as_long_as_asked():
    tape = await Tape(SECONDS).run()
    assert tape.at("Running setup") == pytest.approx(120)
    assert tape.at("Fetching 163 files:   0%") == pytest.approx(150)
    assert tape.at("Load weight begin") == pytest.approx(750)
    assert tape.at("Uvicorn running on") == pytest.approx(815)
    assert tape.at("The server is fired up and ready to roll!") == pytest.approx(875)


async def test_the_lines_are_sglangs_and_in_its_order():
    tape = await Tape(SECONDS).run()
    words = (
        "server_args=",
        "Init torch distributed begin.",
        "Load weight begin.",
        "Loading safetensors checkpoint shards:   0% Completed | 0/163 [00:00<",
        "Loading safetensors checkpoint shards:  49% Completed | 81/163 [00:2",
        "Loading safetensors checkpoint shards: 100% Completed | 163/163",
        "Load weight end.",
        "KV Cache is allocated.",
        "Memory pool end.",
        "Capture target decode CUDA graph begin.",
        "Capturing batches (bs=1",
        "Capture target decode CUDA graph end.",
        "max_total_num_tokens=",
        "Application startup complete.",
        "Uvicorn running on http://127.0.0.1:30000",
        "ready now",
        "The server is fired up and ready to roll!",
    )
    places = [next(place for place, (_, line) in enumerate(tape.lines) if word in line) for word in words]
    assert places == sorted(places)


async def test_the_gateway_reads_every_phase_from_the_lines():
    tape = await Tape(SECONDS).run()
    reader = phases.Phases()
    seen = []
    for _, line in tape.lines:
        reader.feed(line + "\n")
        if reader.phase not in seen:
            seen.append(reader.phase)
    assert [phase for phase in seen if phase] == list(phases.PHASES)
    assert reader.over


async def test_no_time_and_no_words_for_phases_that_are_not_asked_for():
    tape = await Tape({}).run()
    assert tape.now == 0.0
    assert not any("Launching" in line or "Fetching" in line for _, line in tape.lines)


async def test_a_slow_start_loads_longer():
    assert (await Tape(SECONDS, "slow-start=1000").run()).now == pytest.approx(875 + 1000)


async def test_death_at_load_leaves_a_traceback_and_never_opens_the_port():
    tape = Tape(SECONDS, "die-at-load")
    with pytest.raises(DiedAtStart):
        await tape.run()
    assert "Traceback (most recent call last):" in tape.lines[-1][1]
    assert not any("Uvicorn" in line for _, line in tape.lines)


async def test_death_at_warmup_comes_after_the_port_is_open():
    tape = Tape(SECONDS, "die-at-warmup")
    with pytest.raises(DiedAtStart):
        await tape.run()
    assert any("Uvicorn" in line for _, line in tape.lines)


def test_phases_are_read_from_the_flag():
    assert parse_phases("provision=2, load=1.5") == {"provision": 2.0, "load": 1.5}
    assert parse_phases("") == {}


@pytest.mark.parametrize("text", ["boot=1", "load", "load=-1", "load=soon", "load=inf", "load=nan"])
def test_what_cannot_be_read_is_refused_with_what_can(text):
    with pytest.raises(StartupError, match="provision, setup, download, load, warmup"):
        parse_phases(text)
