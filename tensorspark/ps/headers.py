"""The headers of frames: made of messages, and read into messages, every field checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.messages import Asked, Cursor, Grant, Order, OrderKind, Push, Registration, TimeSpent
from tensorspark.telemetry.notes import Line, Note, Timing

if TYPE_CHECKING:  # workers need no Tornado
    from tensorspark.ps.connection import Frame

# Of the steps or rows in one report: what is added up of them goes out as 63 bits, however many report.
COUNT_BITS = 40
# Of a clock, or between two of its times: what is added up of them stays finite, for files and traces.
_MAX_CLOCK_S = 1e12
_ASKED = {kind.value: kind for kind in Asked}
_ORDERS = {kind.value: kind for kind in OrderKind}


def registration(header: dict[str, object]) -> Registration:
    return Registration(
        run=protocol.count(header, "run"),
        partition=protocol.count(header, "partition"),
        attempt=protocol.count(header, "attempt"),
        fingerprint=protocol.field(header, "fingerprint", str),
        host=protocol.field(header, "host", str),
        is_resuming=protocol.field(header, "is_resuming", bool),
    )


def asked(header: dict[str, object]) -> Asked:
    text = protocol.field(header, "asked", str) if "asked" in header else Asked.NEXT.value
    if text not in _ASKED:
        raise ProtocolError(f"expected a pull that asks for one of {', '.join(_ASKED)}, got {text[:40]!r}")
    return _ASKED[text]


def asked_epoch(header: dict[str, object]) -> int | None:
    """Which epoch a pull for an evaluation is about, where it says so."""
    return protocol.count(header, "epoch") if "epoch" in header else None


def time_spent(header: dict[str, object]) -> TimeSpent:
    return TimeSpent(
        epoch_samples=protocol.numbers(header, "epoch_samples", int),
        epoch_seconds=protocol.numbers(header, "epoch_seconds", float),
        step_s=protocol.field(header, "step_s", float),
        sync_s=protocol.field(header, "sync_s", float),
        hidden_s=protocol.field(header, "hidden_s", float),
    )


def push(frame: Frame) -> Push:
    header = frame.header
    sums = protocol.field(header, "sums", dict)
    return Push(
        sequence=protocol.count(header, "sequence"),
        cursor=Cursor(protocol.count(header, "epoch"), protocol.count(header, "batch")),
        num_steps=protocol.count(header, "num_steps", COUNT_BITS),
        num_samples=protocol.count(header, "num_samples", COUNT_BITS),
        version=protocol.count(header, "version"),
        sums={str(name): protocol.field(sums, name, float) for name in sums},
        progress=None if header.get("progress") is None else _finite(header, "progress"),
        totals=frame.totals,
        encoded_bytes=protocol.count(header, "encoded") if "encoded" in header else 0,
        num_bytes=frame.num_bytes,
    )


def order_header(order: Order) -> dict[str, object]:
    return {
        "version": order.version,
        "order": order.kind.value,
        "epoch": order.epoch,
        "num_steps": order.num_steps,
        "num_workers": order.num_workers,
        "values": dict(order.values),
    }


def note_header(
    sent_at: float, clock_bound: float | None, lines: Sequence[Line], timings: Sequence[Timing]
) -> dict[str, object]:
    return {
        "clock": sent_at,
        "clock_bound": clock_bound,
        "lines": [[line.level, line.logger, line.message] for line in lines],
        "timings": [[timing.name, timing.began, timing.duration_s] for timing in timings],
    }


def note(header: Mapping[str, Any]) -> Note:
    def fields(name: str, kinds: tuple[type, ...]) -> Iterator[tuple[Any, ...]]:
        for row in protocol.numbers(header, name, list):
            if len(row) != len(kinds):
                raise ProtocolError(f"expected header field {name!r} to have rows of {len(kinds)}, got {len(row)}")
            yield tuple(protocol.field({name: value}, name, kind) for value, kind in zip(row, kinds, strict=True))

    return Note(
        sent_at=_finite(header, "clock"),
        lines=tuple(Line(*row) for row in fields("lines", (int, str, str))),
        timings=tuple(_timing(*row) for row in fields("timings", (str, float, float))),
        clock_bound=None if header.get("clock_bound") is None else _finite(header, "clock_bound"),
    )


def _timing(name: str, began: float, duration_s: float) -> Timing:
    row = {"began": began, "duration_s": duration_s}
    timing = Timing(name, _finite(row, "began"), _finite(row, "duration_s"))
    if timing.duration_s < 0:
        raise ProtocolError(f"expected timings of 0 s or more, got {timing.duration_s:g}")
    return timing


def _finite(header: Mapping[str, Any], name: str) -> float:
    value = protocol.field(header, name, float)
    if not -_MAX_CLOCK_S <= value <= _MAX_CLOCK_S:  # NaN is not either
        raise ProtocolError(f"expected header field {name!r} to be from -1e12 to 1e12, got {value:g}")
    return value


def granted_header(grant: Grant, clock: float) -> dict[str, object]:
    """
    Args:
        clock: the server's monotonic one, now.
    """
    return {
        "clock": clock,
        "sequence": grant.sequence,
        "epoch": grant.cursor.epoch,
        "batch": grant.cursor.batch,
        "finished": grant.finished,
    }


def order(header: Mapping[str, Any]) -> Order:
    kind = protocol.field(header, "order", str)
    if kind not in _ORDERS:
        raise ProtocolError(f"expected an order that is one of {', '.join(_ORDERS)}, got {kind!r}")
    values = protocol.field(header, "values", dict)
    return Order(
        version=protocol.count(header, "version"),
        kind=_ORDERS[kind],
        epoch=protocol.count(header, "epoch"),
        num_steps=protocol.count(header, "num_steps"),
        num_workers=protocol.count(header, "num_workers"),
        values={name: protocol.field(values, name, float) for name in values},
    )


def pull_header(holds: int | None, asked: Asked, epoch: int | None = None) -> dict[str, object]:
    header: dict[str, object] = {} if holds is None else {"version": holds}
    if asked is not Asked.NEXT:
        header["asked"] = asked.value
    if epoch is not None:
        header["epoch"] = epoch
    return header


def push_header(push: Push) -> dict[str, object]:
    encoded = {"encoded": push.encoded_bytes} if push.encoded_bytes else {}
    return {
        **encoded,
        "sequence": push.sequence,
        "epoch": push.cursor.epoch,
        "batch": push.cursor.batch,
        "num_steps": push.num_steps,
        "num_samples": push.num_samples,
        "version": push.version,
        "sums": dict(push.sums),
        "progress": push.progress,
    }
