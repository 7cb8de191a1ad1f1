"""The headers of frames: made of messages, and read into messages, every field checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorspark.errors import ProtocolError
from tensorspark.ps import protocol
from tensorspark.ps.messages import Asked, Cursor, Grant, Order, OrderKind, Push, Registration, TimeSpent

if TYPE_CHECKING:  # workers need no Tornado
    from tensorspark.ps.connection import Frame

# Of the steps or rows in one report: what is added up of them goes out as 63 bits, however many report.
COUNT_BITS = 40
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
        progress=None if header.get("progress") is None else protocol.field(header, "progress", float),
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


def granted_header(grant: Grant) -> dict[str, object]:
    return {
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
