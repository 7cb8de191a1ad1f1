"""TLS without a certificate authority: the driver makes a certificate for its server, and workers trust that one alone.

The certificate travels to the executors beside the token, the private key never leaves the driver's process: it is on
disk for the moment in which Python's `ssl`, which reads keys from files only, loads it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tensorspark.errors import ConfigError, StagingError

if TYPE_CHECKING:
    from cryptography import x509

# A run that lasts longer has its new connections refused; a clock that is a day off is no reason to.
_VALIDITY = datetime.timedelta(days=366)
_CLOCK_SKEW = datetime.timedelta(days=1)
_SUBJECT = "tensorspark parameter server"


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate and its private key, both PEM; the repr hides the key.

    Attributes:
        pem: the certificate, which is no secret.
        key_pem: PKCS #8, not encrypted.
    """

    pem: str
    key_pem: str = field(repr=False)


def make_certificate(host: str) -> Certificate:
    """Makes a P-256 key and a certificate for it, valid from a day ago for a year.

    Args:
        host: name or address of the server, for whoever looks at the certificate; workers do not compare it.

    Raises:
        ConfigError: the package `cryptography` is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise ConfigError(
            f"TLS needs the package cryptography on the driver ({error}): pip install 'tensorspark[tls]', or set "
            f"spark.tensorspark.tls.enabled to false"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _SUBJECT)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        # Not an authority: who trusts this certificate trusts none that it signed.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Certificate(certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"), key_pem.decode("ascii"))


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii") or "localhost")
    except UnicodeError as error:
        raise ConfigError(f"server_host {host!r} is not a name that DNS can spell: {error}") from error


def server_context(certificate: Certificate, tmp_dir: str | None = None) -> ssl.SSLContext:
    """The server's side: TLS 1.2 or newer with `certificate`.

    Args:
        tmp_dir: where the key is for a moment, in a file that only this user can read; None takes the system's.

    Raises:
        StagingError: `tmp_dir` cannot be written to.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # else a TLS 1.2 client may have us compute handshakes for ever
    context.num_tickets = 0  # workers resume no session
    try:
        descriptor, path = tempfile.mkstemp(prefix="tensorspark-", suffix=".pem", dir=tmp_dir)  # mode 0600
    except OSError as error:
        raise StagingError(
            f"the key for TLS needs a moment in {tmp_dir or tempfile.gettempdir()}, which cannot be written to "
            f"({error}); set spark.tmp.dir to a directory on the driver that can"
        ) from error
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(certificate.key_pem + certificate.pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context


def client_context(pem: str) -> ssl.SSLContext:
    """A worker's side: TLS 1.2 or newer with the server whose certificate is `pem`, and with no other.

    Raises:
        ConfigError: `pem` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A name says which of an authority's many certificates is meant. Here one certificate alone is trusted, so there is
    # nothing left to tell apart, and a forwarded address or another name for the driver does no harm.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError, TypeError) as error:
        raise ConfigError(f"expected the parameter server's certificate as PEM, got what is none: {error}") from error
    if context.cert_store_stats()["x509"] != 1:
        raise ConfigError("expected the parameter server's certificate alone, got more than one")
    return context
