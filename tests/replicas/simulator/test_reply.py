"""The text that the simulator says."""

from __future__ import annotations

import pytest

from replicas.simulator.reply import ANSWER, REASONING, Reply, count_tokens, tokenize


@pytest.mark.parametrize(
    "text", [ANSWER, REASONING, "a_b  c\n\nd!?", "naïve 日本語 text", "", "\n", "</think>x</think>"]
)
def test_the_tokens_together_are_the_text(text):
    assert "".join(tokenize(text)) == text


def test_the_same_settings_say_the_same():
    assert Reply.make(None, reasoning=True) == Reply.make(None, reasoning=True)


def test_it_is_long_enough_for_a_stream_of_two_hundred_tokens():
    assert len(Reply.make(None, reasoning=False)) >= 200


def test_past_its_end_the_answer_begins_anew():
    reply = Reply.make("one two", reasoning=False)
    assert reply.text(0, 5) == "one two one two one"
    assert "".join(reply.text(index, index + 1) for index in range(5)) == reply.text(0, 5)


def test_with_a_reasoning_parser_it_thinks_first():
    reply = Reply.make("answer", reasoning=True)
    thinking, answer = reply.split(0, len(reply))
    assert (thinking, answer) == (REASONING, "answer")
    pieces = [reply.split(index, index + 1) for index in range(len(reply))]
    assert "".join(piece[0] for piece in pieces) == REASONING
    assert "".join(piece[1] for piece in pieces) == "answer"


def test_a_prompt_has_a_token_for_each_four_characters():
    assert [count_tokens("x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]
