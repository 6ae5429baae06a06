"""How replicas are spoken to, from the flags and the YAML: what `gateway up` refuses or warns of, and what
the controller works with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gateway.settings import Settings, SettingsError
from replicas.command import TLS_CERT, uses_certificate
from replicas.provisioners import Provisioner
from replicas.provisioners.transport import NO_TLS_IN_RUN, TransportProvisioner
from replicas.tls import Certificates, Mode, TlsError, read_ca

if TYPE_CHECKING:
    from replicas.spec import Service


def mode(settings: Settings) -> Mode | None:
    """None: the URLs say it, each for itself (static)."""
    if settings.provisioner == "static":
        return None
    return settings.replica_transport or ("auto" if settings.provisioner == "skypilot" else "plain")


def check(settings: Settings, service: Service) -> str | None:
    """A warning, if there is cause for one. Raises SettingsError for what cannot work."""
    if settings.replica_ca is not None:
        try:
            read_ca(Path(settings.replica_ca))
        except TlsError as error:
            raise SettingsError(f"--replica-ca {error}") from None
    chosen, uses = mode(settings), uses_certificate(service.run)
    if settings.provisioner == "static" and settings.replica_transport == "tls":
        raise SettingsError("--replica-transport tls: with static replicas give https:// URLs instead")
    if chosen == "tls" and not uses:
        raise SettingsError(f"--replica-transport tls: {NO_TLS_IN_RUN}")
    if chosen == "auto" and not uses:
        return (
            f"run: does not use ${TLS_CERT}, so requests would cross the network in clear: a replica with a"
            " public address will be refused (--replica-transport plain allows it)"
        )
    return None


def certificates(settings: Settings, service: Service) -> Certificates:
    """Of the state dir. Raises TlsError when one that is needed cannot be used."""
    ca = None if settings.replica_ca is None else read_ca(Path(settings.replica_ca))
    found = Certificates(settings.state_dir, ca=ca)
    found.cert(service.name)
    return found


def around(provisioner: Provisioner, settings: Settings, known: Certificates) -> Provisioner:
    """The provisioner whose replicas are spoken to as `settings` say."""
    chosen = mode(settings)
    return provisioner if chosen is None else TransportProvisioner(provisioner, known, chosen)
