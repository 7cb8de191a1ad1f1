"""A worker's side of payloads: what it makes of a snapshot that comes, and of weights that are to go."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tensorspark.errors import ProtocolError
from tensorspark.ps.snapshots import Form
from tensorspark.weights.blocks import add_scaled
from tensorspark.weights.changes import Units
from tensorspark.weights.compression import Compression
from tensorspark.weights.layout import Buffer, WeightLayout


class Source(Protocol):
    """Where a payload's bytes come from: a `ps.link.Link`."""

    def fill(self, payload: Buffer) -> None: ...


class Intake:
    """Makes weights of the payloads of snapshots.

    Args:
        layout: None where they come whole and raw alone.
    """

    def __init__(self, layout: WeightLayout | None, compression: Compression) -> None:
        self._layout = layout
        self._codec = compression.pull_codec
        self._by_row = compression.pulls_rows
        self._units: Units | None = None

    def receive(self, source: Source, form: str, num_bytes: int, out: Buffer, held: int | None) -> None:
        """Receives a payload of so many bytes and has `out` hold the weights that it stands for.

        Args:
            held: the version that `out` holds; None where it holds none.

        Raises:
            ProtocolError: it is none that can come here; `out` may be torn.
        """
        if form == Form.WHOLE.value and num_bytes == out.nbytes:
            source.fill(out)
        elif form == Form.SAME.value and not num_bytes and held is not None:
            pass
        elif form == Form.ENCODED.value and num_bytes and self._codec is not None and self._layout is not None:
            source.fill(out[out.nbytes - num_bytes :])
            self._codec.decode(self._layout, out, num_bytes)
        elif form == Form.PATCH.value and held is not None and self._layout is not None:
            if self._units is None:
                self._units = Units(self._layout, by_row=self._by_row)
            self._units.receive(source.fill, num_bytes, out)
        else:
            raise ProtocolError(f"expected a snapshot of {out.nbytes} bytes, got {num_bytes} bytes ({form[:40]!r})")


class Outlet:
    """Encodes pushes, and keeps what a lossy codec leaves out for the pushes to come: *error feedback* (Seide et al.,
    "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", 2014;
    Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory", 2018). With `Compression.leaves_error` it leaves that in
    the values, and whoever pushes adds the next change to them: that spares a buffer.

    Args:
        layout: None where pushes go raw.
    """

    def __init__(self, layout: WeightLayout | None, compression: Compression) -> None:
        self._codec = None if layout is None else compression.push_codec
        self._leaves_error = compression.leaves_error
        self._layout = layout
        self._error: Buffer | None = None
        self._encoded: Buffer | None = None

    @property
    def is_encoding(self) -> bool:
        return self._codec is not None

    def encode(self, values: Buffer) -> tuple[Buffer, int]:
        """What is to be sent for `values`, which are written over where the codec is lossy.

        Returns:
            The payload, which stays as it is until the next call, and its length where it is encoded; 0 where it is
            raw: `values`, or a copy of them where they hold the error.
        """
        if self._codec is None or self._layout is None:
            return values, 0
        if self._encoded is None:
            self._encoded = np.empty(
                self._codec.capacity(self._layout), np.uint8
            )  # pages that are not used cost nothing
        if not self._codec.is_lossy:
            num_bytes = self._codec.encode(self._layout, values, self._encoded)
        elif self._leaves_error:
            return self._encode_leaving_error(values, self._encoded)
        else:
            num_bytes = self._encode_with_error(values, self._encoded)
        return (self._encoded[:num_bytes], num_bytes) if num_bytes else (values, 0)

    def _encode_leaving_error(self, values: Buffer, out: Buffer) -> tuple[Buffer, int]:
        assert self._codec is not None
        assert self._layout is not None
        num_bytes = self._codec.encode_keeping_error(self._layout, values, out)
        if num_bytes:
            return out[:num_bytes], num_bytes
        whole = out[: values.nbytes]
        whole[:] = values
        values[:] = 0  # all of it is sent, and no error is left
        return whole, 0

    def _encode_with_error(self, values: Buffer, out: Buffer) -> int:
        assert self._codec is not None
        assert self._layout is not None
        if self._error is None:
            self._error = self._layout.allocate()
        add_scaled(self._layout, values, self._error, 1.0)
        num_bytes = self._codec.encode_keeping_error(self._layout, self._error, out)
        if not num_bytes:  # all of it is sent, and no error is left
            values[:] = self._error
            self._error[:] = 0
        return num_bytes
