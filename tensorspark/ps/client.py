"""A worker's side of the conversation with the parameter server: blocking, with a deadline on every wait."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorspark.errors import (
    AuthenticationError,
    ConnectionLostError,
    ProtocolError,
    ServerUnreachableError,
    TransportError,
)
from tensorspark.ps import protocol
from tensorspark.ps.protocol import Kind
from tensorspark.ps.state import Cursor, Push, Registration
from tensorspark.weights.layout import Buffer

_MAX_RESPONSE_BYTES = 2**14
_MAX_TRACEBACK_BYTES = 2**15


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is and what opens it. Travels to the executors; its repr hides the token."""

    host: str
    port: int
    token: str = field(repr=False)
    connect_timeout_s: float = 5.0
    io_timeout_s: float = 120.0


@dataclass(frozen=True)
class Granted:
    """A partition is this worker's, from `cursor` on; `sequence` is that of the partition's last push."""

    sequence: int
    cursor: Cursor
    finished: bool


class ParameterClient:
    """One connection to the server. Not thread-safe.

    `push` only sends; its acceptance is read by the next `pull`, `flush` or `finish`, so that a push and the pull that
    follows it cost one round trip.

    Raises:
        ServerUnreachableError: nobody answered in time.
        AuthenticationError: the token is not the server's.
        ProtocolError: what answered is not a tensorspark server of this version.
        ConnectionLostError: (any method) the server is gone, or did not answer in time.
        RefusedError: (any method) the server refused; its subclasses say why.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        self._socket = connect(address)
        self._unanswered: list[int] = []
        self._is_broken = False  # in the middle of a frame: what is sent now would be read as the rest of it
        try:
            self._socket.settimeout(address.connect_timeout_s)  # who accepts and says nothing is no server of ours
            self._upgrade()
            self._socket.settimeout(address.io_timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> ParameterClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def register(self, registration: Registration, wait_s: float | None = None) -> Granted:
        """Asks for a partition, and waits while another attempt holds it.

        Args:
            wait_s: the longest wait; None waits as long as the connection lives.
        """
        self._send(Kind.REGISTER, vars(registration))
        self._socket.settimeout(wait_s)
        header = self._receive(Kind.GRANTED)
        self._socket.settimeout(self._address.io_timeout_s)
        return Granted(
            sequence=protocol.count(header, "sequence"),
            cursor=Cursor(protocol.count(header, "epoch"), protocol.count(header, "batch")),
            finished=protocol.field(header, "finished", bool),
        )

    def pull(self, out: Buffer) -> int:
        """Receives the newest weights into `out` and returns their version; this worker's pushes are in them."""
        self._send(Kind.PULL, {})
        self.flush()
        return protocol.count(self._receive(Kind.SNAPSHOT, out), "version")

    def push(self, weights: Buffer, push: Push) -> None:
        """Sends weights or a delta, as the run's combiner wants them; `weights` may be reused at once."""
        header = {
            "sequence": push.sequence,
            "epoch": push.cursor.epoch,
            "batch": push.cursor.batch,
            "num_steps": push.num_steps,
            "num_samples": push.num_samples,
            "sums": dict(push.sums),
            "progress": push.progress,
        }
        self._send(Kind.PUSH, header, weights)
        self._unanswered.append(push.sequence)

    def flush(self) -> None:
        """Waits until all pushes are accepted."""
        while self._unanswered:
            sequence = protocol.count(self._receive(Kind.ACCEPTED), "sequence")
            if sequence != self._unanswered.pop(0):
                raise ProtocolError(f"expected another push to be accepted next, got {sequence}")

    def finish(self, *, epoch_samples: list[int], epoch_seconds: list[float], step_s: float, sync_s: float) -> None:
        """Tells the server that the partition is trained to its end."""
        self.flush()
        self._send(
            Kind.FINISH,
            {"epoch_samples": epoch_samples, "epoch_seconds": epoch_seconds, "step_s": step_s, "sync_s": sync_s},
        )
        self._receive(Kind.ACCEPTED)

    def report(self, message: str, traceback: str) -> None:
        """Tells the server that this worker has failed; best effort: a server that is gone is told nothing."""
        if self._is_broken:
            return
        with contextlib.suppress(TransportError):
            self._send(Kind.FAIL, {"message": _tail(message, 2**10), "traceback": _tail(traceback)})
            self._skip_to_answer()

    def _skip_to_answer(self) -> None:
        # Answers to earlier pushes may lie before the one to FAIL; a refusal ends the conversation too.
        for _ in range(len(self._unanswered) + 1):
            self._receive(Kind.ACCEPTED)

    # Bytes

    def _upgrade(self) -> None:
        address = self._address
        request = (
            f"GET {protocol.PATH} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\nConnection: Upgrade\r\n"
            f"Upgrade: {protocol.UPGRADE}\r\nAuthorization: Bearer {address.token}\r\n\r\n"
        )
        self._send_all(request.encode("ascii"))
        response = b""
        while b"\r\n\r\n" not in response:
            response += self._receive_some(_MAX_RESPONSE_BYTES)
            if len(response) >= _MAX_RESPONSE_BYTES:
                raise ProtocolError(f"expected an HTTP response from {self._where()}, got too much else")
        self._check_response(response.split(b"\r\n", 1)[0].decode("latin-1"))

    def _check_response(self, status_line: str) -> None:
        parts = status_line.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/"):
            raise ProtocolError(f"expected a tensorspark server at {self._where()}, got {status_line[:80]!r}")
        if parts[1] == "401":
            raise AuthenticationError(f"the server at {self._where()} does not know this run's token: another run's?")
        if parts[1] != "101":
            raise ProtocolError(f"expected {self._where()} to upgrade to {protocol.UPGRADE}, got {status_line[:80]!r}")

    def _send(self, kind: Kind, header: Mapping[str, Any], payload: Buffer | None = None) -> None:
        self._send_all(protocol.encode(kind, header, 0 if payload is None else payload.nbytes))
        if payload is not None:
            self._send_all(payload.data)

    def _receive(self, expected: Kind, payload: Buffer | None = None) -> dict[str, Any]:
        limit = 0 if payload is None else payload.nbytes
        prefix = protocol.decode_prefix(self._receive_exactly(protocol.PREFIX_BYTES), protocol.FROM_SERVER, limit)
        header = protocol.decode_header(self._receive_exactly(prefix.header_bytes))
        if prefix.kind is Kind.REFUSED:
            raise protocol.refusal(header)
        if prefix.kind is not expected or prefix.payload_bytes != limit:
            raise ProtocolError(
                f"expected {expected.name} with {limit} bytes, got {prefix.kind.name} with {prefix.payload_bytes}"
            )
        if payload is not None:
            self._fill(payload.data)
        return header

    def _receive_exactly(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        with self._translated():
            while view:
                received = self._socket.recv_into(view)
                if not received:
                    raise ConnectionLostError(f"the server at {self._where()} closed the connection")
                view = view[received:]

    def _receive_some(self, num_bytes: int) -> bytes:
        with self._translated():
            data = self._socket.recv(num_bytes)
        if not data:
            raise ConnectionLostError(f"the server at {self._where()} closed the connection")
        return data

    def _send_all(self, data: bytes | memoryview) -> None:
        with self._translated():
            self._socket.sendall(data)

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except TimeoutError as error:
            self._is_broken = True
            raise ConnectionLostError(
                f"the server at {self._where()} did not answer within {self._socket.gettimeout()} s "
                f"(spark.tensorspark.io.timeout)"
            ) from error
        except ConnectionLostError:
            self._is_broken = True
            raise
        except OSError as error:
            self._is_broken = True
            raise ConnectionLostError(f"the connection to the server at {self._where()} broke: {error}") from error

    def _where(self) -> str:
        return f"{self._address.host}:{self._address.port}"


def connect(address: ServerAddress) -> socket.socket:
    """Opens a TCP connection to the server; raises `ServerUnreachableError`, naming the setting to change."""
    try:
        connection = socket.create_connection((address.host, address.port), timeout=address.connect_timeout_s)
    except OSError as error:
        raise ServerUnreachableError(
            f"host {socket.gethostname()} cannot reach the parameter server at {address.host}:{address.port} "
            f"({error}); set server_host (or spark.tensorspark.server.host) to an address of the driver that executors "
            f"can reach, and server_port (or spark.tensorspark.server.port) to a port that no firewall closes"
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def _tail(text: str, num_bytes: int = _MAX_TRACEBACK_BYTES) -> str:
    return text.encode(errors="backslashreplace")[-num_bytes:].decode(errors="ignore")
