"""Streams: the first event, the end and its usage, and what is put between."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import openai
from gateway.errors import NotTaken

from .scripted import recorded

CHAT = openai.ENDPOINTS[b"/v1/chat/completions"]
COMPLETIONS = openai.ENDPOINTS[b"/v1/completions"]
RESPONSES = openai.ENDPOINTS[b"/v1/responses"]
MESSAGES = openai.ENDPOINTS[b"/v1/messages"]
SEEDED = settings(deadline=None, derandomize=True)


# --- the first event

_SIZE, _, _CHUNKS = recorded("queue-full-stream.raw")[1].partition(b"\r\n")
EVENT = _CHUNKS[: int(_SIZE, 16)]
EVENTS = EVENT + b"data: [DONE]\n\n"


def crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


@pytest.mark.parametrize("stream", [EVENTS, crlf(EVENTS), EVENTS.replace(b"\n", b"\r")])
def test_the_recorded_full_queue_is_seen_wherever_the_first_event_is_cut(stream: bytes) -> None:
    assert b"The request queue is full." in stream
    whole = stream.index(b"data: [DONE]")
    for cut in range(len(stream) + 1):
        end = openai.first_event_end(stream[:cut])
        assert end == (whole if cut >= whole else -1), cut
        error = openai.first_event_error(stream[:cut])
        if cut >= whole:
            assert isinstance(error, NotTaken)
            assert error.message == "The request queue is full."


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_any_blank_line_ends_an_event(ending: bytes) -> None:
    assert openai.first_event_end(b"data: x" + ending + b"data: y") == len(b"data: x" + ending)
    assert openai.between_events(b"data: x" + ending)


@pytest.mark.parametrize("tail", [b"data: x", b"data: x\n", b"data: x\r\n", b"data: x\r\n\r", b": c\n"])
def test_within_an_event_nothing_can_be_slipped_in(tail: bytes) -> None:
    assert not openai.between_events(tail)


def test_before_the_first_byte_a_comment_can_be_sent() -> None:
    assert openai.between_events(b"")


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n',
        b'data: {"choices":[{"delta":{"error":"x"}}]}\n\n',
        b'data: {"error":null,"choices":[]}\n\n',
        b'data: {"error":{},"choices":[]}\n\n',
        b'data: ["error"]\n\n',
        b'data: {"error": broken\n\n',
        b'data: {"choices":[]}\n\ndata: {"error":{"code":503}}\n\n',
        b': "error"\n\n',
    ],
)
def test_a_first_event_that_only_speaks_of_errors_is_none(event: bytes) -> None:
    assert openai.first_event_error(event) is None


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error":{"code":400,"message":"m"}}\n\n', 400),
        (b'data:{"error":{"code":"x","message":"m"}}\n\n', 502),
        (b'data: {"error":{"code":200,"message":"m"}}\n\n', 502),
        (b'data: {"error":"m"}\n\n', 502),
        (b'event: error\ndata: {"type":"error",\ndata: "error":{"message":"m"}}\n\n', 502),
    ],
)
def test_an_error_event_gets_an_honest_status(event: bytes, status: int) -> None:
    error = openai.first_event_error(event)
    assert error is not None
    assert (error.status, error.message) == (status, "m")


# --- the end, and usage


@pytest.mark.parametrize(
    ("endpoint", "tail", "complete"),
    [
        (CHAT, b'data: {"x":1}\n\ndata: [DONE]\n\n', True),
        (CHAT, b"data: [DONE]\r\n\r\n", True),
        (CHAT, b"data:[DONE]\n\n", True),
        (CHAT, b"data: x\n\ndata: [DONE]", True),
        (CHAT, b"data: x\r\rdata: [DONE]\r\r", True),
        (CHAT, b"xdata: [DONE]\n\n", False),
        (CHAT, b": data: [DONE]\n\ndata: x\n\ndata: [DONE]\n\n", True),
        (CHAT, b'data: {"content":"a stream ends in data: [DONE]"}\n\n', False),
        (CHAT, b'data: {"content":"\\ndata: [DONE]\\n"}\n\n', False),
        (CHAT, b"data: [DON", False),
        (CHAT, b"", False),
        (MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (MESSAGES, b'data: {"text":"message_stop, event: message_stop"}\n\n', False),
        (RESPONSES, b'\nevent: response.completed\ndata: {"type":"response.completed"}\n\n', True),
        (RESPONSES, b'event: response.incomplete\ndata: {}\n\n', True),
        (RESPONSES, b'event: response.failed\ndata: {}\n\n', True),
        (RESPONSES, b'event: response.output_text.delta\ndata: {"d":"response.completed"}\n\n', False),
    ],
)  # fmt: skip
def test_a_stream_is_complete_with_its_end_marker_and_not_when_it_speaks_of_it(
    endpoint: openai.Endpoint, tail: bytes, complete: bool
) -> None:
    assert openai.is_complete(tail, endpoint) is complete


@pytest.mark.parametrize("name", ["stream-usage.raw", "completions-stream.raw", "generate-stream.raw"])
def test_a_recorded_stream_is_complete_and_without_its_last_event_it_is_not(name: str) -> None:
    _, body = recorded(name)
    assert openai.is_complete(body.replace(b"\r\ndata: [DONE]", b"\ndata: [DONE]"), CHAT)
    assert not openai.is_complete(body[: body.index(b"data: [DONE]")], CHAT)


@pytest.mark.parametrize(
    ("tail", "tokens"),
    [
        (b'"usage":{"prompt_tokens":22,"total_tokens":38,"completion_tokens":16}', (22, 16)),
        (b'"usage": {"prompt_tokens": 22, "completion_tokens": 16}', (22, 16)),
        (b'"usage":{"input_tokens":3,"output_tokens":4}', (3, 4)),
        (b'"usage":{"output_tokens":4}', (None, 4)),
        (b'"usage":null', (None, None)),
        (b'"usage":{"prompt_tokens":1,"completion_tokens":1},"usage":{"prompt_tokens":2}', (2, None)),
        (b'"content":"\\"usage\\":{\\"prompt_tokens\\":9}"', (None, None)),
        (b"", (None, None)),
        (b'"usage":{"prompt_tokens":1%b,"completion_tokens":-1}' % (b"0" * 400), (None, None)),
    ],
)
def test_usage_is_read_from_the_last_bytes(tail: bytes, tokens: tuple[int | None, int | None]) -> None:
    assert openai.usage(tail) == tokens


def test_usage_is_read_from_sglangs_own_answers() -> None:
    for name in ("chat-nonstream-rid.http", "stream-usage.raw", "completions-nonstream.http"):
        came, went = openai.usage(recorded(name)[1])
        assert came is not None, name
        assert went is not None, name


# --- beats


@SEEDED
@given(st.text())
def test_a_comment_is_one_line_that_no_client_takes_for_anything_else(text: str) -> None:
    beat = openai.comment(text)
    assert beat.startswith(b": ")
    assert beat.endswith(b"\n")
    assert len(beat.decode().splitlines()) == 1
    assert openai.first_event_end(beat) == -1
    assert not re.search(rb"(?:^|[\r\n])(?:id|retry|event|data):", beat)


@pytest.mark.parametrize(
    ("endpoint", "kind", "choice"),
    [
        (CHAT, "chat.completion.chunk", {"index": 0, "delta": {}, "finish_reason": None}),
        (COMPLETIONS, "text_completion", {"index": 0, "text": "", "logprobs": None, "finish_reason": None}),
    ],
)
@SEEDED
@given(model=st.text())
def test_an_empty_chunk_is_a_chunk_without_content(
    endpoint: openai.Endpoint, kind: str, choice: dict[str, Any], model: str
) -> None:
    data = openai.empty_chunk(endpoint, "ab", model, 7)
    assert data.startswith(b"data: ")
    assert openai.first_event_end(data) == len(data)
    assert json.loads(data[6:]) == {
        "id": "ab", "object": kind, "created": 7, "model": model, "choices": [choice],
    }  # fmt: skip


def test_an_unpaired_surrogate_goes_out_as_it_came_in() -> None:
    assert b'"model": "\\ud800"' in openai.empty_chunk(CHAT, "ab", "\ud800", 7)


def test_a_ping_is_anthropics_own_event() -> None:
    assert openai.first_event_end(openai.PING) == len(openai.PING)
    assert json.loads(openai.PING.split(b"data: ")[1]) == {"type": "ping"}
