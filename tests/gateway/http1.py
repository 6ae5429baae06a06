"""HTTP/1.1 by hand: what a client's socket received, taken apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it was framed. `complete`: its framing came to its end."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]
    complete: bool

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


def read_answer(raw: bytes) -> Answer:
    """Take an answer apart, chunk by chunk; a body without chunks is one."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(first.split()[1])
    if headers.get("transfer-encoding") != "chunked":
        complete = len(rest) == int(headers.get("content-length", len(rest)))
        return Answer(status, headers, [rest], complete)
    chunks: list[bytes] = []
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return Answer(status, headers, chunks, complete=rest == b"\r\n")
        chunks.append(rest[:length])
        rest = rest[length + 2 :]
    return Answer(status, headers, chunks, complete=False)
