"""How long each client is kept waiting, and in which way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.patience import SHORTEST_PAUSE, Patience, Phases, patience


def wait(read_timeout: bytes | None = None, wish: bytes | None = None, **flags: object) -> Patience:
    """With the default flags."""
    values: dict[str, object] = {"hold": "beats", "commit_after": 5.0, "beat_every": 8.0, "beat_after": 45.0}
    return patience(read_timeout, wish, **{**values, **flags})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sent", "commit_after", "every", "beat_after"),
    [
        (None, 5, 8, 45),
        (b"600", 5, 8, 45),  # openai-python's default
        (b"600.0", 5, 8, 45),
        (b"60", 5, 8, 20),
        (b"15", 5, 5, 5),
        (b"5", 5 / 3, 5 / 3, 5 / 3),
        (b"0.9", 0.3, 0.3, 0.3),
    ],
)
def test_every_wait_is_at_most_a_third_of_what_the_client_said(
    sent: bytes | None, commit_after: float, every: float, beat_after: float
) -> None:
    got = wait(sent)
    assert (got.mode, got.give_up) == ("beats", None)
    assert (got.commit_after, got.every, got.beat_after) == pytest.approx((commit_after, every, beat_after))


@pytest.mark.parametrize("sent", [b"None", b"", b"soon", b"nan", b"inf", b"-1", b"0", b"1e12", b"\xff"])
def test_an_unreadable_timeout_counts_as_none(sent: bytes) -> None:
    assert wait(sent) == wait(None)
    assert wait(sent, b"silent") == wait(None, b"silent")


@pytest.mark.parametrize(
    ("sent", "give_up"),
    [(None, 290), (b"600", 590), (b"30", 20), (b"20", 10), (b"15", 7.5), (b"2", 1)],
)
def test_silent_answers_ten_seconds_before_the_client_gives_up(sent: bytes | None, give_up: float) -> None:
    assert wait(sent, b"silent") == Patience("silent", None, 8, None, give_up)


def test_reject_neither_commits_nor_beats_and_answers_before_the_client_gives_up() -> None:
    assert wait(b"600", b"reject") == Patience("reject", None, 8, None, 590)


@pytest.mark.parametrize("flag", ["beats", "silent", "reject"])
@pytest.mark.parametrize("wish", ["beats", "silent", "reject"])
def test_the_header_overrides_the_flag(flag: str, wish: str) -> None:
    assert wait(None, wish.encode(), hold=flag) == wait(None, None, hold=wish)


@pytest.mark.parametrize("wish", [b" Silent ", b"SILENT"])
def test_the_header_is_read_without_case_and_blanks(wish: bytes) -> None:
    assert wait(None, wish).mode == "silent"


@pytest.mark.parametrize("wish", [b"", b"wait", b"beats,silent", b"\xe9"])
def test_an_unknown_wish_is_the_clients_mistake(wish: bytes) -> None:
    with pytest.raises(BadRequest, match="beats, silent or reject") as caught:
        wait(None, wish)
    assert (caught.value.status, caught.value.param) == (400, "X-Gateway-Hold")


def test_beats_during_a_replicas_silence_can_be_switched_off() -> None:
    assert wait(b"5", None, beat_after=0.0).beat_after is None


def test_commit_at_once_can_be_asked_for() -> None:
    assert wait(None, None, commit_after=0.0).commit_after == 0


numbers = st.floats(0, 1e6, allow_nan=False)


@given(
    st.one_of(st.none(), st.binary(max_size=12), st.floats().map(lambda x: repr(x).encode())),
    st.sampled_from([None, b"beats", b"silent", b"reject"]),
    st.sampled_from(["beats", "silent", "reject"]),
    numbers, numbers, numbers,
)  # fmt: skip
def test_no_client_and_no_flag_can_make_the_gateway_spin_or_overstay(
    sent: bytes | None, wish: bytes | None, hold: str, commit_after: float, every: float, beat_after: float
) -> None:
    got = wait(sent, wish, hold=hold, commit_after=commit_after, beat_every=every, beat_after=beat_after)
    try:
        limit = float(sent) if sent is not None else math.inf
    except ValueError:
        limit = math.inf
    if not 0 < limit < 1e9:
        limit = math.inf
    if got.mode == "beats":
        third = max(limit / 3, SHORTEST_PAUSE)
        assert got.every >= SHORTEST_PAUSE
        assert got.commit_after is not None
        assert got.commit_after <= min(commit_after, third)
        assert got.every <= max(third, SHORTEST_PAUSE)
        assert got.beat_after is None or SHORTEST_PAUSE <= got.beat_after <= third
        assert got.give_up is None
    else:
        assert got.commit_after is None
        assert got.beat_after is None
        assert got.give_up is not None
        assert 0 <= got.give_up < limit
        assert got.give_up == 290 or limit < math.inf


@pytest.mark.parametrize("count", [10, 1000, 10_000])
def test_phases_fill_a_period_evenly_however_many_are_taken(count: int) -> None:
    phases = Phases()
    tenths = [0] * 10
    for _ in range(count):
        tenths[int(phases() * 10)] += 1
    assert max(tenths) <= count / 10 + 2
