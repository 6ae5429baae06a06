"""The audit of tests/chaos finds what it is there to find."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from replicas.board import Board
from tests.chaos import audit
from tests.chaos.client import Ask, Outcome, Wire, judge, reply_text

STREAM = Ask("r1", "streaming", True, 3)
PLAIN = Ask("r1", "short", False, 3)


def event(text: str, finish: str | None = None) -> str:
    choice = {"delta": {"content": text}, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice]}) + "\n\n"


async def seen(ask: Ask, body: str, status: int = 200, complete: bool = True) -> Outcome:
    wire = Wire()
    wire.begin(ask)
    wire.status, wire.seen, wire.complete, wire.body = status, True, complete, [body.encode()]
    return judge(ask, wire)


DONE = "data: [DONE]\n\n"
WHOLE = event("alpha") + event(" says") + event(":") + event("", "length")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (WHOLE + DONE, "complete"),
        (": cold-start\n" + WHOLE + DONE, "complete"),
        (WHOLE, "false"),  # no end marker
        (event("alpha") + event(" says") + event("", "length") + DONE, "false"),  # a token is missing
        (event("alpha") + event(" says") + event(": b", "length") + DONE, "false"),
        (event("alpha") + event("", "abort") + DONE, "false"),
        (event("alpha") + 'data: {"error": {"code": "x"}}\n\n', "error"),
        (event("alpha") + 'data: {"error": {"code": "x"}}\n\n' + DONE, "false"),
        (event("alpha")[:-9] + DONE, "false"),
    ],
)
async def test_a_stream_is_complete_only_with_all_its_text_and_its_end_marker(body: str, what: str) -> None:
    assert (await seen(STREAM, body)).what == what


async def test_an_answer_is_complete_only_with_its_whole_text() -> None:
    def body(text: str) -> str:
        return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "length"}]})

    assert reply_text("beta").startswith("beta says: b0 b1")
    whole = await seen(PLAIN, "  " + body("beta says:"))
    assert (whole.what, whole.source) == ("complete", "beta")
    assert (await seen(PLAIN, body("beta says"))).what == "false"
    assert (await seen(PLAIN, '{"error": {"code": "x"}}')).what == "false"
    assert (await seen(PLAIN, '{"error": {"code": "x"}}', 503)).what == "error"
    assert (await seen(PLAIN, body("beta says:"), complete=False)).what == "broken"


def test_a_run_after_a_byte_is_found(tmp_path: Path) -> None:
    journals = {"alpha": tmp_path / "alpha", "beta": tmp_path / "beta"}
    journals["alpha"].write_text("run r1 10\nrun r2 20\nbyte r2 30\n")
    journals["beta"].write_text("run r1 40\nbyte r1 50\n")
    answered = (("r1", "beta"), ("r2", "alpha"))
    done = [Outcome(Ask(marker, "short", False, 3), "complete", source=name) for marker, name in answered]
    assert audit.runs(done, journals) == ([], 3, 1)
    journals["beta"].write_text("run r1 40\nbyte r1 50\nrun r2 60\n")
    found, _, _ = audit.runs(done, journals)
    assert ["r2" in line for line in found] == [True, True]  # by the journals, and by whose text came
    gone = [Outcome(Ask("r2", "cancelled", True, 3), "left", first_ns=35)]
    journals["alpha"].write_text("run r2 20\n")
    assert len(audit.runs(gone, journals)[0]) == 1


def test_ends_that_do_not_agree_are_found() -> None:
    good = [Outcome(Ask("r1", "short", False, 3), "complete", seen=True)]
    assert audit.ends(good, Counter(complete=1), {"r1": ["complete"]}, 0) == []
    assert audit.ends(good, Counter(complete=2), {"r1": ["complete"]}, 0)
    assert audit.ends(good, Counter(complete=1), {"r1": ["complete", "complete"]}, 1)
    assert audit.ends(good, Counter(upstream_died=1), {"r1": ["upstream_died"]}, 1)
    assert audit.ends(good, Counter(worker_died=1), {}, 1) == []  # killed between the answer and its account
    assert audit.ends(good, Counter(), {}, 0)
    cut = [Outcome(Ask("r1", "short", False, 3), "broken", seen=True)]
    assert audit.ends(cut, Counter(worker_died=1), {}, 1) == []
    assert audit.ends(cut, Counter(), {}, 0)
    assert audit.ends(cut, Counter(worker_died=3), {}, 1)
    assert audit.ends(cut, Counter(complete=1), {"r1": ["complete"]}, 0)


def test_ends_are_read_from_metrics_and_access_log(tmp_path: Path) -> None:
    text = 'gateway_requests_total{code="200",end="complete",service="a"} 2.0\n'
    text += 'gateway_requests_total{code="200",end="complete",service="b"} 1.0\n'
    text += 'gateway_requests_total{code="0",end="worker_died",service="b"} 4.0\n'
    assert audit.metric_ends(text) == {"complete": 3, "worker_died": 4}
    log = tmp_path / "access.log"
    log.write_text('{"request_id": "r1", "end": "complete"}\n{"request_id": "r2", "en')
    assert audit.access_ends(log) == {"r1": ["complete"]}


def test_a_board_that_is_not_at_rest_is_found(tmp_path: Path) -> None:
    with Board.create(tmp_path / "board", 2) as board:
        assert audit.board(board) == []
        row = board.worker(1)
        board.cells[row.started + 3] = 1
        board.cells[row.arrived] = 2
        board.cells[row.waiting] = 1
        assert len(audit.board(board)) == 3


@pytest.mark.parametrize(
    ("seen", "grown"),
    [
        ([38] * 10 + [40] * 30, False),  # it warms up
        ([40] * 15 + [70] * 5 + [40] * 20, False),  # what was held for a while
        ([40] * 20 + [70] * 19 + [0], True),  # what never comes back
        ([40 + second for second in range(40)], True),
        ([40 + 5 * second for second in range(10)], False),  # too young to tell
    ],
)
def test_memory_that_only_grows_is_found(seen: list[int], grown: bool) -> None:
    assert bool(audit.memory({("worker", 1): seen, ("controller", 2): [40] * 40})) is grown


def test_what_holds_no_requests_has_less_to_grow_by() -> None:
    seen = [60] * 20 + [65] * 20
    assert audit.memory({("worker", 1): seen}) == []
    assert audit.memory({("controller", 2): seen}) == ["controller 2 has grown from 60 to 65 MiB in 40 s"]
