"""The OpenAI surface: what is let in, what is put first, and what clients are told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import bodies, openai
from gateway.errors import BadRequest, NotTaken, Refused, ServicePaused

from .scripted import DATA

CHAT = openai.ENDPOINTS[b"/v1/chat/completions"]
COMPLETIONS = openai.ENDPOINTS[b"/v1/completions"]
RESPONSES = openai.ENDPOINTS[b"/v1/responses"]
MESSAGES = openai.ENDPOINTS[b"/v1/messages"]
GENERATE = openai.ENDPOINTS[b"/generate"]
TOKENIZE = openai.ENDPOINTS[b"/tokenize"]
EMBEDDINGS = openai.ENDPOINTS[b"/v1/embeddings"]
SEEDED = settings(deadline=None, derandomize=True)
USER = [{"role": "user", "content": "x"}]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.text().filter(lambda name: name != "rid"), values, min_size=1, max_size=6)
space = st.text(" \t\r\n", max_size=5)


def recorded(name: str) -> tuple[int, bytes]:
    """Status and body of a recorded answer of a real SGLang."""
    raw = (DATA / name).read_bytes()
    raw = raw[raw.index(b"HTTP/1.1") :]
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


# --- what is let in


def test_only_the_paths_of_the_design_are_served() -> None:
    assert sorted(openai.ENDPOINTS) == [
        b"/detokenize", b"/generate", b"/tokenize", b"/v1/chat/completions", b"/v1/completions",
        b"/v1/embeddings", b"/v1/messages", b"/v1/rerank", b"/v1/responses", b"/v1/score",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/chat/completions", {"messages": USER, "stream": True, "n": 2, "temperature": 0, "top_p": 1}),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 16.0, "temperature": 0.6, "model": "any"}),
        ("/v1/chat/completions", {"messages": USER, "stream": None, "max_tokens": None, "n": None}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}),
        ("/v1/completions", {"prompt": "x", "messages": "of no concern here"}),
        ("/v1/embeddings", {"input": ["x"]}),
        ("/v1/responses", {"input": "x", "store": False, "background": False}),
        ("/v1/messages", {"messages": USER, "max_tokens": 5}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/v1/score", {"query": "x", "items": ["y"]}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/generate", {"text": "x"}),
        ("/generate", {"text": "x", "input_ids": None, "input_embeds": None}),
        ("/generate", {"input_ids": [1, 2]}),
        ("/tokenize", {"prompt": "x", "messages": None}),
        ("/tokenize", {"messages": USER}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_a_valid_body_is_let_in_as_it_is(path: str, body: dict[str, Any]) -> None:
    assert bodies.parse(json.dumps(body).encode(), openai.ENDPOINTS[path.encode()]) == body


@pytest.mark.parametrize(
    ("endpoint", "raw", "param", "says"),
    [
        (CHAT, b"", None, "is empty"),
        (CHAT, b" \n", None, "is empty"),
        (CHAT, b'{"messages": [', None, "not valid JSON"),
        (CHAT, b"\xef\xbb\xbf{}", None, "not valid JSON"),
        (CHAT, b'{"x": "\xff"}', None, "not UTF-8"),
        (CHAT, b"[" * 100_000, None, "nests too deeply"),
        (CHAT, b'{"n": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (CHAT, b"[1, 2]", None, "not an array"),
        (CHAT, b'"x"', None, "not a string"),
        (CHAT, b"null", None, "not null"),
        (CHAT, b"true", None, "not a boolean"),
        (CHAT, b"1.5", None, "not a number"),
        (CHAT, b"{}", "messages", "'messages'"),
        (CHAT, b'{"messages": null}', "messages", "Missing"),
        (CHAT, b'{"messages": []}', "messages", "non-empty"),
        (CHAT, b'{"messages": "x"}', "messages", "non-empty"),
        (CHAT, b'{"messages": [1]}', "messages[0]", "role"),
        (CHAT, b'{"messages": [{"role": "user"}, {"content": "x"}]}', "messages[1]", "role"),
        (CHAT, b'{"messages": [{"role": "user"}], "stream": 1}', "stream", "true or false"),
        (CHAT, b'{"messages": [{"role": "user"}], "model": {}}', "model", "not an object"),
        (CHAT, b'{"messages": [{"role": "user"}], "n": 0}', "n", "at least 1"),
        (CHAT, b'{"messages": [{"role": "user"}], "n": true}', "n", "at least 1"),
        (CHAT, b'{"messages": [{"role": "user"}], "max_tokens": -1}', "max_tokens", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "max_tokens": 1.5}', "max_tokens", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "max_tokens": Infinity}', "max_tokens", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "max_tokens": NaN}', "max_tokens", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "max_tokens": "9"}', "max_tokens", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "temperature": -3}', "temperature", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "temperature": Infinity}', "temperature", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "temperature": NaN}', "temperature", "at least 0"),
        (CHAT, b'{"messages": [{"role": "user"}], "top_p": 2}', "top_p", "between 0 and 1"),
        (COMPLETIONS, b"{}", "prompt", "'prompt'"),
        (EMBEDDINGS, b'{"input": "x", "stream": true}', "stream", "cannot stream"),
        (MESSAGES, b'{"messages": [{"role": "user"}]}', "max_tokens", "'max_tokens'"),
        (RESPONSES, b'{"input": "x", "previous_response_id": "r"}', "previous_response_id", "one replica"),
        (RESPONSES, b'{"input": "x", "background": true}', "background", "one replica"),
        (RESPONSES, b'{"input": "x", "conversation": "c"}', "conversation", "one replica"),
        (RESPONSES, b'{"input": "x", "store": true}', "store", "one replica"),
        (GENERATE, b'{"sampling_params": {}}', "text", "'text' or 'input_ids' or 'input_embeds'"),
        (GENERATE, b'{"input_ids": []}', "input_ids", "non-empty"),
    ],
)  # fmt: skip
def test_a_bad_body_is_told_what_is_wrong_and_where(
    endpoint: openai.Endpoint, raw: bytes, param: str | None, says: str
) -> None:
    with pytest.raises(BadRequest, match=re.escape(says)) as caught:
        bodies.parse(raw, endpoint)
    assert caught.value.param == param
    assert caught.value.status == 400


@SEEDED
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_whatever_the_body_is_it_is_let_in_or_refused(raw: bytes) -> None:
    for endpoint in openai.ENDPOINTS.values():
        try:
            body = bodies.parse(raw, endpoint)
        except BadRequest:
            continue
        bodies.takes_rid(body, endpoint)


members = ["messages", "prompt", "text", "input_ids", "input", "stream", "n", "max_tokens", "sampling_params",
           "documents", "query", "model", "tokens", "rid"]  # fmt: skip


@SEEDED
@given(st.dictionaries(st.sampled_from(members), values | st.just(USER), max_size=8))
def test_known_members_of_any_type_are_let_in_or_refused(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    for endpoint in openai.ENDPOINTS.values():
        try:
            bodies.takes_rid(bodies.parse(raw, endpoint), endpoint)
        except BadRequest as error:
            json.loads(openai.error_body(error))


# --- the rid


@SEEDED
@given(objects, space, space, st.booleans())
def test_with_a_rid_the_json_is_equal_apart_from_it_and_all_other_bytes_are_the_same(
    body: dict[str, Any], before: str, inside: str, ascii_only: bool
) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    raw = before.encode() + b"{" + inside.encode() + raw[1:]
    got = b"".join(bodies.with_rid(raw, "0123abcd"))
    assert json.loads(got.decode("utf-8", "surrogatepass")) == {"rid": "0123abcd", **body}
    assert got.replace(b'"rid":"0123abcd",', b"", 1) == raw
    assert got.index(b'"rid"') == len(before.encode()) + 1


@pytest.mark.parametrize(
    ("endpoint", "body", "takes"),
    [
        (CHAT, {"messages": USER}, True),
        (CHAT, {"messages": USER, "n": 1}, True),
        (CHAT, {"messages": USER, "n": None}, True),
        (CHAT, {"messages": USER, "n": 2}, False),
        (CHAT, {"messages": USER, "rid": "mine"}, False),
        (CHAT, {"messages": USER, "rid": None}, False),
        (COMPLETIONS, {"prompt": "x"}, True),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, True),
        (COMPLETIONS, {"prompt": ["x"]}, False),
        (COMPLETIONS, {"prompt": ["x", "y"]}, False),
        (COMPLETIONS, {"prompt": [[1], [2]]}, False),
        (COMPLETIONS, {"prompt": [True]}, False),
        (COMPLETIONS, {"prompt": []}, False),
        (GENERATE, {"text": "x"}, True),
        (GENERATE, {"text": ["x", "y"]}, False),
        (GENERATE, {"text": "x", "input_ids": None}, True),
        (GENERATE, {"input_ids": [1, 2]}, True),
        (GENERATE, {"input_ids": [[1], [2]]}, False),
        (GENERATE, {"input_embeds": [[0.5]]}, False),
        (GENERATE, {"text": "x", "sampling_params": {"n": 1}}, True),
        (GENERATE, {"text": "x", "sampling_params": {"n": 4}}, False),
        (GENERATE, {"text": "x", "sampling_params": [{}]}, False),
        (MESSAGES, {"messages": USER, "max_tokens": 1}, False),
        (RESPONSES, {"input": "x"}, False),
        (EMBEDDINGS, {"input": "x"}, False),
    ],
)
def test_a_rid_is_put_in_only_where_sglang_takes_one(
    endpoint: openai.Endpoint, body: dict[str, Any], takes: bool
) -> None:
    assert bodies.takes_rid(body, endpoint) is takes


# --- errors


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("err-bad-json.http", 400, "JSON decode error"),
        ("err-bad-tool-choice.http", 400, "Tools cannot be empty"),
        ("err-embeddings.http", 400, "does not appear to be an embedding model"),
        ("err-empty-body.http", 400, "Field required"),
        ("err-empty-messages.http", 400, "Messages cannot be empty."),
        ("err-image.http", 400, "unsupported content type 'image_url'"),
        ("err-json-array.http", 500, "Internal Server Error"),
        ("err-max-tokens-too-big.http", 400, "maximum context length of 2048 tokens"),
        ("err-n0.http", 400, "range() arg 3 must not be zero"),
        ("err-no-ctype.http", 400, "Only 'application/json' is allowed"),
        ("err-temperature.http", 400, "non-negative finite number"),
        ("err-too-long-stream.raw", 400, "is longer than the model's context length"),
        ("get-not_found.http", 404, "Not Found"),
        ("get-chat-405.http", 405, "Method Not Allowed"),
        ("get-v1_models_unknown.http", 404, "tiny"),
    ],
)
def test_every_error_of_sglang_becomes_openais_shape(name: str, status: int, says: str) -> None:
    code, body = recorded(name)
    assert code == status
    error = openai.refused(code, body)
    assert isinstance(error, Refused)
    assert error.status == status
    shape = json.loads(openai.error_body(error))
    assert set(shape) == {"error"}
    assert set(shape["error"]) == {"message", "type", "param", "code"}
    assert shape["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert isinstance(shape["error"]["code"], str)
    if name != "get-v1_models_unknown.http":
        assert says in shape["error"]["message"]
    assert "/sgl-workspace" not in shape["error"]["message"]
    assert ".py" not in shape["error"]["message"]


def test_a_code_and_a_param_of_the_replica_are_kept_when_they_have_names() -> None:
    error = openai.refused(*recorded("get-v1_models_unknown.http"))
    assert (error.code, error.param) == ("model_not_found", "model")


def test_a_full_queue_may_be_tried_elsewhere() -> None:
    error = openai.refused(*recorded("queue-full-nonstream.raw"))
    assert isinstance(error, NotTaken)
    assert (error.message, error.retry_after) == ("The request queue is full.", 5)
    assert isinstance(openai.refused(503, b""), NotTaken)


@pytest.mark.parametrize("status", [401, 403])
def test_a_replica_that_refuses_our_key_is_not_the_clients_fault(status: int) -> None:
    error = openai.refused(status, b'{"error":"Unauthorized"}')
    assert (error.status, error.code) == (502, "replica_unauthorized")
    assert "--replica-api-key" in error.message


def test_a_redirect_of_the_replica_is_no_answer_for_the_client() -> None:
    assert openai.refused(307, b"").status == 502


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "The replica answered 500."),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"message":["a", 1]}}', '["a", 1]'),
        (b'{"error":17}', '{"error": 17}'),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b"[" * 100_000, "["),
        (b'{"message":"\\ud800"}', "\ud800"),
        (b"\xff\xfe", "\ufffd"),
    ],
)
def test_an_error_body_of_any_shape_is_read_as_well_as_possible(body: bytes, says: str) -> None:
    error = openai.refused(500, body)
    assert error.message.startswith(says)
    assert json.loads(openai.error_body(error))["error"]["message"] == error.message


def test_an_error_says_which_model_code_a_number_is_not_a_code() -> None:
    error = openai.refused(400, b'{"message":"x","code":"400","param":["a"]}')
    assert (error.code, error.param) == ("invalid_request", None)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ('boom File "/opt/x/y.py", line 12, in f: why', "boom: why"),
        ("no such file: '/root/.cache/hub/x.json'", "no such file: ''"),
        ("see /usr/lib", "see"),
        ("and/or both, image/png", "and/or both, image/png"),
        ("input/output/total", "input/output/total"),
        ("https://example.org/a/b says no", "https://example.org/a/b says no"),
        ("a\n  b\tc", "a b c"),
    ],
)
def test_paths_of_the_replica_are_taken_out_of_its_messages_and_nothing_else(message: str, says: str) -> None:
    assert openai.scrub(message) == says


def test_a_message_is_at_most_2000_characters() -> None:
    assert len(openai.scrub("x" * 5000)) == 2000


def test_anthropics_clients_get_their_own_shape() -> None:
    body = json.loads(openai.error_body(ServicePaused("no"), MESSAGES))
    assert body["type"] == "error"
    assert body["error"]["message"] == "no"
    frame = openai.error_frame(ServicePaused("no"), MESSAGES)
    assert frame.startswith(b"event: error\ndata: {")


@pytest.mark.parametrize("endpoint", openai.ENDPOINTS.values(), ids=lambda e: e.path)
@SEEDED
@given(message=st.text())
def test_an_error_event_is_one_event_that_holds_the_error(endpoint: openai.Endpoint, message: str) -> None:
    frame = openai.error_frame(ServicePaused(message), endpoint)
    assert openai.first_event_end(frame) == len(frame)
    data = json.loads(frame[frame.index(b"data: ") + 6 :])
    assert (data if endpoint.typed_errors else data["error"])["message"] == message
    assert not openai.is_complete(frame, endpoint)


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
