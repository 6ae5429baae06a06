"""What a replica's output tells while it serves: how fast it generates."""
from __future__ import annotations

from pathlib import Path

import pytest

from replicas.provisioners.folder import SPEED_SECONDS, Output

# As an SGLang 0.5.23 on a CPU, the 0.4.2 of the DeepSeek recipe, and one with data-parallel ranks print them.
NEW = (
    "[2026-11-24 05:07:46] Decode batch, #running-req: 2, #token: 177, token usage: 0.01, cpu graph: False,"
    " gen throughput (token/s): 436.13, #queue-req: 0\n"
)
OLD = (
    "\x1b[36m(head, rank=0, pid=9)\x1b[0m [2025-02-01 05:07:46 TP0] Decode batch. #running-req: 1,"
    " #token: 97, token usage: 0.00, gen throughput (token/s): 11.52, #queue-req: 0\n"
)
RANKS = OLD.replace("TP0", "DP0 TP0") + OLD.replace("TP0", "DP1 TP8").replace("11.52", "20.00")


@pytest.mark.parametrize(("text", "speed"), [(NEW, 436.13), (OLD, 11.52), (RANKS, 31.52), ("ready\n", None)])
def test_the_speed_is_the_sum_of_what_the_ranks_said_last(
    tmp_path: Path, text: str, speed: float | None
) -> None:
    now = [0.0]
    output = Output(tmp_path, clock=lambda: now[0])
    assert output.generation is None
    (tmp_path / "output.log").write_text(NEW.replace("436.13", "1.00") if text == NEW else "")
    output.read()
    with open(tmp_path / "output.log", "a") as file:
        file.write("The server is fired up and ready to roll!\n" + text)
    output.read()
    assert output.phases.over
    assert output.generation == (None if speed is None else pytest.approx(speed))
    now[0] = SPEED_SECONDS + 1
    output.read()
    assert output.generation == (None if speed is None else 0.0)
