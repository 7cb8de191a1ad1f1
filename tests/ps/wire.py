"""Connections by hand: what a stranger sends, and a worker's frames without the library's client."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from tensorspark.ps import protocol
from tensorspark.ps.messages import Registration
from tensorspark.ps.protocol import Kind
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.layout import Buffer

TIMEOUT_S = 10.0


def connect(server: ParameterServer, context: ssl.SSLContext | None = None) -> socket.socket:
    """A connection that raises TimeoutError where the server leaves it without an answer."""
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a handshake waits for delayed acknowledgements
    if context is None:
        return plain
    try:
        return context.wrap_socket(plain, server_hostname="127.0.0.1")
    except BaseException:
        plain.close()
        raise


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(2**16):
            received += chunk
    return received


def ask(server: ParameterServer, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """What comes for `request` until the server closes the connection."""
    with connect(server, context) as connection:
        connection.sendall(request)
        return read_to_end(connection)


class Wire:
    """A worker's connection, upgraded."""

    def __init__(self, server: ParameterServer, context: ssl.SSLContext | None = None) -> None:
        self.socket = connect(server, context)
        request = (
            f"GET {protocol.PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {protocol.UPGRADE}\r\n"
            f"Authorization: Bearer {server.token}\r\n\r\n"
        )
        self.response = b""
        try:
            self.socket.sendall(request.encode())
            while not self.response.endswith(b"\r\n\r\n"):
                received = self.socket.recv(1)  # no more, lest frames be taken with it
                if not received:
                    raise ConnectionResetError("closed during the upgrade")
                self.response += received
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def register(self, server: ParameterServer, run: int, partition: int = 0) -> None:
        registration = Registration(run, partition, 1 + partition, server.layout.fingerprint, "here")
        self.send(Kind.REGISTER, vars(registration))
        self.receive(Kind.GRANTED)

    def send(self, kind: Kind, header: Mapping[str, Any], payload: Buffer | None = None) -> None:
        self.socket.sendall(protocol.encode(kind, header, 0 if payload is None else payload.nbytes))
        if payload is not None:
            self.socket.sendall(payload.data)

    def receive(self, expected: Kind, payload: Buffer | None = None) -> dict[str, Any]:
        limit = 0 if payload is None else payload.nbytes
        prefix = protocol.decode_prefix(self._exactly(protocol.PREFIX_BYTES), protocol.FROM_SERVER, limit)
        header = protocol.decode_header(self._exactly(prefix.header_bytes))
        if prefix.kind is Kind.WAIT:
            return self.receive(expected, payload)
        assert prefix.kind is expected, header
        if payload is not None:
            self._fill(payload.data)
        return header

    def pull(self, out: Buffer) -> int:
        self.send(Kind.PULL, {})
        version: int = self.receive(Kind.SNAPSHOT, out)["version"]
        return version

    def push(self, weights: Buffer, sequence: int = 1) -> None:
        header = {"sequence": sequence, "epoch": 0, "batch": sequence, "num_steps": 1, "num_samples": 10, "version": 0}
        self.send(Kind.PUSH, {**header, "sums": {}, "progress": None}, weights)
        assert self.receive(Kind.ACCEPTED)["sequence"] == sequence

    def _exactly(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        self._fill(memoryview(data))
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            received = self.socket.recv_into(view)
            if not received:
                raise ConnectionResetError("closed within a frame")
            view = view[received:]
