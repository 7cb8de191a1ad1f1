"""Who speaks to the server that `benchmarks.fuzz` attacks: attackers, and an honest worker. Each is a thread."""

from __future__ import annotations

import collections
import contextlib
import random
import secrets
import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np

from benchmarks.fuzz.mutations import ByteMutator, Mutator, with_fields
from benchmarks.fuzz.victims import HONEST_PARTITION, LAYOUT, NUM_HOLDERS, initial_weights
from tensorspark.errors import TensorsparkError
from tensorspark.ps import protocol
from tensorspark.ps.client import ParameterClient
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.messages import Cursor, Push, Registration
from tensorspark.ps.protocol import Kind
from tensorspark.weights.layout import Buffer

_TIMEOUT_S = 20.0
_JOIN_S = 30.0
_PAUSE_S = 0.005
_NUM_DELTAS = 64
_MAX_BURST = 10
_HTTP_SHARE = 0.1
_ABSENT_RUN, _ABSENT_PARTITION = 99, 7
_RESET = struct.pack("ii", 1, 0)  # a connection that is reset leaves no port in TIME_WAIT


class Speaker(threading.Thread):
    """A thread that speaks to the server until it is stopped, and keeps what went wrong."""

    def __init__(self, address: ServerAddress, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failures: list[str] = []
        self.ended = threading.Event()
        self._address = address
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self._stopping.is_set() and not self.failures:
                self.turn()
        except Exception as error:
            self.failures.append(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            self.close()
            self.ended.set()

    def turn(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Called on the thread at its end."""

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(_JOIN_S)
            if self.is_alive():
                self.failures.append(f"{self.name} hangs")


class HonestWorker(Speaker):
    """Pulls and pushes, and compares every pull with the sum of its own pushes.

    Attributes:
        expected: the server's weights after the last push.
        num_rounds: pulls that were as expected.
    """

    def __init__(self, address: ServerAddress, seed: int) -> None:
        super().__init__(address, "honest worker")
        self.expected = initial_weights()
        self.num_rounds = 0
        self._pulled = LAYOUT.allocate()
        self._deltas = _deltas(seed)
        self._client: ParameterClient | None = None

    def start_and_wait(self) -> None:
        """Returns when the partition is its own."""
        self._client = ParameterClient(self._address)
        # A number that mutations do not hit: who knows the attempt can take its lease over, and is meant to.
        attempt = secrets.randbits(62)
        self._client.register(Registration(1, HONEST_PARTITION, attempt, LAYOUT.fingerprint, "honest.example"))
        self.start()

    def turn(self) -> None:
        assert self._client is not None
        version = self._client.pull(self._pulled).version
        if self._pulled.tobytes() != self.expected.tobytes():
            raise ValueError(f"pull {self.num_rounds}, version {version}: the weights are not the sum of the pushes")
        self.num_rounds += 1
        delta = self._deltas[self.num_rounds % _NUM_DELTAS]
        for segment in LAYOUT.segments:
            segment.of(self.expected)[:] += segment.of(delta)
        self._client.push(delta, Push(self.num_rounds, Cursor(0, self.num_rounds), 1, 10, version, {"loss": 0.5}))
        self._stopping.wait(_PAUSE_S)

    def close(self) -> None:
        if self._client is not None:
            with contextlib.suppress(TensorsparkError):
                self._client.flush()
            self._client.close()


def _deltas(seed: int) -> list[Buffer]:
    random_numbers = np.random.default_rng(seed)
    return [
        LAYOUT.pack(
            {
                "W:0": random_numbers.normal(0, 0.01, (16, 4)).astype(np.float32),
                "step:0": np.array(random_numbers.integers(1, 9), np.int64),
            }
        )
        for _ in range(_NUM_DELTAS)
    ]


class Attacker(Speaker):
    """Sends mutated frames and requests on one connection after the other.

    Attributes:
        num_inputs: of which the server took notice, by kind of mutation.
        answers: by kind of frame, or status of HTTP.
    """

    def __init__(self, address: ServerAddress, role: str, frames: Sequence[bytes], seed: int) -> None:
        super().__init__(address, f"attacker {seed}")
        self.num_inputs: collections.Counter[str] = collections.Counter()
        self.answers: collections.Counter[str] = collections.Counter()
        self._role = role
        self._seed = seed
        self._random = random.Random(seed)
        self._frames = [frame for frame in frames if role == "strangers" or frame[5] not in (Kind.FAIL, Kind.SKIP)]
        self._register = next(frame for frame in frames if frame[5] == Kind.REGISTER)
        self._mutator = Mutator(self._frames, seed)
        upgrade = (
            f"GET {protocol.PATH} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {protocol.UPGRADE}\r\n"
            f"Authorization: Bearer {address.token}\r\n\r\n"
        )
        self._upgrade = upgrade.encode()
        self._requests = ByteMutator(_requests(address.token), seed)

    def turn(self) -> None:
        if self._role == "holders":
            self._attack_as_holder()
        elif self._random.random() < _HTTP_SHARE:
            self._attack_http()
        else:
            self._attack_as_stranger()

    def _attack_http(self) -> None:
        with self._connected() as connection:
            received = _converse(connection, self._requests.next()[1][0])
        self.num_inputs["HTTP"] += 1
        self.answers[f"HTTP {received.split(b' ', 2)[1].decode()}" if received else "by closing"] += 1

    def _attack_as_stranger(self) -> None:
        pick = self._random.random()
        inputs = self._burst(self._mutator)
        attempt = self._random.randint(1, 2**31)
        first = b""
        if pick < 0.7:  # a standby: no answer comes to its registration
            first = with_fields(self._register, attempt=attempt, partition=HONEST_PARTITION)
        elif pick < 0.8:
            inputs.insert(0, ("another run's worker", with_fields(self._register, attempt=attempt, run=_ABSENT_RUN)))
        elif pick < 0.9:
            absent = with_fields(self._register, attempt=attempt, partition=_ABSENT_PARTITION)
            inputs.insert(0, ("an absent partition", absent))
        with self._connected() as connection:
            received = _converse(connection, self._upgrade + first + b"".join(each for _, each in inputs))
        self._count(inputs, received)

    def _attack_as_holder(self) -> None:
        partition = self._random.randint(1, NUM_HOLDERS)
        register = with_fields(self._register, attempt=self._random.randint(1, 2**31), partition=partition)
        with self._connected() as connection:
            connection.sendall(self._upgrade + register)
            received = b""
            while len(_answers(received)) < 1:
                chunk = connection.recv(2**16)
                if not chunk:
                    raise ConnectionResetError(f"closed before partition {partition} was granted")
                received += chunk
            inputs = self._burst(Mutator(self._rebased(_answers(received)[0][1]), self._random.getrandbits(32)))
            answered = _converse(connection, b"".join(each for _, each in inputs))
        self._count(inputs, b"\r\n\r\n" + answered)

    def _rebased(self, granted: bytes) -> list[bytes]:
        """The recorded frames, their pushes those that come next in the partition."""
        header = protocol.decode_header(granted)
        rebased = []
        for frame in self._frames:
            if frame[5] == Kind.PUSH:
                header["sequence"] += 1
                batch = max(1, header["batch"])  # where one field more would have to be wrong to end the epoch for good
                frame = with_fields(frame, sequence=header["sequence"], epoch=header["epoch"], batch=batch, version=0)
            rebased.append(frame)
        return rebased

    def _burst(self, mutator: Mutator) -> list[tuple[str, bytes]]:
        inputs: list[tuple[str, bytes]] = []
        size = self._random.randint(1, _MAX_BURST)
        while len(inputs) < size:
            kind, mutated = mutator.next()
            inputs += [(kind, each) for each in mutated]
        return inputs

    def _count(self, inputs: Sequence[tuple[str, bytes]], received: bytes) -> None:
        answers = _answers(received)
        for kind, _ in answers:
            self.answers[kind] += 1
        num_unassigned = len(answers)
        for kind, data in inputs:
            self.num_inputs[kind] += 1
            num_unassigned -= max(1, data.count(protocol.MAGIC))  # so many frames may begin in it
            if num_unassigned < 0:  # closed over this one, if not over one before
                break

    def _connected(self) -> socket.socket:
        connection = socket.create_connection((self._address.host, self._address.port), _TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return connection


def _converse(connection: socket.socket, data: bytes) -> bytes:
    """Sends all and no more, and returns what comes until the server closes; TimeoutError where it does not."""
    received = bytearray()
    with contextlib.suppress(OSError):  # the server may have closed by now; where it hangs, the loop below says so
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(2**16):
            received += chunk
    return bytes(received)


def _answers(received: bytes) -> list[tuple[str, bytes]]:
    """Kind and header of the whole frames that came after the upgrade."""
    data = received.partition(b"\r\n\r\n")[2]
    answers = []
    while len(data) >= protocol.PREFIX_BYTES:
        prefix = protocol.decode_prefix(data[: protocol.PREFIX_BYTES], protocol.FROM_SERVER, LAYOUT.num_bytes)
        header_ends = protocol.PREFIX_BYTES + prefix.header_bytes
        if len(data) < header_ends + prefix.payload_bytes:
            break
        if prefix.kind is not Kind.WAIT:
            answers.append((prefix.kind.name, data[protocol.PREFIX_BYTES : header_ends]))
        data = data[header_ends + prefix.payload_bytes :]
    return answers


def _requests(token: str) -> list[bytes]:
    heads = (
        "GET /healthz HTTP/1.1\r\nHost: x",
        "HEAD /healthz HTTP/1.0",
        "GET /status HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nAuthorization: Bearer " + token,
        "GET /workers HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tensorspark/3\r\nAuthorization: Bearer x",
        "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nAuthorization: Bearer " + token + "\r\n\r\nabcde",
        "POST /workers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nAuthorization: Bearer " + token
        + "\r\n\r\n5\r\nabcde\r\n0",
        "POST /x HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 20",
        "GET http://example.com/%ff?a=%zz HTTP/1.1\r\nHost: x\r\nCookie: a=b; c\r\nExpect: 100-continue",
    )  # fmt: skip
    return [f"{head}\r\n\r\n".encode() for head in heads]
