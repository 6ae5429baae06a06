"""The key and certificate of a service: made once, kept private, and nothing else is accepted."""

from __future__ import annotations

import asyncio
import ssl
import stat
from pathlib import Path

import pytest

from replicas import tls
from replicas.tls import Certificates, Identity, TlsError, context_for, explain, is_public, make

URL = "https://127.0.0.1:1"


async def handshake(server: Identity, folder: Path, context: ssl.SSLContext) -> BaseException | None:
    """What a client with `context` says to a server that has `server`'s key; None = it is content."""
    file = folder / "server.pem"
    file.write_text(server.key + server.cert)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(file)

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0, ssl=serving) as listener:
        port = listener.sockets[0].getsockname()[1]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        except OSError as error:
            return error
        await reader.read()
        writer.close()
        await writer.wait_closed()
    return None


def pinned(identity: Identity) -> ssl.SSLContext:
    context = context_for(URL, identity.cert, None)
    assert context is not None
    return context


def test_a_service_keeps_its_identity_over_restarts(tmp_path: Path) -> None:
    first = Certificates(tmp_path).identity("r1")
    assert Certificates(tmp_path).identity("r1") == first
    assert Certificates(tmp_path).cert("r1") == first.cert
    assert Certificates(tmp_path).identity("other").key != first.key


def test_a_service_without_tls_has_no_certificate_and_none_is_made_for_asking(tmp_path: Path) -> None:
    assert Certificates(tmp_path).cert("r1") is None
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_for_its_owner_alone_and_not_for_logs(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    identity = certificates.identity("r1")
    file = tmp_path / "tls" / "r1.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [path.name for path in file.parent.iterdir()] == ["r1.pem"]
    assert "PRIVATE" not in repr(identity) + repr(certificates)


@pytest.mark.parametrize("text", ["", "no PEM", None])
def test_a_broken_key_is_an_error_that_names_the_file_and_never_a_new_key(
    tmp_path: Path, text: str | None
) -> None:
    Certificates(tmp_path).identity("r1")
    file = tmp_path / "tls" / "r1.pem"
    file.write_text(make("r1").key + make("r1").cert if text is None else text)  # None: of two pairs
    with pytest.raises(TlsError, match=r"tls/r1\.pem holds no usable key and certificate") as caught:
        Certificates(tmp_path).identity("r1")
    assert "\n" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


def test_the_certificate_outlives_any_replica_and_signs_no_other(tmp_path: Path) -> None:
    from cryptography import x509

    cert = x509.load_pem_x509_certificate(make("r1").cert.encode())
    assert (cert.not_valid_after_utc - cert.not_valid_before_utc).days > 20 * 365
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


async def test_only_the_pinned_certificate_is_accepted_at_whatever_address(tmp_path: Path) -> None:
    ours, other = make("r1"), make("r1")
    assert await handshake(ours, tmp_path, pinned(ours)) is None
    error = await handshake(other, tmp_path, pinned(ours))
    assert error is not None
    assert explain(error, pinned(ours)) == "its certificate is not the one that this gateway gave it"


async def test_a_server_of_its_own_is_verified_by_name_and_authority(tmp_path: Path) -> None:
    identity = make("elsewhere")  # for 127.0.0.1, too
    trusting, system = context_for(URL, None, identity.cert), context_for(URL, None, None)
    assert trusting is not None
    assert system is not None
    assert trusting.check_hostname
    assert system.check_hostname
    assert await handshake(identity, tmp_path, trusting) is None
    error = await handshake(identity, tmp_path, system)
    assert error is not None
    assert "its certificate is not accepted: self-signed certificate" in (explain(error, system) or "")


def test_a_plain_url_costs_nothing_and_equal_targets_share_one_context() -> None:
    identity = make("r1")
    assert context_for("http://127.0.0.1:1", identity.cert, None) is None
    assert context_for("https://a:1", identity.cert, None) is context_for("https://b:1", identity.cert, None)


def test_what_is_no_tls_failure_is_not_explained_as_one() -> None:
    assert explain(ConnectionRefusedError(111, "refused"), None) is None


def test_how_a_replica_is_spoken_to_is_remembered_until_it_is_gone(tmp_path: Path) -> None:
    Certificates(tmp_path).decide("r1-gw-0-1", "tls")
    certificates = Certificates(tmp_path)
    assert certificates.transport("r1-gw-0-1") == "tls"
    assert certificates.pinned("r1-gw-0-1", "https://1.2.3.4:30000")
    assert not certificates.pinned("r1-gw-0-1", "https://ingress.example/skypilot/r1")  # has its own
    assert not certificates.pinned("r1-gw-0-2", "https://1.2.3.4:30000")
    certificates.forget("r1-gw-0-1")
    assert Certificates(tmp_path).transport("r1-gw-0-1") is None


def test_a_record_that_cannot_be_read_is_an_error_not_a_plain_connection(tmp_path: Path) -> None:
    Certificates(tmp_path).decide("r1-gw-0-1", "tls")
    (tmp_path / "tls" / "replicas.json").write_text("{")
    with pytest.raises(TlsError, match=r"replicas\.json cannot be read"):
        Certificates(tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "172.16.0.1", "192.168.1.1", "[::1]"])
def test_private_addresses(host: str) -> None:
    assert not is_public(f"http://{host}:30000")


@pytest.mark.parametrize("host", ["34.1.2.3", "[2600:1f18::1]", "abc.elb.amazonaws.com", "172.32.0.1"])
def test_public_addresses(host: str) -> None:
    assert is_public(f"http://{host}:30000")


def test_a_file_of_authorities_is_read_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(make("ca").cert)
    assert tls.read_ca(file) == file.read_text()
    file.write_text("nothing")
    with pytest.raises(TlsError, match=r"ca\.pem is no file of PEM certificates"):
        tls.read_ca(file)
