"""No secret is let through, in whatever quotes and however the text is cut."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas import tls
from replicas.masking import _LONG, Mask, Masking

# Stars are what secrets become; a value's own spaces at its ends are not looked for.
CHARACTERS = st.characters(
    min_codepoint=33, max_codepoint=0x2FF, exclude_characters="*", exclude_categories=["Cc"]
)
SECRETS = st.lists(st.text(CHARACTERS, min_size=4, max_size=24), min_size=1, max_size=3)
PRINTED: list[Callable[[str], str]] = [
    str, repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False), shlex.quote,
    quote, lambda value: quote(value, safe=""), quote_plus, lambda value: f"--api-key {value}",
    lambda value: f"api_key={value!r}, model='x'", lambda value: f"(head, rank=0, pid=9) {value}\r",
]  # fmt: skip
KEY = tls.make("svc").key


def through(mask: Mask, text: str, cuts: list[int]) -> str:
    """What comes out of a stream into which the text comes in pieces of these lengths."""
    masking, at, seen = Masking(mask), 0, []
    for length in cuts:
        seen.append(masking.feed(text[at : at + length]))
        at += length
    return "".join([*seen, masking.feed(text[at:]), masking.end()])


@given(SECRETS, st.data())
def test_no_secret_appears_whatever_its_quotes_and_the_cuts(secrets: list[str], data: st.DataObject) -> None:
    one = st.tuples(st.text(CHARACTERS, max_size=8), st.sampled_from(PRINTED), st.sampled_from(secrets))
    parts = data.draw(st.lists(one, min_size=1, max_size=6))
    text = "\n".join(f"{before} {printed(secret)}" for before, printed, secret in parts)
    mask = Mask(secrets)
    seen = through(mask, text, data.draw(st.lists(st.integers(0, 40))))
    assert not [secret for secret in secrets if secret in seen]
    assert not [secret for _, printed, secret in parts if printed(secret) in seen]
    assert seen == mask(text)


@given(st.text(), st.lists(st.integers(0, 5)))
def test_nothing_but_secrets_is_changed(text: str, cuts: list[int]) -> None:
    mask = Mask(["correct horse battery staple"])
    assert through(mask, text, cuts) == text


@settings(max_examples=30)
@given(st.integers(0, 3 * _LONG), st.integers(500, 30_000))
def test_a_line_without_an_end_is_let_through_in_parts_without_the_secret(before: int, piece: int) -> None:
    mask = Mask(["s3cret-value"])
    masking, text, seen = Masking(mask), "." * before + "s3cret-value" + "-" * 2 * _LONG, ""
    for at in range(0, len(text), piece):
        seen += masking.feed(text[at : at + piece])
        assert len(seen) > at - 2 * _LONG
    assert seen + masking.end() == "." * before + "***" + "-" * 2 * _LONG


@pytest.mark.parametrize(
    "printed", [str, repr, json.dumps, quote, lambda key: key.replace("\n", "\n(a, rank=0, pid=3) ")]
)
@pytest.mark.parametrize("values", [[KEY], []], ids=["known", "unknown"])
def test_a_private_key_is_masked_line_by_line_and_as_a_whole(
    printed: Callable[[str], str], values: list[str]
) -> None:
    if printed is quote and not values:
        pytest.skip("percent signs everywhere: only what is known is found")
    body = [line for line in KEY.splitlines() if not line.startswith("-----")]
    seen = Mask(values)(f"first\n{printed(KEY)}\nthe last line\n")
    assert not [line for line in body if line in seen or quote(line, safe="") in seen]
    assert seen.startswith("first\n")
    assert seen.endswith("the last line\n")


def test_other_processes_may_print_in_the_middle_of_a_private_key() -> None:
    head, *body, end = KEY.splitlines()
    other = "[2026-11-24 05:07:46] Decode batch, #running-req: 2"
    text = "\n".join([head, body[0], other, *body[1:], end, "on"])
    assert other in Mask()(text)
    assert not [line for line in body if line in Mask()(text)]


def test_a_log_that_begins_in_the_middle_of_a_known_key_shows_nothing_of_it() -> None:
    *rest, _ = KEY.splitlines()[2:]
    assert not [line for line in rest if line in Mask([KEY])("\n".join(rest))]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("api_key='sk-1', admin_api_key=None", "api_key='***', admin_api_key=None"),
        ("{'api_key': 'sk 1', 'x': 1}", "{'api_key': '***', 'x': 1}"),
        ('"api_key": "a\\"b"}', '"api_key": "***"}'),
        ("python -m sglang --api-key sk-1 --tp 8", "python -m sglang --api-key *** --tp 8"),
        ("REPLICA_API_KEY=sk-1", "REPLICA_API_KEY=***"),
        ("GET /x?api_key=sk-1&y=2", "GET /x?api_key=***&y=2"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("token hf_ABCdefGHIjklMNOpqr is", "token *** is"),
        ("hf_hub and hf_transfer", "hf_hub and hf_transfer"),
    ],
)
def test_what_looks_like_a_secret_is_masked_though_nobody_named_it(text: str, seen: str) -> None:
    assert Mask()(text) == seen


def test_values_of_options_are_masked_the_longest_first() -> None:
    mask = Mask({"A": "hf_abc", "B": "hf_abcdef", "C": "1", "D": ""}.values())
    assert mask("tokens hf_abcdef and hf_abc, 1 public") == "tokens *** and ***, 1 public"


def test_short_values_stay_and_overlapping_ones_leave_nothing_behind() -> None:
    assert Mask(["1", "", "abc"])("1 abc") == "1 abc"
    assert Mask(["abcdef", "defghi", "abcd"])("xabcdefghiy") == "x***y"
    assert "abcd" not in repr(Mask(["abcd"]))


def test_a_real_sglangs_first_line_is_shown_without_its_key() -> None:
    folder = Path(__file__).parents[1] / "data" / "sglang"
    line = (folder / "server_args.txt").read_text()
    assert "api_key='sk-secret'" in line
    assert Mask()(line) == line.replace("sk-secret", "***")
