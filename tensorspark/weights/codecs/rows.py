"""Codec that sends the rows of a tensor that are not zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorspark.weights.blocks import BLOCK_BYTES
from tensorspark.weights.codecs.base import Codec, Scratch, head_bytes, zero_gaps
from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer, WeightLayout

_WHOLE = 2**32 - 1  # entry of a tensor that is sent as it is
_INDEX_BYTES = 4
_NUM_SAMPLED = 256

Indices = NDArray[np.uint32]


@dataclass(frozen=True)
class _Part:
    """A piece of the buffer: a tensor of rows and the gap behind it, or (no rows) what lies between two of those."""

    start: int
    stop: int
    num_rows: int = 0
    row_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def rows(self, buffer: Buffer) -> NDArray[np.uint8]:
        """`[num_rows, row_bytes]`, a view."""
        return buffer[self.start : self.start + self.num_rows * self.row_bytes].reshape(self.num_rows, self.row_bytes)

    def encoded_bytes(self, num_sent: int) -> int:
        return num_sent * (_INDEX_BYTES + self.row_bytes)

    def takes(self, num_sent: int) -> bool:
        """Whether it pays to send so many rows, and there are as many."""
        return num_sent <= self.num_rows and self.encoded_bytes(num_sent) < self.num_bytes

    @property
    def rows_at_once(self) -> int:
        return max(1, BLOCK_BYTES // self.row_bytes)


class RowCodec(Codec):
    """Rows of embedding-like tensors that changed; all else as it is. For changes of weights: other rows are zero.

    Which tensors are embedding-like, `TensorSpec.is_table` says; their dtype may be any. A
    step changes the rows of the words in its batch, and no others. Lossless, bit for bit: a row that is left out has
    zero bits only. Of a tensor, 256 rows are looked at first: if so many of them changed that sending all is shorter,
    it is sent whole.
    """

    spec = "rows"
    mark = b"row\x01"
    is_lossy = False
    is_sparse = True

    def encode(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        self.require_buffers(layout, values, out)
        parts = list(_parts(layout))
        changed = {part: indices for part in parts if (indices := _changed_rows(part, values)) is not None}
        entries = [len(changed[part]) if part in changed else _WHOLE for part in parts if part.num_rows]
        position = head_bytes(len(entries))
        num_bytes = position + sum(
            part.encoded_bytes(len(changed[part])) if part in changed else part.num_bytes for part in parts
        )
        if num_bytes >= layout.num_bytes:
            return 0
        self.write_head(out, entries)
        for part in parts:
            indices = changed.get(part)
            if indices is None:
                size = part.num_bytes
                np.copyto(out[position : position + size], values[part.start : part.stop])
            else:
                size = part.encoded_bytes(len(indices))
                _write_rows(part, indices, values, out[position : position + size])
            position += size
        return position

    def encode_keeping_error(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        num_bytes = self.encode(layout, values, out)
        if num_bytes:
            values[...] = 0
        return num_bytes

    def decode(self, layout: WeightLayout, buffer: Buffer, num_bytes: int) -> None:
        parts = list(_parts(layout))
        num_entries = sum(part.num_rows > 0 for part in parts)
        entries = self.read_head(layout, buffer, num_bytes, num_entries).tolist()
        remaining = iter(entries)
        sent = [next(remaining) if part.num_rows else _WHOLE for part in parts]
        for part, num_sent in zip(parts, sent, strict=True):
            if num_sent != _WHOLE and not part.takes(num_sent):
                raise self.broken(f"{num_sent} rows of a tensor that has {part.num_rows} of {part.row_bytes} bytes")
        sizes = [
            part.num_bytes if num_sent == _WHOLE else part.encoded_bytes(num_sent)
            for part, num_sent in zip(parts, sent, strict=True)
        ]
        if sum(sizes) != num_bytes - head_bytes(num_entries):
            raise self.broken(f"sections of {sum(sizes)} bytes in all, of {num_bytes}")
        position = layout.num_bytes - sum(sizes)
        scratch = Scratch()
        for part, num_sent, size in zip(parts, sent, sizes, strict=True):
            if num_sent == _WHOLE:
                _move(buffer, position, part.start, size, scratch)
            else:
                self._read_rows(part, num_sent, buffer, position, scratch)
            position += size
        zero_gaps(layout, buffer)

    def _read_rows(self, part: _Part, num_sent: int, buffer: Buffer, position: int, scratch: Scratch) -> None:
        """Decodes a tensor's section, at `position`, in place.

        Nothing unread is overwritten. With j rows read, the part is written up to row r, the index of the first unread
        one (or to its end, if none is). The num_sent - j unread rows have as many different indices from r on, so they
        are no longer than the part is from row r on. Behind them are the sections of the parts to come, which are no
        longer than those parts, and the buffer's end. So they begin at or behind the place of row r.
        """
        data = position + num_sent * _INDEX_BYTES
        indices = np.frombuffer(buffer[position:data].tobytes(), "<u4")
        if num_sent and (indices[-1] >= part.num_rows or not (indices[1:] > indices[:-1]).all()):
            raise self.broken(f"indices of rows that do not ascend, or reach {part.num_rows}")
        rows = part.rows(buffer)
        written = 0
        for first in range(0, num_sent, part.rows_at_once):
            chosen = indices[first : first + part.rows_at_once]
            begin, num_bytes = data + first * part.row_bytes, len(chosen) * part.row_bytes
            read = scratch.copy("rows", buffer[begin : begin + num_bytes]).reshape(len(chosen), part.row_bytes)
            following = first + len(chosen)
            until = int(indices[following]) if following < num_sent else part.num_rows
            rows[written:until] = 0
            rows[chosen] = read
            written = until
        rows[written:] = 0


def _parts(layout: WeightLayout) -> Iterator[_Part]:
    """The whole buffer, in order; what lies between two tensors of rows is one part."""
    done = 0
    for spec in sorted(layout.specs, key=lambda spec: layout.offsets[spec.name]):
        if not spec.is_table:
            continue
        start = layout.offsets[spec.name]
        if start > done:
            yield _Part(done, start)
        done = start + -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        yield _Part(start, done, spec.shape[0], spec.num_bytes // spec.shape[0])
    if layout.num_bytes > done:
        yield _Part(done, layout.num_bytes)


def _changed_rows(part: _Part, values: Buffer) -> Indices | None:
    """Ascending indices of the rows with a bit that is not zero; None: there are none such rows, or it does not pay."""
    if not part.num_rows:
        return None
    word = next(size for size in (8, 4, 2, 1) if part.row_bytes % size == 0)
    rows = part.rows(values).view(f"u{word}")
    sample = rows[:: max(1, part.num_rows // _NUM_SAMPLED)]
    num_likely = int(np.count_nonzero(_is_changed(sample))) * part.num_rows // len(sample)
    if not part.takes(num_likely):
        return None
    found = [
        first + np.flatnonzero(_is_changed(rows[first : first + part.rows_at_once])).astype(np.uint32)
        for first in range(0, part.num_rows, part.rows_at_once)
    ]
    indices = np.concatenate(found)
    return indices if part.takes(len(indices)) else None


def _is_changed(rows: NDArray[Any]) -> NDArray[np.bool_]:
    changed: NDArray[np.bool_] = np.bitwise_or.reduce(rows, axis=1) != 0
    return changed


def _write_rows(part: _Part, indices: Indices, values: Buffer, out: Buffer) -> None:
    num_index_bytes = indices.size * _INDEX_BYTES
    out[:num_index_bytes].view("<u4")[...] = indices
    rows, sent = part.rows(values), out[num_index_bytes:].reshape(len(indices), part.row_bytes)
    for first in range(0, len(indices), part.rows_at_once):
        some = slice(first, first + part.rows_at_once)
        np.take(rows, indices[some], axis=0, out=sent[some], mode="clip")  # mode: with "raise", it makes a copy first


def _move(buffer: Buffer, source: int, target: int, num_bytes: int, scratch: Scratch) -> None:
    """Moves bytes to the front, or not at all."""
    for start in range(0, num_bytes if target < source else 0, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, num_bytes)
        buffer[target + start : target + stop] = scratch.copy("moved", buffer[source + start : source + stop])
