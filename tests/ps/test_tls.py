"""Certificates, and a server that speaks TLS alone."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import ssl
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tensorspark.errors import AuthenticationError, ConfigError, StagingError
from tensorspark.ps.client import ParameterClient, ServerAddress
from tensorspark.ps.messages import Registration
from tensorspark.ps.server import ParameterServer
from tensorspark.ps.tls import Certificate, client_context, make_certificate, server_context
from tensorspark.weights.combiners import DeltaWeightCombiner
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout
from tests.ps.wire import Wire, ask, connect, read_to_end

# Many TLS records, and more than a socket's buffer holds.
LAYOUT = WeightLayout([TensorSpec("W:0", (4_000_000,), "float32")])


def buffer_of(values: Any) -> Buffer:
    return LAYOUT.pack({"W:0": np.asarray(values, np.float32)})


INITIAL = np.arange(4_000_000, dtype=np.float32) % 1000 + 1


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParameterServer]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ParameterServer(LAYOUT, "127.0.0.1", tls=True, handshake_timeout_s=2) as server:
        server.begin_run(buffer_of(INITIAL), DeltaWeightCombiner(), 2)
        yield server


def pin(server: ParameterServer) -> ssl.SSLContext:
    assert server.certificate is not None
    return client_context(server.certificate)


def weights(server: ParameterServer) -> Any:
    out = LAYOUT.allocate()
    server.read_weights(out)
    return LAYOUT.views(out)["W:0"]


# A server with TLS


def test_a_worker_that_pins_the_certificate_pulls_and_pushes(server: ParameterServer) -> None:
    with Wire(server, pin(server)) as worker:
        worker.register(server, 1)
        pulled = LAYOUT.allocate()
        assert worker.pull(pulled) == 0
        np.testing.assert_array_equal(LAYOUT.views(pulled)["W:0"], INITIAL)
        worker.push(buffer_of(INITIAL[::-1]))
        assert worker.pull(pulled) == 1
        np.testing.assert_array_equal(LAYOUT.views(pulled)["W:0"], INITIAL + INITIAL[::-1])


def test_the_librarys_client_pins_the_certificate_of_its_address(server: ParameterServer) -> None:
    address = ServerAddress("127.0.0.1", server.port, server.token, certificate=server.certificate)
    with ParameterClient(address) as worker:
        worker.register(Registration(1, 0, 1, LAYOUT.fingerprint, "here"))
        assert worker.pull(LAYOUT.allocate()).version == 0
    with pytest.raises(AuthenticationError, match="certificate"):
        ParameterClient(replace(address, certificate=make_certificate("127.0.0.1").pem))


def test_the_newest_tls_is_spoken(server: ParameterServer) -> None:
    with connect(server, pin(server)) as connection:
        assert isinstance(connection, ssl.SSLSocket)
        assert connection.version() == "TLSv1.3"


def test_tls_1_2_is_spoken_too(server: ParameterServer) -> None:
    context = pin(server)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Wire(server, context) as worker:
        worker.register(server, 1)
        assert worker.pull(LAYOUT.allocate()) == 0


def assert_untouched(server: ParameterServer) -> None:
    status = server.status()
    assert (status.num_live, status.num_standby, status.num_steps) == (0, 0, 0)
    np.testing.assert_array_equal(weights(server), INITIAL)
    with Wire(server, pin(server)) as worker:  # and workers are served as before
        worker.register(server, 1)


def test_a_client_that_trusts_public_authorities_is_kept_from_talking(server: ParameterServer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        Wire(server, ssl.create_default_context())
    assert_untouched(server)


def test_a_client_that_pins_another_servers_certificate_is_kept_from_talking(server: ParameterServer) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        Wire(server, client_context(make_certificate("127.0.0.1").pem))
    assert_untouched(server)


def test_a_client_that_speaks_plain_text_is_turned_away(server: ParameterServer) -> None:
    with pytest.raises(ConnectionError):
        Wire(server)
    status = f"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode()
    assert b"HTTP" not in ask(server, status)
    assert b"HTTP" not in ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert_untouched(server)


def test_a_tls_client_is_turned_away_from_a_server_without() -> None:
    with ParameterServer(LAYOUT, "127.0.0.1", handshake_timeout_s=0.5) as plain:
        assert plain.certificate is None
        with pytest.raises(ssl.SSLError):
            connect(plain, client_context(make_certificate("127.0.0.1").pem))


def test_a_token_is_needed_within_tls_too(server: ParameterServer) -> None:
    response = ask(server, b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n", pin(server))
    assert response.startswith(b"HTTP/1.1 401 ")
    assert response.endswith(b"\r\n\r\n401 Unauthorized\n")


def test_handshakes_that_never_end_make_room_at_the_deadline() -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            ParameterServer(LAYOUT, "127.0.0.1", tls=True, max_connections=8, handshake_timeout_s=0.5)
        )
        silent = [stack.enter_context(connect(server)) for _ in range(8)]
        silent[0].sendall(b"\x16\x03\x01\x02\x00\x01")  # a client's hello, cut off
        with connect(server) as late:
            assert read_to_end(late) == b""
        assert [read_to_end(connection) for connection in silent] == [b""] * 8
        with Wire(server, pin(server)) as worker:
            assert worker.response.startswith(b"HTTP/1.1 503 ")  # in, and no run has begun


def test_the_key_is_nowhere_once_the_server_runs(
    server: ParameterServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Wire(server, pin(server)) as worker:
        worker.register(server, 1)
    assert list(tmp_path.iterdir()) == []
    assert server.certificate is not None
    assert "PRIVATE" not in server.certificate
    assert "PRIVATE" not in f"{server!r} {vars(server)!r} {caplog.text}"


# Certificates


def test_a_certificates_repr_hides_the_key() -> None:
    certificate = make_certificate("driver")
    secret = certificate.key_pem.splitlines()[1]
    assert "PRIVATE KEY" in certificate.key_pem
    assert "PRIVATE KEY" not in repr(certificate)
    assert secret not in f"{certificate!r} {certificate}"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("driver.example.com", "driver.example.com"),
        ("10.0.0.7", "10.0.0.7"),
        ("fd00::7", "fd00::7"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("node_1", "node_1"),
    ],
)
def test_a_certificate_names_the_host_and_is_no_authority(host: str, expected: str) -> None:
    certificate = x509.load_pem_x509_certificate(make_certificate(host).pem.encode())
    (name,) = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert str(name.value) == expected
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)


def test_a_certificate_bears_clocks_that_are_a_day_off_and_runs_of_a_year() -> None:
    certificate = x509.load_pem_x509_certificate(make_certificate("driver").pem.encode())
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc <= now - datetime.timedelta(hours=23)
    assert now + datetime.timedelta(days=365) <= certificate.not_valid_after_utc <= now + datetime.timedelta(days=367)


def test_every_certificate_has_a_key_of_its_own() -> None:
    first, second = make_certificate("driver"), make_certificate("driver")
    assert first.key_pem != second.key_pem
    assert first.pem != second.pem


def test_a_host_that_dns_cannot_spell_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="server_host"):
        make_certificate("a" * 64)


def test_without_cryptography_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'tensorspark\[tls\]'"):
        ParameterServer(LAYOUT, "127.0.0.1", tls=True)


def test_the_keys_file_is_the_users_alone_and_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, int]] = []
    load = ssl.SSLContext.load_cert_chain

    def note_and_load(context: ssl.SSLContext, path: str, *args: Any) -> None:
        seen.append((Path(path), stat.S_IMODE(os.stat(path).st_mode)))
        load(context, path, *args)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", note_and_load)
    old = os.umask(0)
    try:
        server_context(make_certificate("driver"), str(tmp_path))
    finally:
        os.umask(old)
    ((path, mode),) = seen
    assert (path.parent, mode) == (tmp_path, 0o600)
    assert list(tmp_path.iterdir()) == []


def test_the_keys_file_is_gone_after_an_error_too(tmp_path: Path) -> None:
    mismatched = Certificate(make_certificate("driver").pem, make_certificate("driver").key_pem)
    with pytest.raises(ssl.SSLError):
        server_context(mismatched, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_directory_that_is_not_there_is_a_staging_error(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match=r"gone.*spark\.tmp\.dir"):
        server_context(make_certificate("driver"), str(tmp_path / "gone"))


@pytest.mark.parametrize("pem", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ü"])
def test_what_is_no_certificate_cannot_be_pinned(pem: str) -> None:
    with pytest.raises(ConfigError, match="certificate as PEM"):
        client_context(pem)


def test_two_certificates_cannot_be_pinned() -> None:
    with pytest.raises(ConfigError, match="more than one"):
        client_context(make_certificate("driver").pem + make_certificate("driver").pem)


# Trust, without sockets


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Runs a handshake in memory; raises what the client or the server raises."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(5):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


def issue(issuer: Certificate) -> Certificate:
    """Another server's certificate, signed with the key of `issuer`."""
    authority = x509.load_pem_x509_certificate(issuer.pem.encode())
    signing_key = serialization.load_pem_private_key(issuer.key_pem.encode(), None)
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(signing_key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(signed.public_bytes(serialization.Encoding.PEM).decode(), key_pem.decode())


def test_exactly_the_pinned_certificate_is_trusted() -> None:
    pinned = make_certificate("driver")
    handshake(client_context(pinned.pem), server_context(pinned))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_context(pinned.pem), server_context(make_certificate("driver")))


def test_what_the_pinned_certificate_signed_is_not_trusted() -> None:
    pinned = make_certificate("driver")
    signed = issue(pinned)
    chain = Certificate(signed.pem + pinned.pem, signed.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client_context(pinned.pem), server_context(chain))
