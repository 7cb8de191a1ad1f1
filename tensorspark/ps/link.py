"""One connection of a worker to the parameter server: frames out and in, each wait with a deadline."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorspark.errors import (
    AuthenticationError,
    ConnectionLostError,
    ProtocolError,
    RunStoppedError,
    ServerUnreachableError,
)
from tensorspark.ps import protocol
from tensorspark.ps.protocol import Kind
from tensorspark.weights.layout import Buffer

_MAX_RESPONSE_BYTES = 2**14
_MAX_EARLY_BYTES = 2**20
_END_S = 10.0  # for the server to take note of a connection's end


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is and what opens it. Travels to the executors; its repr hides the token.

    Attributes:
        connect_timeout_s: deadline of a connection, its upgrade included.
        io_timeout_s: the longest silence of the server that a worker bears while it waits for it.
        reconnect_timeout_s: how long a worker tries to reach a server again that it has lost.
        lease_timeout_s: a worker that is silent for so long loses its partition.
        certificate: PEM of the server's certificate; None where it speaks plain TCP.
    """

    host: str
    port: int
    token: str = field(repr=False)
    connect_timeout_s: float = 5.0
    io_timeout_s: float = 120.0
    reconnect_timeout_s: float = 60.0
    lease_timeout_s: float = 60.0
    certificate: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Link:
    """A connection to the server, upgraded to frames. After an error it is of no more use. For one thread; another may
    `interject`.

    Raises:
        ServerUnreachableError: nobody answered in time.
        AuthenticationError: the token is not the server's.
        ProtocolError: what answered is not a tensorspark server of this version.
        ConnectionLostError: (any method) the server is gone, or was silent for too long.
        RefusedError: (`receive`) the server refused; its subclasses say why.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._early = bytearray()  # what came while we were sending
        self._sending = threading.Lock()  # no frame begins in another
        # OpenSSL bears one thread at a time: https://github.com/python/cpython/issues/124984
        self._encrypting = contextlib.nullcontext() if address.certificate is None else threading.Lock()
        self._is_broken = False  # in the middle of a frame: what is sent now would be read as the rest of it
        self._socket = connect(address)
        try:
            self._upgrade()
            self._socket.settimeout(address.io_timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._is_broken = True
        with contextlib.suppress(OSError, ValueError):  # a thread that waits for an answer learns of it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def send(self, kind: Kind, header: Mapping[str, Any], payload: Buffer | None = None, totals: bytes = b"") -> None:
        """Sends a frame; `totals` are the payload's end, or all of it."""
        num_bytes = len(totals) if payload is None else payload.nbytes + len(totals)
        with self._sending:
            self._send_all(memoryview(protocol.encode(kind, header, num_bytes)))
            if payload is not None:
                self._send_all(payload.data)
            if totals:
                self._send_all(memoryview(totals))

    def interject(self, kind: Kind, header: Mapping[str, Any], timeout_s: float) -> bool:
        """Sends a short frame while another thread receives; whether it was its turn in time, between two frames."""
        if not self._sending.acquire(timeout=timeout_s):
            return False
        try:
            self._send_all(memoryview(protocol.encode(kind, header)), may_listen=False)
        finally:
            self._sending.release()
        return True

    def end(self) -> None:
        """Sends nothing more, and waits until the server has read all and closed the connection; 10 s at most."""
        deadline = time.monotonic() + _END_S
        with self._translated():
            self._is_broken = True
            self._socket.shutdown(socket.SHUT_WR)
            while (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if not self._socket.recv(_MAX_EARLY_BYTES):
                    return

    def receive(self, expected: Kind, limit_bytes: int = 0) -> tuple[dict[str, Any], int]:
        """The header of the next frame that says something, which must be `expected`, and its payload's length.

        Args:
            limit_bytes: the longest payload that is taken; whoever gets one calls `fill` with as many bytes next.
        """
        _, header, num_bytes = self.receive_any((expected,), limit_bytes)
        return header, num_bytes

    def receive_any(self, expected: Sequence[Kind], limit_bytes: int = 0) -> tuple[Kind, dict[str, Any], int]:
        """As `receive`, of several kinds; and which it is."""
        while True:
            prefix = protocol.decode_prefix(
                self._receive_exactly(protocol.PREFIX_BYTES), protocol.FROM_SERVER, limit_bytes
            )
            header = protocol.decode_header(self._receive_exactly(prefix.header_bytes))
            if prefix.kind is not Kind.WAIT:
                break
        if prefix.kind is Kind.REFUSED:
            raise protocol.refusal(header)
        if prefix.kind not in expected:
            raise ProtocolError(f"expected {' or '.join(kind.name for kind in expected)}, got {prefix.kind.name}")
        return prefix.kind, header, prefix.payload_bytes

    def fill(self, payload: Buffer) -> None:
        """Receives a payload."""
        self._fill(payload.data)

    def _upgrade(self) -> None:
        address = self._address
        request = (
            f"GET {protocol.PATH} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\n"
            f"Upgrade: {protocol.UPGRADE}\r\nAuthorization: Bearer {address.token}\r\n\r\n"
        )
        self._send_all(memoryview(request.encode("ascii")))
        response = b""
        while b"\r\n\r\n" not in response:
            with self._translated():
                data = self._socket.recv(_MAX_RESPONSE_BYTES)
            response += self._checked(data)
            if len(response) >= _MAX_RESPONSE_BYTES:
                raise ProtocolError(f"expected an HTTP response from {address}, got too much else")
        head, _, rest = response.partition(b"\r\n\r\n")
        self._check_response(head.split(b"\r\n", 1)[0].decode("latin-1"))
        self._early += rest

    def _check_response(self, status_line: str) -> None:
        parts = status_line.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/"):
            raise ProtocolError(f"expected a tensorspark server at {self._address}, got {status_line[:80]!r}")
        if parts[1] == "401":
            raise AuthenticationError(f"the server at {self._address} does not know this run's token: another run's?")
        if parts[1] == "503":
            raise RunStoppedError(f"the run that {self._address} served has ended")
        if parts[1] != "101":
            raise ProtocolError(f"expected {self._address} to upgrade to {protocol.UPGRADE}, got {status_line[:80]!r}")

    def _receive_exactly(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        if self._early:
            early = self._early[: len(view)]
            view[: len(early)] = early
            del self._early[: len(early)]
            view = view[len(early) :]
        with self._translated():
            while view:
                if isinstance(self._socket, ssl.SSLSocket) and not self._socket.pending():
                    self._await_something()  # without the lock
                with self._encrypting:
                    received = self._socket.recv_into(view)
                self._checked(received)
                view = view[received:]

    def _send_all(self, data: memoryview, *, may_listen: bool = True) -> None:
        """
        Args:
            may_listen: whether no other thread receives, so that what comes may be read while the server does not.
        """
        if self._is_broken:
            raise ConnectionLostError(f"the connection to the server at {self._address} is closed")
        with self._translated():
            while data:
                try:
                    with self._encrypting:
                        sent = self._socket.send(data)
                except TimeoutError:
                    if not may_listen or not self._has_said_something():
                        raise
                    continue
                data = data[sent:]

    def _await_something(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        timeout_s = self._socket.gettimeout()
        if not poll.poll(None if timeout_s is None else 1000 * timeout_s):
            raise TimeoutError

    def _has_said_something(self) -> bool:
        """Whether the server, which does not read, says at least that it lives: it may be out of buffers."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(0):
            return False
        data = self._checked(self._socket.recv(_MAX_EARLY_BYTES))
        self._early += data
        return len(self._early) <= _MAX_EARLY_BYTES

    def _checked(self, received: Any) -> Any:
        if not received:
            raise ConnectionLostError(f"the server at {self._address} closed the connection")
        return received

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            self._is_broken = True
            raise ConnectionLostError(
                f"the server at {self._address} did not answer within {self._socket.gettimeout()} s "
                f"(spark.tensorspark.io.timeout)"
            ) from error
        except ConnectionLostError:
            self._is_broken = True
            raise
        except OSError as error:
            self._is_broken = True
            raise ConnectionLostError(f"the connection to the server at {self._address} broke: {error}") from error


def connect(address: ServerAddress) -> socket.socket:
    """Opens a connection to the server; raises `ServerUnreachableError`, naming the setting to change."""
    try:
        connection = socket.create_connection((address.host, address.port), timeout=address.connect_timeout_s)
    except OSError as error:
        raise ServerUnreachableError(
            f"host {socket.gethostname()} cannot reach the parameter server at {address} "
            f"({error}); set server_host (or spark.tensorspark.server.host) to an address of the driver that executors "
            f"can reach, and server_port (or spark.tensorspark.server.port) to a port that no firewall closes"
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection if address.certificate is None else _encrypted(connection, address)


def _encrypted(connection: socket.socket, address: ServerAddress) -> ssl.SSLSocket:
    from tensorspark.ps.tls import client_context

    assert address.certificate is not None
    try:
        return client_context(address.certificate).wrap_socket(connection)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise AuthenticationError(
            f"the server at {address} has another certificate than this run's: {error}"
        ) from error
    except OSError as error:
        connection.close()
        raise ConnectionLostError(f"the TLS handshake with the server at {address} failed: {error}") from error
