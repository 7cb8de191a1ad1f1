"""The framing of TFRecord files: payloads with their lengths and checksums, read and written in bulk.

A record on disk is its length (uint64, little-endian), the masked CRC32C of those eight bytes (uint32), the payload,
and the payload's masked CRC32C (uint32). A whole file may be compressed, by gzip or zlib.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Literal

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format.compression import (
    REMEDY,
    Codec,
    DamageError,
    Inflated,
    Plain,
    Source,
    check_codec,
    open_writer,
)
from tensorspark.data.tfrecord.format.ragged import SLACK_BYTES, Bytes, Ints, Ragged, interleave
from tensorspark.errors import ConfigError, FeedError

__all__ = [
    "BATCH_BYTES",
    "MAX_RECORD_BYTES",
    "Codec",
    "Records",
    "frame",
    "framed",
    "masked_crc32c",
    "open_writer",
    "read_records",
]

HEADER_BYTES, TRAILER_BYTES = 12, 4
MAX_RECORD_BYTES = 2**30
BATCH_BYTES = 2**22
MAX_BATCH_RECORDS = 2**16

_MASK_DELTA = 0xA282EAD8
_MAGIC = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x5e": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}
_LENGTH = struct.Struct("<Q")
# Headers are looked for at equal distances, so many at once where it has gone well, and one by one where it has not.
_MIN_RUN, _FIRST_RUN, _ONE_BY_ONE = 4, 64, 256


@dataclass(frozen=True)
class Records:
    """The payloads of some records, lying in one buffer.

    Attributes:
        data: where they lie. What lies between them is not theirs.
        offsets: `[n]` int64, where each payload begins in `data`.
        lengths: `[n]` int64, how many bytes each has.
        name: the file that they are from, for errors; empty where they are from none.
        first_index: of the first of them among the file's records, for errors.
    """

    data: bytes | bytearray | memoryview | NDArray[np.uint8]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    name: str = ""
    first_index: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, payloads: list[bytes], name: str = "") -> Records:
        """Of payloads that lie apart."""
        lengths = np.array([len(payload) for payload in payloads], np.int64)
        return cls(b"".join([*payloads, bytes(SLACK_BYTES)]), np.cumsum(lengths) - lengths, lengths, name)

    def ragged(self, *, has_slack: bool = True) -> Ragged:
        """The payloads as rows of bytes; with slack after the last, unless that is not wanted."""
        data = np.frombuffer(self.data, np.uint8)
        starts, lengths = self.offsets.astype(np.int64), self.lengths.astype(np.int64)
        if has_slack and len(self) and int((starts + lengths).max()) + SLACK_BYTES > len(data):
            data = np.concatenate([data, np.zeros(SLACK_BYTES, np.uint8)])
        return Ragged(data, starts, lengths)

    def payloads(self) -> Iterator[memoryview]:
        """One by one, each a view."""
        view = np.frombuffer(self.data, np.uint8).data
        for start, length in zip(self.offsets.tolist(), self.lengths.tolist(), strict=True):
            yield view[start : start + length]


def read_records(
    file: IO[bytes],
    *,
    name: str,
    codec: Codec | None = None,
    verifies: bool = True,
    max_record_bytes: int = MAX_RECORD_BYTES,
    batch_bytes: int = BATCH_BYTES,
    max_batch_records: int = MAX_BATCH_RECORDS,
    on_corrupt: Literal["raise", "skip"] = "raise",
    counter: Callable[[FeedError], None] | None = None,
) -> Iterator[Records]:
    """The records of a file, in batches. In memory is one batch, which holds `batch_bytes` and one record at most.

    Args:
        file: open for reading bytes, at its beginning; stays open.
        name: the file's, for errors.
        verifies: whether the checksums are compared.
        max_record_bytes: a record that says to be longer is taken for damaged.
        batch_bytes: of the file, uncompressed, that make a batch. A single larger record makes one too.
        on_corrupt: whether damage raises, or ends the file where it is. Records before it are given either way.
        counter: called once with the error where `on_corrupt` is ``"skip"`` and the file is damaged.

    Raises:
        FeedError: a file that is truncated, has a wrong checksum or a record over the limit, or is not of `codec`.
            Names the file and the offset (in the uncompressed stream).
    """
    check_codec(codec)
    if on_corrupt not in ("raise", "skip"):
        raise ConfigError(f"on_corrupt: expected raise or skip, got {on_corrupt!r}")
    source = Plain(file) if codec is None else Inflated(file, codec)
    scanner = _Scanner(name, verifies, max_record_bytes)
    try:
        for batch in _batches(source, scanner, batch_bytes):
            for first in range(0, len(batch), max_batch_records):
                chosen = slice(first, first + max_batch_records)
                index = batch.first_index + first
                yield Records(batch.data, batch.offsets[chosen], batch.lengths[chosen], name, index)
    except DamageError as damage:
        error = FeedError(f"{name or 'TFRecord file'}: {damage}")
        if on_corrupt == "raise":
            raise error from damage.__cause__
        if counter is not None:
            counter(error)


def frame(records: Records) -> bytes:
    """The records as they stand in a file: lengths, payloads and checksums."""
    return framed(records).tobytes()


def framed(records: Records) -> Bytes:
    """As `frame`, without the copy to `bytes`."""
    if not len(records):
        return np.empty(0, np.uint8)
    payloads = records.ragged(has_slack=False)
    headers = np.empty((len(records), HEADER_BYTES), np.uint8)
    headers[:, :8] = payloads.lengths.astype("<i8").view(np.uint8).reshape(-1, 8)
    headers[:, 8:] = _length_checksums(payloads.lengths).view(np.uint8).reshape(-1, 4)
    trailers = _checksums(payloads).view(np.uint8).reshape(-1, 4)
    return interleave([Ragged.matrix(headers), payloads, Ragged.matrix(trailers)]).data


def masked_crc32c(data: bytes | memoryview) -> int:
    """CRC32C (Castagnoli), rotated right by 15 bits, plus a constant: TFRecord's checksum."""
    checksum: int = crc32c.crc32c(data)
    return ((checksum >> 15 | checksum << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _batches(source: Source, scanner: _Scanner, batch_bytes: int) -> Iterator[Records]:
    """The file's records, as many as lie in a buffer of `batch_bytes`; a larger record has a buffer of its own.

    Raises:
        DamageError: after the records before the damage were given.
    """
    rest = np.empty(0, np.uint8)
    capacity = max(batch_bytes, HEADER_BYTES)
    while True:
        buffer = np.empty(capacity + SLACK_BYTES, np.uint8)
        buffer[: len(rest)] = rest
        size = len(rest) + source.fill(buffer[len(rest) : capacity])
        buffer[size : size + SLACK_BYTES] = 0
        if not size and source.damage is None:
            return
        found = scanner.scan(buffer, size, is_end=size < capacity and source.damage is None)
        damage = found.damage or source.damage
        if len(found.lengths):
            yield Records(buffer, found.offsets, found.lengths, scanner.name, scanner.num_records - len(found.lengths))
        if damage is not None:
            raise damage
        rest = buffer[found.consumed : size]
        if size < capacity:
            return
        capacity = max(batch_bytes, found.needed)


@dataclass
class _Found:
    """Complete records in a buffer, how many bytes of it they take, and how many the record after them has."""

    offsets: Ints
    lengths: Ints
    consumed: int
    needed: int
    damage: DamageError | None


class _Scanner:
    """Finds and verifies records, buffer after buffer; `num_records` of them and `num_bytes` so far."""

    def __init__(self, name: str, verifies: bool, max_record_bytes: int) -> None:
        self.name, self._verifies, self._max_record_bytes = name, verifies, max_record_bytes
        self.num_records, self._num_bytes = 0, 0

    def scan(self, buffer: Bytes, size: int, is_end: bool) -> _Found:
        """The records in the first `size` bytes; where the file ends there, the last must be complete."""
        lengths, position = _record_lengths(buffer, size, self._max_record_bytes)
        starts = np.cumsum(lengths + (HEADER_BYTES + TRAILER_BYTES)) - lengths - TRAILER_BYTES
        num_good, damage = len(lengths), None
        if self._verifies and num_good:
            num_good, damage = self._verify(buffer, starts, lengths)
        needed = 0
        if damage is None and position < size:
            needed, damage = self._look_ahead(buffer, position, size, is_end)
        self.num_records += num_good
        self._num_bytes += position
        return _Found(starts[:num_good], lengths[:num_good], position, needed, damage)

    def _verify(self, buffer: Bytes, starts: Ints, lengths: Ints) -> tuple[int, DamageError | None]:
        """How many records are whole, and what is wrong with the next."""
        stored = np.ndarray((len(buffer) - 3,), np.dtype("<u4"), buffer, 0, (1,))
        bad_length = stored[starts - TRAILER_BYTES] != _length_checksums(lengths)
        num_good = int(bad_length.argmax()) if bad_length.any() else len(lengths)
        sums = _checksums(Ragged(buffer, starts[:num_good], lengths[:num_good]))
        bad_data = stored[starts[:num_good] + lengths[:num_good]] != sums
        if bad_data.any():
            num_good = int(bad_data.argmax())
            return num_good, self._damage(num_good, int(starts[num_good]), "data", "payload")
        if num_good < len(lengths):
            return num_good, self._damage(num_good, int(starts[num_good]), "length", "length")
        return num_good, None

    def _damage(self, index: int, start: int, what: str, of_what: str) -> DamageError:
        offset = self._num_bytes + start - HEADER_BYTES
        return DamageError(
            f"expected record {self.num_records + index} at offset {offset} to have the {what} checksum of its "
            f"{of_what}, got another; the file is damaged: {REMEDY}"
        )

    def _look_ahead(self, buffer: Bytes, position: int, size: int, is_end: bool) -> tuple[int, DamageError | None]:
        """How many bytes the record at `position` has in all, or what is wrong with it."""
        offset, available = self._num_bytes + position, size - position
        if available >= HEADER_BYTES:
            header = buffer[position : position + HEADER_BYTES].tobytes()
            (length,) = _LENGTH.unpack_from(header)
            is_verified = self._verifies and masked_crc32c(header[:8]) == int.from_bytes(header[8:], "little")
            hint = _codec_hint(header) if offset == 0 and not is_verified else ""
            if self._verifies and not is_verified:
                return 0, DamageError(
                    f"expected a record at offset {offset}, got a length that does not have its checksum; the file is "
                    f"damaged, or no TFRecord file{hint}: {REMEDY}"
                )
            if length > self._max_record_bytes:
                doubt = "" if is_verified else f"; or the file is damaged: {REMEDY}"
                return 0, DamageError(
                    f"expected records of at most {self._max_record_bytes} bytes, got one of {length} at offset "
                    f"{offset}{hint}; raise maxRecordBytes, or write smaller ones{doubt}"
                )
            wanted = HEADER_BYTES + length + TRAILER_BYTES
        else:
            wanted, hint = HEADER_BYTES, ""
        if is_end:
            return 0, DamageError(
                f"expected {wanted} bytes for the record at offset {offset}, got {available}{hint}; the file is "
                f"truncated: {REMEDY}"
            )
        return wanted, None


def _codec_hint(header: bytes) -> str:
    codec = next((codec for magic, codec in _MAGIC.items() if header.startswith(magic)), None)
    return f" (it looks like {codec}: set codec)" if codec else ""


def _record_lengths(buffer: Bytes, size: int, max_record_bytes: int) -> tuple[Ints, int]:
    """Lengths of the complete records, and where the last one ends. Stops before one that is over the limit."""
    found: list[Ints] = []
    position, window = 0, _FIRST_RUN
    content = buffer.data
    while size - position >= HEADER_BYTES:
        (length,) = _LENGTH.unpack_from(content, position)
        step = length + HEADER_BYTES + TRAILER_BYTES
        if length > max_record_bytes or step > size - position:
            break
        num_places = min((size - position) // step, window)
        run = np.ndarray((num_places,), np.dtype("<u8"), buffer, position, (step,)) != length
        num_equal = int(run.argmax()) if run.any() else num_places
        found.append(np.full(num_equal, length, np.int64))
        position += num_equal * step
        window = window * 2 if num_equal == num_places else _FIRST_RUN
        if num_equal < _MIN_RUN:
            several, position = _one_by_one(content, position, size, max_record_bytes)
            found.append(several)
    return np.concatenate(found) if found else np.empty(0, np.int64), position


def _one_by_one(content: memoryview, position: int, size: int, max_record_bytes: int) -> tuple[Ints, int]:
    lengths: list[int] = []
    last = size - HEADER_BYTES - TRAILER_BYTES
    unpack = _LENGTH.unpack_from
    while position <= last and len(lengths) < _ONE_BY_ONE:
        (length,) = unpack(content, position)
        if length > max_record_bytes or position + length > last:
            break
        lengths.append(length)
        position += length + HEADER_BYTES + TRAILER_BYTES
    return np.array(lengths, np.int64), position


def _masked(checksums: NDArray[np.uint32]) -> NDArray[np.uint32]:
    rotated = checksums >> np.uint32(15) | checksums << np.uint32(17)
    return rotated + np.uint32(_MASK_DELTA)


def _checksums(rows: Ragged) -> NDArray[np.uint32]:
    """The rows' masked checksums, `[n]`."""
    checksum, content = crc32c.crc32c, rows.data.data
    ends = rows.starts + rows.lengths
    sums = [checksum(content[start:end]) for start, end in zip(rows.starts.tolist(), ends.tolist(), strict=True)]
    return _masked(np.array(sums, np.uint32))


def _length_checksums(lengths: Ints) -> NDArray[np.uint32]:
    """The masked checksums of lengths as they stand in headers, `[n]`: a table for each byte, as CRC is linear."""
    tables, base = _length_tables()
    sums = np.full(len(lengths), base, np.uint32)
    for index in range(8):
        byte = lengths >> (8 * index)
        if not byte.any():
            break
        sums ^= tables[index][byte & 0xFF]
    return _masked(sums)


@functools.cache
def _length_tables() -> tuple[NDArray[np.uint32], int]:
    """`[8, 256]`, what each value of each of the eight bytes changes in the checksum; and that of eight zeros."""
    base: int = crc32c.crc32c(bytes(8))
    changes = [
        [crc32c.crc32c(bytes(index) + bytes([value]) + bytes(7 - index)) ^ base for value in range(256)]
        for index in range(8)
    ]
    return np.array(changes, np.uint32), base
