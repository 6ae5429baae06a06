"""The OpenAI surface: what is let in, and what is put first."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import bodies, openai
from gateway.errors import BadRequest

CHAT = openai.ENDPOINTS[b"/v1/chat/completions"]
COMPLETIONS = openai.ENDPOINTS[b"/v1/completions"]
RESPONSES = openai.ENDPOINTS[b"/v1/responses"]
MESSAGES = openai.ENDPOINTS[b"/v1/messages"]
GENERATE = openai.ENDPOINTS[b"/generate"]
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
