"""A worker's side of the conversation with the parameter server: blocking, with a deadline on every wait."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tensorspark.errors import ConnectionLostError, ProtocolError, ServerUnreachableError, TransportError
from tensorspark.ps import headers, protocol
from tensorspark.ps.link import Link, ServerAddress
from tensorspark.ps.messages import MAX_TOTALS_BYTES, Asked, Cursor, Order, Push, Registration, TimeSpent
from tensorspark.ps.payloads import Intake, Outlet
from tensorspark.ps.protocol import Kind
from tensorspark.telemetry.notes import Line, Timing
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, WeightLayout

__all__ = ["Granted", "ParameterClient", "ServerAddress"]

_MAX_TRACEBACK_BYTES = 2**15
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_NOTE_S = 1.0
_RECONNECTED_S = 0.1  # how often one who reports a failure looks whether there is a new connection
_T = TypeVar("_T")


@dataclass(frozen=True)
class Granted:
    """A partition is this worker's, from `cursor` on; `sequence` is that of the partition's last push."""

    sequence: int
    cursor: Cursor
    finished: bool


class ParameterClient:
    """A worker's conversation with the server. For one thread, but for `report`.

    It outlasts its connection: when that breaks, it connects again, with growing pauses, resumes its lease and repeats
    the pushes that the server has not accepted; the server counts each once. A thread of its own tells the server
    that the worker lives while it computes.

    `push` only sends; its acceptance is read by the next `pull`, `flush` or `finish`, so that a push and the pull that
    follows it cost one round trip.

    Args:
        layout: of the weights; None: they travel whole and raw alone.
        compression: the run's.

    Raises:
        ServerUnreachableError: nobody answered in time.
        AuthenticationError: the token is not the server's.
        ProtocolError: what answered is not a tensorspark server of this version.
        ConnectionLostError: (any method) the server is gone, or did not answer in time.
        RefusedError: (any method) the server refused; its subclasses say why.
    """

    def __init__(
        self, address: ServerAddress, layout: WeightLayout | None = None, compression: Compression = NO_COMPRESSION
    ) -> None:
        self._address = address
        self._intake = Intake(layout, compression)
        self._outlet = Outlet(layout, compression)
        self._link = Link(address)
        self._registration: Registration | None = None
        self._is_granted = False
        self._holder: Link | None = None  # the newest link that has the lease
        self._clock_bound: float | None = None  # see `telemetry.clocks`
        self._unanswered: list[tuple[Push, Buffer]] = []
        self._turn = threading.Lock()  # held while a frame is sent or an answer awaited
        self._closing = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="tensorspark-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> ParameterClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.set()
        self._heart.join(self._address.io_timeout_s)
        self._link.close()

    def register(self, registration: Registration) -> Granted:
        """Asks for a partition, and waits while another attempt holds it."""
        self._registration = registration
        with self._turn:
            granted = self._persist(self._register)
        self._is_granted = True
        return granted

    def pull(self, out: Buffer, holds: int | None = None, asked: Asked = Asked.NEXT, epoch: int | None = None) -> Order:
        """Receives the newest weights into `out`, and what is to be done next; this worker's pushes are in them.

        Waits at the server's gate and at the end of an epoch, as long as the server says that it lives.

        Args:
            out: may be what was pushed last: it is not written to before that is accepted.
            holds: the version that `out` holds, unchanged since it was pulled: what did not change is not sent again.
            epoch: which `Asked.EVALUATE` is about.
        """

        def pull() -> Order:
            nonlocal holds
            self._link.send(Kind.PULL, headers.pull_header(holds, asked, epoch))
            self._read_acceptances()
            header, num_bytes = self._link.receive(Kind.SNAPSHOT, out.nbytes)
            held, holds = holds, None  # while it is written over, and the connection may break
            self._intake.receive(self._link, protocol.field(header, "form", str), num_bytes, out, held)
            return headers.order(header)

        with self._turn:
            return self._persist(pull)

    def rest(self) -> None:
        """Tells the server that the worker waits for another shard, and the end of the epoch is not to wait for it.

        Pushes may be accepted before it is answered, or only later.
        """

        def rest() -> None:
            self._link.send(Kind.PULL, headers.pull_header(None, Asked.REST))
            while True:
                kind, header, _ = self._link.receive_any((Kind.SNAPSHOT, Kind.ACCEPTED))
                if kind is Kind.SNAPSHOT:
                    return
                self._take_acceptance(header)

        with self._turn:
            self._persist(rest)

    def push(self, weights: Buffer, push: Push) -> None:
        """Sends weights or a delta, as the run's combiner wants them.

        Args:
            weights: must stay as they are until the next `pull`, `flush` or `finish` returns: they are sent again if
                the connection breaks. Where pushes are encoded they are written over; with a lossy codec and
                `Compression.leaves_error` by what it left out, which the next push is to begin from.
        """
        _require_short(push.totals)
        with self._turn:
            if self._outlet.is_encoding:
                self._persist(self._read_acceptances)  # of what the codec's memory holds
            payload, encoded_bytes = self._outlet.encode(weights)
            push = replace(push, encoded_bytes=encoded_bytes)
            self._unanswered.append((push, payload))
            try:
                self._link.send(Kind.PUSH, headers.push_header(push), payload, push.totals)
            except ConnectionLostError as error:
                self._resume(error, time.monotonic())

    def flush(self) -> None:
        """Waits until all pushes are accepted."""
        with self._turn:
            self._persist(self._read_acceptances)

    def finish(self, spent: TimeSpent) -> None:
        """Tells the server that the partition is trained to its end."""
        self._tell(Kind.FINISH, vars(spent))

    def skip_epoch(self, epoch: int) -> None:
        """Tells the server that the partition has no rows to train in `epoch`, which it is at the beginning of."""
        self._tell(Kind.SKIP, {"epoch": epoch})

    def report_evaluation(self, epoch: int, totals: bytes, num_samples: int) -> None:
        """Tells the server what came of the evaluation that it has ordered; counts once, however often it is told.

        Args:
            totals: as in `Push`, and never empty unless they always are.
            num_samples: rows evaluated.
        """
        _require_short(totals)
        self._tell(Kind.EVALUATION, {"epoch": epoch, "num_samples": num_samples}, totals)

    def report(self, message: str, traceback: str) -> None:
        """Tells the server that this worker has failed; best effort: a server that is gone is told nothing.

        On any thread: who waits for an answer on another has none but this one's any more.
        """
        header: dict[str, object] = {"message": _ends(message, 2**10), "traceback": _tail(traceback)}
        if not self._turn.acquire(blocking=False):
            self._interject(header)
            return
        try:
            self._report(header)
        finally:
            self._turn.release()

    def note(self, lines: Sequence[Line], timings: Sequence[Timing]) -> bool:
        """Tells the server, between two other frames, what nothing waits for; whether it left. On any thread."""
        link = self._holder
        if link is None:
            return False
        header = headers.note_header(time.monotonic(), self._clock_bound, lines, timings)
        try:
            return link.interject(Kind.NOTE, header, _NOTE_S)
        except TransportError:  # the next exchange will see it, and may mend it
            return False

    def _report(self, header: dict[str, object]) -> None:
        with contextlib.suppress(TransportError):
            self._link.send(Kind.FAIL, header)
            # Answers to earlier pushes may lie before the one to FAIL; a refusal ends the conversation too.
            for _ in range(len(self._unanswered) + 1):
                self._link.receive(Kind.ACCEPTED)

    def _interject(self, header: dict[str, object]) -> None:
        """Reports while another thread waits for the server, at the gate maybe: who reads its answers then is open."""
        told: Link | None = None
        deadline = time.monotonic() + self._address.io_timeout_s + self._address.reconnect_timeout_s
        while True:
            if self._holder is not None and self._holder is not told:
                with contextlib.suppress(TransportError):
                    if self._holder.interject(Kind.FAIL, header, _RECONNECTED_S):
                        told = self._holder
            if self._turn.acquire(timeout=_RECONNECTED_S):
                break
            if time.monotonic() > deadline:
                return
        try:
            if told is self._link:
                with contextlib.suppress(TransportError):
                    told.end()
            else:
                self._report(header)
        finally:
            self._turn.release()

    def _tell(self, kind: Kind, header: dict[str, object], totals: bytes = b"") -> None:
        """Sends a frame that the server notes, again if the connection breaks before it says so."""

        def tell() -> None:
            self._read_acceptances()
            self._link.send(kind, header, None, totals)
            self._link.receive(Kind.ACCEPTED)

        with self._turn:
            self._persist(tell)

    def _register(self) -> Granted:
        assert self._registration is not None
        self._link.send(Kind.REGISTER, vars(replace(self._registration, is_resuming=self._is_granted)))
        header, _ = self._link.receive(Kind.GRANTED)
        bound = protocol.field(header, "clock", float) - time.monotonic()
        self._clock_bound = bound if self._clock_bound is None else max(bound, self._clock_bound)
        self._holder = self._link
        return Granted(
            sequence=protocol.count(header, "sequence"),
            cursor=Cursor(protocol.count(header, "epoch"), protocol.count(header, "batch")),
            finished=protocol.field(header, "finished", bool),
        )

    def _read_acceptances(self) -> None:
        while self._unanswered:
            self._take_acceptance(self._link.receive(Kind.ACCEPTED)[0])

    def _take_acceptance(self, header: Mapping[str, Any]) -> None:
        sequence = protocol.count(header, "sequence")
        if not self._unanswered or sequence != self._unanswered.pop(0)[0].sequence:
            raise ProtocolError(f"expected another push to be accepted next, got {sequence}")

    # When the connection breaks

    def _persist(self, exchange: Callable[[], _T]) -> _T:
        """Does `exchange`, again on a new connection when the old one breaks, until `reconnect_timeout_s` are over."""
        lost_at: float | None = None
        while True:
            began_at = time.monotonic()
            try:
                return exchange()
            except ConnectionLostError as error:
                # Breaks in quick succession (something on the way bears no large frame, say) have one deadline.
                if lost_at is None or time.monotonic() - began_at > self._address.reconnect_timeout_s:
                    lost_at = time.monotonic()
                self._resume(error, lost_at)

    def _resume(self, lost: ConnectionLostError, lost_at: float) -> None:
        """Connects again and brings the server up to where this worker is."""
        deadline = lost_at + self._address.reconnect_timeout_s
        backoff_s = _FIRST_BACKOFF_S
        while True:
            self._link.close()
            # Not all workers at once, where the server or the network had them all lose their connections.
            pause_s = backoff_s * random.uniform(0.5, 1.0)
            if time.monotonic() + pause_s >= deadline or self._closing.wait(pause_s):
                raise ConnectionLostError(
                    f"{lost}; the server could not be reached again within {self._address.reconnect_timeout_s:g} s "
                    f"(spark.tensorspark.reconnect.timeout): look whether the driver still runs"
                ) from lost
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            try:
                self._link = Link(self._address)
                if self._closing.is_set():  # `close` may have seen the one before, and nobody would close this one
                    raise lost
                if self._is_granted:
                    self._repeat(self._register())
                return
            except (ConnectionLostError, ServerUnreachableError) as error:
                lost = error if isinstance(error, ConnectionLostError) else lost

    def _repeat(self, granted: Granted) -> None:
        """Sends the pushes again that the server does not have."""
        self._unanswered = [pair for pair in self._unanswered if pair[0].sequence > granted.sequence]
        for push, weights in self._unanswered:
            self._link.send(Kind.PUSH, headers.push_header(push), weights, push.totals)

    def _beat(self) -> None:
        while not self._closing.wait(self._address.lease_timeout_s / 4):
            # Whoever has its turn is speaking anyway, or the server has it wait.
            if self._turn.acquire(blocking=False):
                try:
                    with contextlib.suppress(TransportError):  # the next exchange will see it
                        self._link.send(Kind.ALIVE, {})
                finally:
                    self._turn.release()


def _require_short(totals: bytes) -> None:
    if len(totals) > MAX_TOTALS_BYTES:
        raise ProtocolError(
            f"expected totals of at most {MAX_TOTALS_BYTES} bytes, got {len(totals)}: the model's metrics keep "
            f"too many numbers; use fewer metrics, or fewer thresholds"
        )


def _ends(text: str, num_chars: int) -> str:
    """The begin and the end: of TensorFlow's long messages the one says what was raised, the other why."""
    if len(text) <= num_chars:
        return _tail(text, num_chars)
    begin = num_chars // 4
    return f"{_tail(text[:begin])}\n[...]\n{_tail(text, num_chars - begin)}"


def _tail(text: str, num_bytes: int = _MAX_TRACEBACK_BYTES) -> str:
    return text.encode(errors="backslashreplace")[-num_bytes:].decode(errors="ignore")
