"""From tokens to bytes: one Answer is one request being served, in the dialect of its endpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from . import shapes
from .asking import Ask
from .connection import Exchange
from .engine import MAX_RESERVED, Sequence
from .reply import Reply

EOS = 1  # token id that ends a DeepSeek-R1 answer; comes as matched_stop


@dataclass(slots=True, eq=False)
class Choice:
    """One of the `n` answers to one prompt."""

    answer: Answer
    index: int
    sequence: Sequence
    chunks: shapes.ChatChunks | None = None
    sent: int = 0  # tokens already in an event
    ended: bool = False  # its last token has been dealt with


@dataclass(slots=True, eq=False)
class Answer:
    """One request being served. Mutable; changed by the server as tokens come and the client goes."""

    ask: Ask
    exchange: Exchange
    reply: Reply
    parser: bool  # a reasoning parser is in use
    marker: str | None  # by which a client finds its request in /sim/stats
    rid: str
    choices: list[Choice] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    first_ns: int | None = None
    finished_ns: int | None = None
    started: bool = False  # bytes were sent
    gone: bool = False  # the client has left

    @classmethod
    def make(cls, ask: Ask, exchange: Exchange, reply: Reply, *, parser: bool, marker: str | None) -> Answer:
        """The answer and its sequences, ready for the engine."""
        answer = cls(ask, exchange, reply, parser, marker, ask.rid or uuid4().hex)
        length = len(reply)
        limit = length if ask.max_new is None else max(1, ask.max_new)
        want = limit if ask.ignore_eos else min(limit, length)
        several = ask.n * len(ask.prompts) > 1
        for prompt in ask.prompts:
            for _ in range(ask.n):
                index = len(answer.choices)
                rid = answer.rid
                if several and (index or ask.rid):
                    rid = f"{ask.rid}_{uuid4().hex}" if ask.rid else uuid4().hex
                allowed = MAX_RESERVED if ask.max_new is None else limit
                sequence = Sequence(rid, prompt, want, allowed, ignore_eos=ask.ignore_eos)
                cut = ask.ignore_eos or (ask.max_new is not None and limit <= length)
                sequence.ending = "length" if cut else "stop"
                choice = Choice(answer, index, sequence)
                sequence.owner = choice
                answer.choices.append(choice)
        return answer

    @property
    def over(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.ended for choice in self.choices)

    @property
    def generated(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.sequence.generated for choice in self.choices)

    def usage(self, choices: list[Choice] | None = None) -> shapes.Json:
        """Token counts over `choices` (default: all). A prompt counts once however many choices it has."""
        chosen = self.choices if choices is None else choices
        reasoning = sum(min(choice.sequence.generated, self.reply.thinking) for choice in chosen)
        prompts = self.ask.prompts if choices is None else (chosen[0].sequence.prompt_tokens,)
        completion = sum(choice.sequence.generated for choice in chosen)
        return shapes.usage(sum(prompts), completion, reasoning, reasoning_parser=self.parser)


def matched(sequence: Sequence) -> int | None:
    """`matched_stop`: the id of the end token, if that is what ended it."""
    return EOS if sequence.finish == "stop" else None


class Dialect(Protocol):
    """How one endpoint says things."""

    def events(self, choice: Choice) -> list[bytes]:
        """The events that are due now that `choice` has more tokens, or has finished."""

    def closing(self, answer: Answer) -> list[bytes]:
        """The events between the last choice's end and [DONE]."""

    def body(self, answer: Answer) -> bytes:
        """The whole answer at once."""


class Chat:
    """/v1/chat/completions."""

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence, chunks = choice.answer, choice.sequence, choice.chunks
        events = []
        if chunks is None:
            chunks = choice.chunks = shapes.ChatChunks(
                sequence.rid, answer.created, answer.ask.model, choice.index
            )
            events.append(chunks.role())
        if choice.sent < sequence.generated:
            used = answer.usage([choice]) if answer.ask.continuous_usage else None
            if answer.parser and answer.ask.separate_reasoning:
                thinking, text = answer.reply.split(choice.sent, sequence.generated)
                if thinking:
                    events.append(chunks.reasoning(thinking, used))
            else:
                text = answer.reply.text(choice.sent, sequence.generated)
            if text:
                events.append(chunks.content(text, used))
            choice.sent = sequence.generated
        if sequence.finish is not None:
            events.append(chunks.final(sequence.finish, matched(sequence)))
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        chunks = answer.choices[0].chunks
        return [chunks.usage(answer.usage())] if answer.ask.include_usage and chunks is not None else []

    def body(self, answer: Answer) -> bytes:
        choices = []
        for choice in answer.choices:
            sequence = choice.sequence
            thinking: str | None = None
            if answer.parser and answer.ask.separate_reasoning:
                thinking, text = answer.reply.split(0, sequence.generated)
            else:
                text = answer.reply.text(0, sequence.generated)
            choices.append(
                shapes.chat_choice(choice.index, text, thinking or None, sequence.finish, matched(sequence))
            )
        return shapes.chat(
            answer.rid,
            answer.created,
            answer.ask.model,
            choices,
            answer.usage(),
            answer.choices[0].sequence.generated,
        )


class Completions:
    """/v1/completions."""

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence = choice.answer, choice.sequence
        text = answer.reply.text(choice.sent, sequence.generated)
        choice.sent = sequence.generated
        entry = shapes.text_choice(choice.index, text, sequence.finish, matched(sequence))
        used = answer.usage([choice]) if answer.ask.continuous_usage else None
        return [shapes.text_chunk(sequence.rid, answer.created, answer.ask.model, entry, used)]

    def closing(self, answer: Answer) -> list[bytes]:
        if not answer.ask.include_usage:
            return []
        return [shapes.text_chunk(answer.rid, answer.created, answer.ask.model, None, answer.usage())]

    def body(self, answer: Answer) -> bytes:
        choices = []
        for choice in answer.choices:
            text = answer.reply.text(0, choice.sequence.generated)
            choices.append(
                shapes.text_choice(choice.index, text, choice.sequence.finish, matched(choice.sequence))
            )
        return shapes.text_completion(
            answer.rid,
            answer.created,
            answer.ask.model,
            choices,
            answer.usage(),
            answer.choices[0].sequence.generated,
        )


class Generate:
    """/generate, SGLang's own: each event holds the whole text so far."""

    def events(self, choice: Choice) -> list[bytes]:
        choice.sent = choice.sequence.generated
        return [shapes.event(self._entry(choice))]

    def closing(self, answer: Answer) -> list[bytes]:
        return []

    def body(self, answer: Answer) -> bytes:
        entries = [self._entry(choice) for choice in answer.choices]
        return shapes.compact(entries[0] if len(entries) == 1 else entries)

    @staticmethod
    def _entry(choice: Choice) -> shapes.Json:
        sequence, answer = choice.sequence, choice.answer
        finish: shapes.Json | None = None
        if sequence.finish == "length":
            finish = {"type": "length", "length": sequence.generated}
        elif sequence.finish == "stop":
            finish = {"type": "stop", "matched": EOS}
        elif sequence.finish == "abort":
            finish = {
                "type": "abort",
                "message": "Aborted by AbortReq.",
                "status_code": None,
                "err_type": None,
            }
        info: shapes.Json = {
            "id": sequence.rid,
            "finish_reason": finish,
            "prompt_tokens": sequence.prompt_tokens,
            "weight_version": "default",
            "num_retractions": sequence.retractions,
            "reasoning_tokens": 0,
            "completion_tokens": sequence.generated,
            "cached_tokens": 0,
        }
        if finish is not None:
            info["weight_versions"] = [{"version": "default", "start": 0, "end": sequence.generated}]
        info["cached_tokens_details"] = {"device": 0, "host": 0}
        info["dp_rank"] = None
        if finish is not None:
            info["e2e_latency"] = (time.monotonic_ns() - answer.arrived_ns) / 1e9
        ids = list(range(100, 100 + sequence.generated))
        return {"text": answer.reply.text(0, sequence.generated), "output_ids": ids, "meta_info": info}


DIALECTS: dict[str, Dialect] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/generate": Generate(),
}
