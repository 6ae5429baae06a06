"""One Answer is one request being served, in tokens; dialects.py makes bytes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from uuid import uuid4

from . import shapes
from .asking import Ask
from .connection import Exchange
from .engine import MAX_RESERVED, Sequence
from .reply import Reply


@dataclass(slots=True, eq=False)
class Choice:
    """One of the `n` answers to one prompt."""

    answer: Answer
    index: int
    sequence: Sequence
    chunks: shapes.ChatChunks | None = None
    opened: bool = False  # what comes before the first token is sent (messages.py, responses.py)
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
    events_sent: int = 0  # of those that are numbered (responses.py)

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

    def number(self) -> int:
        """The number of the next event, from 0."""
        self.events_sent += 1
        return self.events_sent - 1

    def usage(self, choices: list[Choice] | None = None) -> shapes.Json:
        """Token counts over `choices` (default: all). A prompt counts once however many choices it has."""
        chosen = self.choices if choices is None else choices
        reasoning = sum(min(choice.sequence.generated, self.reply.thinking) for choice in chosen)
        prompts = self.ask.prompts if choices is None else (chosen[0].sequence.prompt_tokens,)
        completion = sum(choice.sequence.generated for choice in chosen)
        return shapes.usage(sum(prompts), completion, reasoning, reasoning_parser=self.parser)
