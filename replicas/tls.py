"""TLS between the gateway and its replicas: one private key and one self-signed certificate per service.

A cloud opens a replica's port to the world, so prompts and the API key must not cross it in clear. The
gateway makes the key, hands it to each replica as a secret (REPLICA_TLS_KEY, REPLICA_TLS_CERT: PEM text, for
SGLang's `--ssl-keyfile` and `--ssl-certfile`) and accepts no certificate but that one: it is *pinned*,
whatever address the replica has. No authority is asked, so none can be fooled, and there is nothing to renew.

    <state>/tls/<service>.pem   key and certificate, 0600. Made once: a new one would not match what runs
    <state>/tls/replicas.json   how each replica is spoken to: decided at its launch, true for its life

Not handled: taking a leaked key back. End the service's replicas, remove its .pem, and start them anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from replicas.command import TLS_CERT, TLS_KEY
from replicas.provisioners.launcher import write_atomically

VALID_YEARS: Final = 30
BACKDATED: Final = timedelta(days=1)  # the gateway may move to a machine whose clock is behind
_END_OF_KEY: Final = "-----END PRIVATE KEY-----\n"

Mode = Literal["auto", "tls", "plain"]
"""auto: TLS if `run` uses the certificate, else plain, but only to addresses that the world cannot reach."""
Transport = Literal["tls", "plain", "private"]
"""What one replica got. "plain" was asked for; "private" is plain because its YAML knows no TLS."""


class TlsError(Exception):
    """A key or certificate that cannot be used. The text is one line and names the file."""


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM texts. Every replica of the service has the same."""

    key: str = field(repr=False)
    cert: str

    @property
    def variables(self) -> dict[str, str]:
        """As `setup` and `run` get it."""
        return {TLS_KEY: self.key, TLS_CERT: self.cert}


class Certificates:
    """The folder `tls` of one state dir. Mutable: by the controller's event loop alone.

    `ca`: PEM text of what replicas' own certificates (https:// URLs that we did not make) are verified with;
    None = the system's store.
    """

    def __init__(self, state_dir: Path, *, ca: str | None = None) -> None:
        self.ca = ca
        self._folder = Path(state_dir) / "tls"
        self._record = self._folder / "replicas.json"
        self._identities: dict[str, Identity] = {}
        self._transports: dict[str, Transport] = {}
        try:
            self._transports = json.loads(self._record.read_bytes())
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise TlsError(f"{self._record} cannot be read: {error}") from None

    def __repr__(self) -> str:
        return f"<Certificates {self._folder} services={sorted(self._identities)}>"

    # --- whom a service is

    def identity(self, service: str) -> Identity:
        """The service's, made now if there is none. Raises TlsError when there is one that cannot be used."""
        found = self._load(service)
        if found is None:
            found = make(service)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(service), found.key + found.cert)
            self._identities[service] = found
        return found

    def cert(self, service: str) -> str | None:
        """The service's certificate as PEM text, None while it has no use for one. Raises TlsError."""
        found = self._load(service)
        given = [id for id, transport in self._transports.items() if transport == "tls"]
        if found is None and any(id.startswith(f"{service}-gw-") for id in given):
            found = self.identity(service)  # it was lost: what still runs is to be refused, not trusted
        return found.cert if found else None

    def _path(self, service: str) -> Path:
        return self._folder / f"{service}.pem"

    def _load(self, service: str) -> Identity | None:
        if service in self._identities:
            return self._identities[service]
        path = self._path(service)
        try:
            text = path.read_text()
            # Also says whether the two belong together.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TlsError(
                f"{path} holds no usable key and certificate ({error}): restore it, or remove it once no"
                f" replica of {service} runs"
            ) from None
        key, end, cert = text.partition(_END_OF_KEY)
        self._identities[service] = Identity(key + end, cert)
        return self._identities[service]

    # --- how a replica is spoken to

    def transport(self, replica_id: str) -> Transport | None:
        """What was decided at its launch; None for one launched before there was a choice."""
        return self._transports.get(replica_id)

    def decide(self, replica_id: str, transport: Transport) -> None:
        """On disk when this returns: a restarted gateway must speak to the replica in the same way."""
        self._transports[replica_id] = transport
        self._save()

    def forget(self, replica_id: str) -> None:
        """It is gone for good."""
        if self._transports.pop(replica_id, None) is not None:
            self._save()

    def pinned(self, replica_id: str, url: str) -> bool:
        """Whether the replica itself answers there with our certificate (an ingress would with its own)."""
        return self._transports.get(replica_id) == "tls" and is_bare_https(url)

    def context(self, service: str, replica_id: str, url: str) -> ssl.SSLContext | None:
        """For connections to the replica; None for plain ones."""
        return context_for(url, self.cert(service) if self.pinned(replica_id, url) else None, self.ca)

    def _save(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(str(self._record), dict(self._transports))


def make(service: str) -> Identity:
    """A new key (P-256: 0.1 ms of a handshake; RSA takes 1) and its certificate, which signs no other."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)])
    now = datetime.now(UTC)
    # The names are for the replica itself, which asks itself for a first answer before it is ready.
    names = x509.SubjectAlternativeName(
        [x509.DNSName(service), x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=365 * VALID_YEARS))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    cert = builder.sign(key, hashes.SHA256())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    return Identity(secret.decode(), cert.public_bytes(pem).decode())


def _write(path: Path, text: str) -> None:
    """All of it or none, 0600, on disk when this returns: the first replica may be launched right after."""
    part = path.with_suffix(".new")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- the gateway as a client


def context_for(url: str, cert: str | None, ca: str | None) -> ssl.SSLContext | None:
    """How the server of `url` is verified: by exactly `cert` (PEM) if given, else by name and `ca` (PEM),
    else by name and the system's store. None for http:// URLs."""
    return _context(cert, ca) if urlsplit(url).scheme == "https" else None


@functools.lru_cache(maxsize=64)  # the system's store takes 20 ms to read; equal targets must compare equal
def _context(cert: str | None, ca: str | None) -> ssl.SSLContext:
    if cert is None:
        return ssl.create_default_context(cadata=ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # its address is the cloud's choice; that it has the key is enough
    context.load_verify_locations(cadata=cert)
    return context


def explain(error: BaseException, context: ssl.SSLContext | None) -> str | None:
    """What a TLS failure (or what it caused) means, in words that follow "the replica: "; None if none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, ssl.SSLError):
        seen = seen.__cause__ or seen.__context__
    if seen is None:
        return None
    if isinstance(seen, ssl.SSLCertVerificationError):
        if context is not None and not context.check_hostname:
            return "its certificate is not the one that this gateway gave it"
        return f"its certificate is not accepted: {seen.verify_message}"
    if seen.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
        return "it does not speak TLS"
    return f"the TLS handshake failed: {seen.reason or seen}"


def read_ca(path: Path) -> str:
    """The PEM text of a file of certificates. Raises TlsError."""
    try:
        text = path.read_text()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=text)
    except (OSError, ValueError) as error:
        raise TlsError(f"{path} is no file of PEM certificates: {error}") from None
    return text


# --- what an address says


def is_bare_https(url: str) -> bool:
    """`https://host:port` and nothing after it: what an ingress serves has a path."""
    parts = urlsplit(url)
    return parts.scheme == "https" and parts.path in ("", "/")


def is_public(url: str) -> bool:
    """Whether the world may reach the host: not so for loopback, private and carrier-internal addresses. A
    name counts as public, `localhost` apart: a cloud's load balancer has one."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_global
    return host != "localhost"
