"""A body that takes long to parse is parsed by a process beside the worker: every other stream goes on.

A parser keeps Python's one lock, so a thread would not do. 32 MiB of small values (`[],[],[]...`) take
seconds, one long text of 32 MiB 0.1 s. The process lives for one body, and its memory ends with it.

`python -m gateway.largebodies PATH` reads the body from stdin and writes what `bodies.facts` finds as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys

from gateway import openai
from gateway.bodies import Facts, facts
from gateway.errors import BadRequest, InternalError
from gateway.processes import module_command

LARGE_BYTES = 8 * 1024 * 1024  # some 50 ms of one text with escapes
MANY_VALUES = 50_000  # as many commas: some 20 ms
_LOOK_BYTES = 64 * 1024
AT_ONCE = 2  # processes of one worker
READ_SECONDS = 60.0


def large(raw: bytes) -> bool:
    """Whether parsing it here would hold up others. Looks no further than it must."""
    if len(raw) <= MANY_VALUES:
        return False
    if len(raw) > LARGE_BYTES:
        return True
    commas = 0
    for start in range(0, len(raw), _LOOK_BYTES):
        commas += raw.count(b",", start, start + _LOOK_BYTES)
        if commas > MANY_VALUES:
            return True
    return False


async def read(raw: bytes, endpoint: openai.Endpoint, places: asyncio.Semaphore) -> Facts:
    """As `bodies.facts`, elsewhere. Raises BadRequest."""
    async with places:
        process = await asyncio.create_subprocess_exec(
            *module_command("gateway.largebodies"), endpoint.path, stdin=-1, stdout=-1
        )
        try:
            async with asyncio.timeout(READ_SECONDS):
                said, _ = await process.communicate(raw)
        except TimeoutError:
            raise BadRequest(f"The request body could not be read within {READ_SECONDS:.0f} s.") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        raise InternalError(f"The process that reads a large body ended with {process.returncode}.")
    found = json.loads(said)
    if "error" in found:
        message, status, code, param = found["error"]
        raise BadRequest(message, status=status, code=code, param=param)
    return Facts(*found["facts"])


def main() -> None:
    os.nice(5)  # streams go first
    endpoint = openai.ENDPOINTS[sys.argv[1].encode()]
    found: dict[str, object]
    try:
        found = {"facts": facts(sys.stdin.buffer.read(), endpoint)}
    except BadRequest as error:
        found = {"error": (error.message, error.status, error.code, error.param)}
    except MemoryError:
        found = {"error": ("The request body has too many values.", 413, "body_too_large", None)}
    print(json.dumps(found), flush=True)
    os._exit(0)  # without freeing millions of objects one by one


if __name__ == "__main__":
    main()
