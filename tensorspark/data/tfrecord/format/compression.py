"""Compressed TFRecord files: gzip and zlib, written and read as streams in bounded memory."""

from __future__ import annotations

import zlib
from typing import IO, Literal, Protocol

import numpy as np

from tensorspark.data.tfrecord.format.ragged import Bytes
from tensorspark.errors import ConfigError

Codec = Literal["gzip", "zlib"]

COMPRESSION_LEVEL = 1
_WINDOW_BITS: dict[str, int] = {"gzip": 31, "zlib": 15}
_READ_BYTES = 2**18


def check_codec(codec: str | None) -> None:
    """Raises ConfigError for a codec that there is not; None is none."""
    if codec is not None and codec not in _WINDOW_BITS:
        raise ConfigError(f"codec: expected none, gzip or zlib, got {codec!r}")


class DamageError(Exception):
    """What is wrong with a file, and where."""


REMEDY = "write it again, or set ignoreCorruptFiles to skip the rest of it"
"""What can be done about a damaged file."""


class Sink(Protocol):
    """What compressed bytes are written to: a file, of which no more is needed."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Takes all of `data`."""


class Writer(Protocol):
    """What records are written to."""

    def write(self, data: bytes | memoryview) -> object:
        """Takes the next bytes of the file."""

    def close(self) -> None:
        """Writes what is left. The file beneath stays open."""


def open_writer(file: Sink, codec: Codec | None, level: int = COMPRESSION_LEVEL) -> Writer:
    """What compresses by `codec` into `file`, or passes on as it is.

    Raises:
        ConfigError: a codec or level that there is not.
    """
    return _Passed(file) if codec is None else CompressingWriter(file, codec, level)


class CompressingWriter:
    """Writes to a file what it is given, compressed; `close()` writes the end and leaves the file open.

    Args:
        level: zlib's, 1 (fast, our default: floats hardly get smaller by a higher one) to 9.
    """

    def __init__(self, file: Sink, codec: Codec, level: int = COMPRESSION_LEVEL) -> None:
        check_codec(codec)
        if level not in range(10):
            raise ConfigError(f"compression level: expected 0 to 9, got {level!r}")
        self._file = file
        self._deflater = zlib.compressobj(level, zlib.DEFLATED, _WINDOW_BITS[codec], zlib.DEF_MEM_LEVEL)

    def write(self, data: bytes | memoryview) -> None:
        """Compresses `data`, and writes what comes of it."""
        if compressed := self._deflater.compress(data):
            self._file.write(compressed)

    def close(self) -> None:
        """Writes the stream's end; without it the file is truncated."""
        self._file.write(self._deflater.flush())


class _Passed:
    def __init__(self, file: Sink) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def close(self) -> None:
        """Nothing is held back."""


class Source(Protocol):
    """What records are read from.

    Attributes:
        damage: what is wrong behind the bytes that `fill` gave; no more come.
    """

    damage: DamageError | None

    def fill(self, into: Bytes) -> int:
        """Reads until `into` is full or the file ends; how many bytes came."""


class Plain:
    """A file as it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.damage: DamageError | None = None

    def fill(self, into: Bytes) -> int:
        """Reads until `into` is full or the file ends; how many bytes came."""
        done = 0
        while done < len(into):
            chunk = self._file.read(len(into) - done)
            if not chunk:
                break
            into[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        return done


class Inflated:
    """The members of a compressed file, one after another: Hadoop and `cat` make files of several."""

    def __init__(self, file: IO[bytes], codec: Codec) -> None:
        check_codec(codec)
        self._file, self._codec = file, codec
        self._inflater = zlib.decompressobj(_WINDOW_BITS[codec])
        self._pending = b""
        self._has_begun = False
        self._num_out = 0
        self.damage: DamageError | None = None

    def fill(self, into: Bytes) -> int:
        """Reads until `into` is full, the file ends or damage shows; how many bytes came."""
        done = 0
        while done < len(into) and self.damage is None:
            chunk = self._inflate(len(into) - done)
            if not chunk and not self._pending and not self._read():
                break
            into[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
            self._num_out += len(chunk)
        return done

    def _read(self) -> bool:
        """Reads more of the file; false at its end, which must not be within a stream."""
        self._pending = self._file.read(_READ_BYTES)
        if not self._pending and self._has_begun and not self._inflater.eof:
            self.damage = DamageError(
                f"expected the end of the {self._codec} stream, got the file's end after {self._num_out} uncompressed "
                f"bytes; the file is truncated: {REMEDY}"
            )
        return bool(self._pending)

    def _inflate(self, max_bytes: int) -> bytes:
        """What comes of the pending bytes; where the inflater still holds output, it needs none."""
        if self._inflater.eof:
            if self._codec == "gzip":  # members may be padded, to the blocks of a tape
                self._pending = self._pending.lstrip(b"\0")
            if not self._pending:
                return b""
            self._inflater = zlib.decompressobj(_WINDOW_BITS[self._codec])
        self._has_begun |= bool(self._pending)
        before = self._inflater.copy()
        try:
            chunk = self._inflater.decompress(self._pending, max_bytes)
        except zlib.error as error:
            chunk = _before_damage(before, self._pending)
            self.damage = DamageError(
                f"expected {self._codec} data, got other bytes after {self._num_out + len(chunk)} uncompressed ones "
                f"({error}); the file is damaged, or not of the codec that its name (or the option codec) says: rename "
                f"it, set codec, {REMEDY}"
            )
            return chunk
        self._pending = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        return chunk


def _before_damage(inflater: zlib._Decompress, compressed: bytes) -> bytes:
    """What the bytes before the wrong one give, found by halves: zlib drops all output of the call that raises."""
    found: list[bytes] = []
    while len(compressed) > 1:
        middle = len(compressed) // 2
        trial = inflater.copy()
        try:
            found.append(trial.decompress(compressed[:middle]))
        except zlib.error:
            compressed = compressed[:middle]
        else:
            inflater, compressed = trial, compressed[middle:]
    return b"".join(found)
