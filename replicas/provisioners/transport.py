"""How replicas are spoken to, decided around any provisioner: what it launches gets a key and a certificate,
and where it says http:// of one that has them, we say https://.

Decided once, at the launch, and kept: a replica outlives the gateway's flags and its YAML.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from replicas.command import TLS_CERT, TLS_KEY, uses_certificate
from replicas.plans import Plan
from replicas.provisioners import YAML_DECIDES, Instance, LaunchError, Other, Provisioner
from replicas.tls import Certificates, Mode, TlsError, Transport, is_public

if TYPE_CHECKING:
    from replicas.spec import Service

NO_TLS_IN_RUN = (
    f"run: does not use ${TLS_CERT}; give the server --ssl-keyfile and --ssl-certfile"
    " (config/deepseek-r1-671b.yaml shows how)"
)
EXPOSED = (
    "its address {host} is public and its YAML knows no TLS, so prompts and the API key would cross the world"
    f" in clear: use ${TLS_KEY} and ${TLS_CERT} in run, or ask for it with --replica-transport plain"
)
INGRESS = (
    "{url} is an ingress that speaks plain HTTP, which TLS to the replica cannot pass: use a load balancer"
    " (kubernetes.ports: loadbalancer in ~/.sky/config.yaml) or --replica-transport plain"
)


class TransportProvisioner:
    """A Provisioner around another one."""

    def __init__(self, inner: Provisioner, certificates: Certificates, mode: Mode) -> None:
        self._inner = inner
        self._certificates = certificates
        self._mode = mode

    def __repr__(self) -> str:
        return f"<TransportProvisioner {self._mode} {self._inner!r}>"

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """See Provisioner. Raises a permanent LaunchError when it is to be TLS and cannot."""
        transport = self._certificates.transport(replica_id)
        try:
            if transport is None:
                transport = self._decide(service)
                self._certificates.decide(replica_id, transport)
            given = self._variables(service, transport)
        except TlsError as error:
            raise LaunchError(str(error)) from None
        await self._inner.launch(replica_id, service, {**env, **given}, plan)

    def _decide(self, service: Service) -> Transport:
        uses = uses_certificate(service.run)
        if self._mode == "tls" and not uses:
            raise LaunchError(NO_TLS_IN_RUN)
        if self._mode == "plain":
            return "plain"
        return "tls" if uses else "private"

    def _variables(self, service: Service, transport: Transport) -> dict[str, str]:
        if transport == "tls":
            return self._certificates.identity(service.name).variables
        # SkyPilot refuses a secret that the YAML lists and nobody gives a value.
        listed = service.task.get("secrets") or {}
        return {name: "" for name in (TLS_KEY, TLS_CERT) if name in listed}

    async def terminate(self, replica_id: str) -> None:
        """See Provisioner."""
        await self._inner.terminate(replica_id)
        self._certificates.forget(replica_id)

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        """See Provisioner. One that may not be spoken to is shown as dead, with the reason."""
        return {id: self._seen(instance) for id, instance in (await self._inner.instances(fresh)).items()}

    def _seen(self, instance: Instance) -> Instance:
        url = instance.url
        if not instance.alive or url is None or not url.startswith("http://"):
            return instance
        transport = self._certificates.transport(instance.id)
        if transport == "tls":
            if urlsplit(url).path.strip("/"):
                return replace(instance, alive=False, url=None, detail=INGRESS.format(url=url))
            return replace(instance, url=f"https://{url.removeprefix('http://')}")
        if transport == "private" and is_public(url):
            detail = EXPOSED.format(host=urlsplit(url).hostname)
            return replace(instance, alive=False, url=None, detail=detail)
        return instance

    async def others(self, services: Collection[str]) -> list[Other]:
        """See Provisioner."""
        return await self._inner.others(services)

    async def close(self) -> None:
        """See Provisioner."""
        await self._inner.close()

    def __getattr__(self, name: str) -> Any:
        """What only some provisioners can do is for them to say."""
        return getattr(self._inner, name)
