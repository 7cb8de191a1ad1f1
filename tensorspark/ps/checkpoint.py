"""Checkpoints of a run: what they hold, and how they are written as files.

A checkpoint is two or three files of one stem:

| file | content |
|---|---|
| ``<stem>.safetensors`` | the weights, by tensor name |
| ``<stem>.combiner.safetensors`` | the combiner's slots, as ``<slot>/<tensor>``; only where it has any |
| ``<stem>.msgpack`` | the *mark*: all the rest, and the others' lengths and SHA-256; without it, no checkpoint |

The mark is two msgpack values: a map (`_Mark`, by field name), and as 32 bytes the SHA-256 of all that comes before.
A field that came later has a default, so that older marks of the same format version can still be read.

The safetensors files are ordinary ones. A dtype that the format lacks (complex128, float128, int4, ...) or that is not
little-endian is stored as bytes: ``U8`` of the tensor's shape and one more dimension, the bytes of one number. The
header's ``__metadata__`` then gives its numpy dtype under the tensor's key: ``array.view(metadata[key])[..., 0]`` is
the tensor.

Files are written from the checkpoint's own buffers and read straight into new ones, so neither copies the weights
once more. Nothing is unpickled; sizes are compared with the files' own before memory is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import msgpack
import numpy as np

from tensorspark.errors import CheckpointError
from tensorspark.history import RecorderState
from tensorspark.plain import WrongValueError, as_plain, build
from tensorspark.ps.messages import EpochProgress, PartitionProgress
from tensorspark.weights.combiners import CombinerState
from tensorspark.weights.layout import Buffer, TensorSpec, WeightLayout

Plain = int | float | str | bool | None

MARK = ".msgpack"
WEIGHTS = ".safetensors"
SLOTS = ".combiner.safetensors"

_FORMAT = "tensorspark-checkpoint"
_FORMAT_VERSION = 1
_DIGEST_PREFIX = b"\xc4\x20"  # msgpack: 32 bytes follow
_MAX_MARK_BYTES = 2**30
_MAX_BIG_INTEGER_BYTES = 2**10
_BIG_INTEGER = 1  # msgpack extension: two's complement, big-endian; for what 64 bits do not hold
_CHUNK_BYTES = 2**22

_SAFETENSORS_DTYPES = {
    "bfloat16": "BF16",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class CheckpointPart:
    """Where a shard stood, if it may have stood elsewhere than the others.

    Attributes:
        stop: where its range of the weights ends, in bytes.
    """

    stop: int
    version: int
    partitions: tuple[PartitionProgress, ...]


@dataclass(frozen=True)
class RunCheckpoint:
    """A run at one moment: exactly those pushes are in `weights` that the partitions' cursors stand for.

    Attributes:
        version: of the weights.
        seconds: since the run began, those before a restore included.
        points: the run's course so far, as its recorder exports it.
        plan: what must stay the same for the run to be continued (seed, batch size, ...), by name.
        combiner: class name of the combiner.
        is_complete: whether every partition was trained to its end.
        epochs: where a run with an `EpochPlan` stood.
        parts: of weights in several shards that are not bulk-synchronous: the cursors are each shard's own.
    """

    layout: WeightLayout
    weights: Buffer
    version: int
    seconds: float
    partitions: tuple[PartitionProgress, ...]
    points: RecorderState
    plan: Mapping[str, Plain]
    combiner: str
    combiner_settings: Mapping[str, Plain]
    combiner_state: CombinerState
    is_complete: bool
    epochs: EpochProgress | None = None
    parts: tuple[CheckpointPart, ...] = ()

    def without_parts(self) -> RunCheckpoint:
        """For other shards, or none: each partition begins at the earliest of its cursors, so that nothing is left out.
        What some shards have beyond it is trained once more."""
        if not self.parts:
            return self
        earliest = [
            min(progresses, key=lambda progress: progress.sequence)
            for progresses in zip(*(part.partitions for part in self.parts), strict=True)
        ]
        partitions = [
            replace(own, sequence=first.sequence, cursor=first.cursor, round=first.round)
            for own, first in zip(self.partitions, earliest, strict=True)
        ]
        return replace(self, partitions=tuple(partitions), parts=())


@dataclass(frozen=True)
class EncodedFile:
    """A file's content in pieces; those that hold weights are the checkpoint's own memory."""

    parts: tuple[bytes | memoryview, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(part) for part in self.parts)

    @cached_property
    def sha256(self) -> bytes:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        return digest.digest()


class ReadableFile(Protocol):
    """What `decode` asks of an open file."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> Any: ...
    def tell(self) -> int: ...


@dataclass(frozen=True)
class _FileInfo:
    num_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class _Mark:
    """The mark's map. `files` is by ending, `tensors` are the layout's in its order."""

    format: str
    format_version: int
    files: Mapping[str, _FileInfo]
    tensors: tuple[TensorSpec, ...]
    version: int
    seconds: float
    partitions: tuple[PartitionProgress, ...]
    points: RecorderState
    plan: Mapping[str, Plain]
    combiner: str
    combiner_settings: Mapping[str, Plain]
    combiner_slots: tuple[str, ...]
    combiner_values: Mapping[str, int | float | str | bool]
    is_complete: bool
    epochs: EpochProgress | None = None
    parts: tuple[CheckpointPart, ...] = ()


_RUN_FIELDS = (
    *("version", "seconds", "partitions", "points", "plan", "combiner", "combiner_settings", "is_complete"),
    *("epochs", "parts"),
)


def encode(checkpoint: RunCheckpoint) -> dict[str, EncodedFile]:
    """The checkpoint's files by ending, in the order in which they are to be written: the mark is the last.

    The weights are read once for their digest, not copied: they must not change before the files are written.

    Raises:
        CheckpointError: it holds something that could not be read again, such as a plan's value that is a list.
        ValueError: a buffer that has not the layout's length.
    """
    layout, state = checkpoint.layout, checkpoint.combiner_state
    files = {WEIGHTS: _encode_tensors(layout, {"": checkpoint.weights})}
    if state.slots:
        files[SLOTS] = _encode_tensors(layout, _by_prefix(state.slots))
    mark = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "files": {ending: {"num_bytes": file.num_bytes, "sha256": file.sha256} for ending, file in files.items()},
        "tensors": as_plain(layout.specs),
        "combiner_slots": list(state.slots),
        "combiner_values": as_plain(state.values),
        **{name: as_plain(getattr(checkpoint, name)) for name in _RUN_FIELDS},
    }
    try:
        build(_Mark, mark, "the checkpoint")  # what is written can be read
        packed: bytes = msgpack.packb(mark, default=_pack_other)
    except (WrongValueError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"expected a checkpoint of plain values, but {error}") from error
    return {**files, MARK: EncodedFile((packed, _DIGEST_PREFIX + hashlib.sha256(packed).digest()))}


def decode(stem: str, open_file: Callable[[str], ReadableFile]) -> RunCheckpoint:
    """Reads the checkpoint whose files are `stem` and an ending.

    Args:
        open_file: opens a file by name for reading; raises FileNotFoundError where it is absent. Closing is its own.

    Raises:
        CheckpointError: a file is absent, torn, damaged, no checkpoint's or of another format version; says which.
        OSError: what `open_file` and reading raise else.
    """
    mark = _read_mark(f"{stem}{MARK}", _open(open_file, f"{stem}{MARK}"))
    try:
        layout = WeightLayout(mark.tensors)
        slots = dict.fromkeys(_by_prefix(dict.fromkeys(mark.combiner_slots, "")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{stem}{MARK}: {error}") from error
    expected = {WEIGHTS, SLOTS} if slots else {WEIGHTS}
    if set(mark.files) != expected:
        raise CheckpointError(f"{stem}{MARK}: expected it to name {sorted(expected)}, got {sorted(mark.files)}")
    buffers: dict[str, Buffer] = {}
    for ending, prefixes in ((WEIGHTS, [""]), (SLOTS, list(slots))):
        if prefixes:
            name = f"{stem}{ending}"
            buffers |= _decode_tensors(name, _open(open_file, name), mark.files[ending], layout, prefixes)
    return RunCheckpoint(
        layout=layout,
        weights=buffers.pop(""),
        combiner_state=CombinerState(
            {prefix[:-1]: buffer for prefix, buffer in buffers.items()}, dict(mark.combiner_values)
        ),
        **{name: getattr(mark, name) for name in _RUN_FIELDS},
    )


def _open(open_file: Callable[[str], ReadableFile], name: str) -> ReadableFile:
    try:
        return open_file(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}: expected a file, but it is gone") from error


# The mark


def _read_mark(name: str, file: ReadableFile) -> _Mark:
    num_bytes = _size(file)
    if num_bytes > _MAX_MARK_BYTES:
        raise CheckpointError(f"{name}: expected at most {_MAX_MARK_BYTES} bytes, got {num_bytes}")
    data = bytearray(num_bytes)
    _read_into(file, memoryview(data), hashlib.sha256(), name)
    body, tail = memoryview(data)[:-34], data[-34:]
    if tail != _DIGEST_PREFIX + hashlib.sha256(body).digest():
        raise CheckpointError(f"{name}: torn or damaged: it does not end with the SHA-256 of what comes before")
    try:
        value = msgpack.unpackb(body, ext_hook=_unpack_other)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: damaged: {error or type(error).__name__}") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise CheckpointError(f"{name}: expected the mark of a tensorspark checkpoint, got another file")
    if value.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: expected format version {_FORMAT_VERSION}, got {value.get('format_version')!r}: restore it with "
            f"the version of tensorspark that wrote it"
        )
    try:
        mark: _Mark = build(_Mark, value, name)
    except WrongValueError as error:
        raise CheckpointError(f"{name}: damaged: {error}") from error
    return mark


def _pack_other(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() < 8 * _MAX_BIG_INTEGER_BYTES:
        return msgpack.ExtType(_BIG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    raise TypeError(f"a {type(value).__name__} of this kind or size cannot be written")


def _unpack_other(code: int, data: bytes) -> Any:
    if code != _BIG_INTEGER or len(data) > _MAX_BIG_INTEGER_BYTES:
        raise ValueError(f"unknown extension {code} of {len(data)} bytes")
    return int.from_bytes(data, "big", signed=True)


# The safetensors files


def _by_prefix(slots: Mapping[str, Any]) -> dict[str, Any]:
    """Slots by what stands before a tensor's name in their file."""
    wrong = [name for name in slots if not re.fullmatch(r"[^/]+", name)]
    if wrong:
        raise CheckpointError(f"a combiner's slot must have a name without '/', got {wrong[0]!r}")
    return {f"{name}/": slot for name, slot in slots.items()}


def _encode_tensors(layout: WeightLayout, buffers: Mapping[str, Buffer]) -> EncodedFile:
    for prefix, buffer in buffers.items():
        if buffer.dtype != np.uint8 or buffer.shape != (layout.num_bytes,):
            found = f"{list(buffer.shape)} {buffer.dtype}"
            raise ValueError(f"expected [{layout.num_bytes}] uint8 for {prefix or 'the weights'}, got {found}")
    header, order = _header(layout, list(buffers))
    views = (buffers[prefix][_place(layout, spec)].data for prefix, spec in order)
    return EncodedFile((header, *views))


def _decode_tensors(
    name: str, file: ReadableFile, info: _FileInfo, layout: WeightLayout, prefixes: list[str]
) -> dict[str, Buffer]:
    num_bytes = _size(file)
    if num_bytes != info.num_bytes:
        raise CheckpointError(f"{name}: torn: expected {info.num_bytes} bytes, got {num_bytes}")
    header, order = _header(layout, prefixes)
    needed = len(header) + sum(spec.num_bytes for _, spec in order)
    if needed != num_bytes:
        raise CheckpointError(f"{name}: expected {needed} bytes for the tensors that the mark names, got {num_bytes}")
    digest = hashlib.sha256()
    found = bytearray(len(header))
    _read_into(file, memoryview(found), digest, name)
    buffers = {prefix: layout.allocate() for prefix in prefixes}
    for prefix, spec in order:
        _read_into(file, buffers[prefix][_place(layout, spec)].data, digest, name)
    if digest.digest() != info.sha256 or found != header:
        raise CheckpointError(f"{name}: damaged: its SHA-256 is not the one that the mark names")
    return buffers


def _header(layout: WeightLayout, prefixes: list[str]) -> tuple[bytes, list[tuple[str, TensorSpec]]]:
    """The file's beginning, and whose tensors follow. They follow by falling alignment, so that all can be mapped."""
    specs = sorted(layout.specs, key=lambda spec: -_stored(spec)[2])
    order = [(prefix, spec) for spec in specs for prefix in prefixes]
    offset = 0
    table: dict[str, Any] = {"__metadata__": {}}
    for prefix, spec in order:
        key, (dtype, shape, _) = f"{prefix}{spec.name}", _stored(spec)
        if key == "__metadata__":
            raise CheckpointError("a tensor must not be named '__metadata__': safetensors keeps that for itself")
        if shape != list(spec.shape):
            table["__metadata__"][key] = spec.dtype
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _stored(spec: TensorSpec) -> tuple[str, list[int], int]:
    """Dtype and shape of a tensor in its file, and the alignment of its numbers there."""
    dtype = np.dtype(spec.dtype)
    little = dtype.newbyteorder("<") == dtype
    if little and dtype.name in _SAFETENSORS_DTYPES:
        return _SAFETENSORS_DTYPES[dtype.name], list(spec.shape), dtype.itemsize
    return "U8", [*spec.shape, dtype.itemsize], 1


def _place(layout: WeightLayout, spec: TensorSpec) -> slice:
    return slice(layout.offsets[spec.name], layout.offsets[spec.name] + spec.num_bytes)


def _size(file: ReadableFile) -> int:
    file.seek(0, io.SEEK_END)
    num_bytes = file.tell()
    file.seek(0)
    return num_bytes


def _read_into(file: ReadableFile, target: memoryview, digest: Any, name: str) -> None:
    """Fills `target` with what comes next; by reading chunks, as not every filesystem's files know `readinto`."""
    filled = 0
    while filled < len(target):
        chunk = file.read(min(_CHUNK_BYTES, len(target) - filled))
        if not chunk:
            raise CheckpointError(f"{name}: torn: it ends {len(target) - filled} bytes too early")
        target[filled : filled + len(chunk)] = chunk
        digest.update(chunk)
        filled += len(chunk)
