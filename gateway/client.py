"""The CLI's side of the admin port: where it is, one call, and errors that say what to do next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import statedir
from gateway.settings import SETTINGS

if TYPE_CHECKING:
    import httpx  # at run time where it is used: `gateway up` knows our errors and needs no HTTP client

TIMEOUT_SECONDS = 10.0


class ClientError(Exception):
    """A call that did not succeed; one line for a person."""


class BrokeOff(ClientError):
    """It was there and closed the connection in the middle of the call."""


class NotRunning(ClientError):
    """Nothing answers at the admin address, or no address is known."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"no gateway {where}: start one with `gateway up FILE.yaml` (or `gateway demo`), or say"
            " where it is with --admin-url or --state-dir"
        )


def default_state_dir() -> Path:
    row = next(row for row in SETTINGS if row.name == "state_dir")
    return Path(os.environ.get(row.env) or row.default).expanduser().absolute()


def find_admin_url(state_dir: Path) -> str:
    """Where the gateway of this state dir listens; when none runs, where the environment says.

    Never a default port: the gateway there may be another one, and `down` would end it. Raises NotRunning.
    """
    address = statedir.read_address(state_dir)
    if address is not None:
        return str(address["admin_url"])
    rows = {row.name: row for row in SETTINGS}
    if not any(os.environ.get(rows[name].env) for name in ("admin_host", "admin_port")):
        raise NotRunning(f"runs with the state dir {state_dir}")
    host, port = (os.environ.get(rows[n].env) or rows[n].default for n in ("admin_host", "admin_port"))
    return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"


class AdminClient:
    """Blocking calls to one admin port."""

    def __init__(self, url: str, key: str | None = None) -> None:
        import httpx

        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # trust_env off: a proxy of the environment is not for this machine's own ports.
        local = "://127." in self.url or "://localhost" in self.url or "://[::1]" in self.url
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT_SECONDS, trust_env=not local
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer. Raises NotRunning or ClientError."""
        with self._errors():
            answer = self._http.request(method, path, json=body)
            self._check(answer)
            return answer.json()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.call("GET", "/admin/status")
        return status

    def lines(self, path: str, params: dict[str, str]) -> Iterator[str]:
        """The answer's text as it comes."""
        with self._errors(), self._http.stream("GET", path, params=params, timeout=None) as answer:
            if answer.status_code >= 400:
                answer.read()
            self._check(answer)
            yield from answer.iter_text()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise NotRunning(f"answers at {self.url}") from None
        except httpx.InvalidURL as error:
            raise ClientError(f"--admin-url {self.url}: {error}") from None
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise BrokeOff(f"{self.url} broke off its answer ({type(error).__name__}): try again") from None
        except httpx.HTTPError as error:
            raise ClientError(f"{self.url} does not answer ({type(error).__name__}): try again") from None
        except ValueError:
            raise ClientError(f"{self.url} is not the admin port of a gateway: check --admin-url") from None

    def _check(self, answer: httpx.Response) -> None:
        if answer.status_code < 400:
            return
        if answer.status_code == 401:
            raise ClientError(f"{self.url} asks for its admin key: give --admin-key or GATEWAY_ADMIN_KEY")
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{self.url} answered {answer.status_code}: is it the admin port of a gateway?"
        raise ClientError(message)
