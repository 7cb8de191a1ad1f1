"""Protobuf's wire format in bulk: many messages at once, walked field by field in step; variable-length integers.

Every step of a walk reads the next field of all the messages that have one more, with a few numpy operations. So its
cost goes with the number of fields in the longest message, not with their order or their layout: records whose features
stand in different orders, with some missing, take the same path as records that are all alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format.ragged import Bytes, Ints, Ragged, byte_mask, with_slack, words

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10

_STOPS = np.uint64(0x8080808080808080)
# Below so many messages, after so many steps, plain Python is faster.
_NARROW, _NARROW_AFTER = 16, 16


class WireError(Exception):
    """Bytes that are no message. Caught where the file's name is known.

    Attributes:
        message: index, among the messages that were walked, of the one that is wrong.
    """

    def __init__(self, message: int, text: str) -> None:
        super().__init__(text)
        self.message = message


@dataclass(frozen=True)
class Fields:
    """The fields of many messages, `[f]` each; those of one message stand in their order, but not side by side.

    Attributes:
        owner: index of the message.
        number: the field's.
        wire_type: `VARINT`, `FIXED64`, `DELIMITED` or `FIXED32`.
        start: where its value begins; a delimited one's, after its length.
        end: where its value ends.
        num_rounds: where every message has this many fields, and those at the same place of all stand side by side,
            by ascending owner; 0 where that is not so.
    """

    owner: Ints
    number: Ints
    wire_type: Ints
    start: Ints
    end: Ints
    num_rounds: int = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.owner)

    @property
    def _parts(self) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        return self.owner, self.number, self.wire_type, self.start, self.end

    def chosen(self, which: NDArray[np.bool_]) -> Fields:
        """Those for which `which`, `[f]`, is true."""
        if which.all():
            return self
        return Fields(*(part[which] for part in self._parts), num_rounds=0)

    def ordered(self) -> Fields:
        """The same, those of one message side by side and in their order."""
        if self.num_rounds == 1 or (np.diff(self.owner) >= 0).all():
            return self
        order = np.argsort(self.owner, kind="stable")
        return Fields(*(part[order] for part in self._parts), num_rounds=0)


def walk(data: Bytes, starts: Ints, ends: Ints) -> Fields:
    """All fields of the messages that lie at `starts` to `ends`, `[m]`.

    Args:
        data: at least `ragged.SLACK_BYTES` longer than the last message's end.

    Raises:
        WireError: a field that reaches beyond its message, or is of a type that there is not.
    """
    if (regular := _walk_regular(data, starts, ends)) is not None:
        return regular
    owner = np.flatnonzero(starts < ends)
    position, end = starts[owner], ends[owner]
    found: list[tuple[Ints, Ints, Ints, Ints, Ints]] = []
    while len(owner):
        if len(owner) < _NARROW and len(found) >= _NARROW_AFTER:
            found.extend(
                _walk_one(data, *one) for one in zip(owner.tolist(), position.tolist(), end.tolist(), strict=True)
            )
            break
        number, wire_type, start, after = _next(data, owner, position)
        wrong = (after > end) | (after < start) | (number == 0)
        if wrong.any():
            raise WireError(int(owner[wrong.argmax()]), "a field that reaches beyond its message, or has number 0")
        found.append((owner, number, wire_type, start, after))
        more = after < end
        if more.all():
            position = after
        else:
            owner, position, end = owner[more], after[more], end[more]
    if not found:
        empty = np.empty(0, np.int64)
        return Fields(empty, empty, empty, empty, empty, num_rounds=0)
    is_aligned = all(len(part[0]) == len(starts) for part in found)
    return Fields(
        *(np.concatenate(parts) for parts in zip(*found, strict=True)), num_rounds=len(found) if is_aligned else 0
    )


def _walk_regular(data: Bytes, starts: Ints, ends: Ints) -> Fields | None:
    """As `walk`, where all messages are laid out as the first; None where they are not, or not seen to be."""
    num_messages = len(starts)
    if num_messages < _NARROW:
        return None
    first, length, step = int(starts[0]), int(ends[0] - starts[0]), int(starts[1] - starts[0])
    # Looked at one by one before all: most messages that are not alike differ at once.
    if not 0 < length <= step or int(ends[1] - starts[1]) != length:
        return None
    if (ends - starts != length).any() or (np.diff(starts) != step).any():
        return None
    _, numbers, wire_types, relative, after = _walk_one(data, 0, first, first + length)
    if (wire_types == VARINT).any() or len(numbers) > num_messages:
        return None
    for begin, end in zip([first, *after.tolist()], relative.tolist(), strict=False):
        for place in range(begin, end, 8):
            header = np.ndarray((num_messages,), np.dtype("<u8"), data, place, (step,))
            differs = (header ^ header[0]) & byte_mask(min(end - place, 8))
            if differs.any():
                return None
    owner = np.tile(np.arange(num_messages), len(numbers))
    shift = owner * step
    number, wire_type, start, stop = (np.repeat(part, num_messages) for part in (numbers, wire_types, relative, after))
    return Fields(owner, number, wire_type, start + shift, stop + shift, num_rounds=len(numbers))


def _next(data: Bytes, owner: Ints, position: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Number, wire type, start and end of the field at each position."""
    tag, start = _read_varints(data, owner, position)
    number, wire_type = tag >> 3, tag & 7
    if (wire_type == DELIMITED).all():
        length, start = _read_varints(data, owner, start)
        return number, wire_type, start, start + length
    start, after = start.copy(), start.copy()
    known = np.zeros(len(owner), np.bool_)
    for fixed, num_bytes in ((FIXED64, 8), (FIXED32, 4)):
        which = wire_type == fixed
        after[which] += num_bytes
        known |= which
    which = np.flatnonzero(wire_type == VARINT)
    after[which] += _varint_widths(data, owner[which], start[which])
    known[which] = True
    which = np.flatnonzero(wire_type == DELIMITED)
    length, start[which] = _read_varints(data, owner[which], start[which])
    after[which] = start[which] + length
    known[which] = True
    if not known.all():
        wrong = int((~known).argmax())
        raise WireError(int(owner[wrong]), f"a field of wire type {wire_type[wrong]}, where 0, 1, 2 and 5 are known")
    return number, wire_type, start, after


def _read_varints(data: Bytes, owner: Ints, position: Ints) -> tuple[Ints, Ints]:
    """Tags or lengths at `position`, and where each ends."""
    first = data[position]
    if not (first & 0x80).any():
        return first.astype(np.int64), position + 1
    word = words(data)[position]
    stop = ~word & _STOPS
    if not stop.all():
        raise WireError(int(owner[(stop == 0).argmax()]), "a tag or length of more than eight bytes")
    stop &= ~stop + np.uint64(1)
    value = _squeezed(word & (stop - np.uint64(1)))
    return value.astype(np.int64), position + _width(stop)


def _varint_widths(data: Bytes, owner: Ints, position: Ints) -> Ints:
    """How many bytes the integers at `position` have."""
    stop = ~words(data)[position] & _STOPS
    stop &= ~stop + np.uint64(1)
    width = _width(stop)
    is_long = np.flatnonzero(stop == 0)
    if len(is_long):
        ninth, tenth = data[position[is_long] + 8], data[position[is_long] + 9]
        width[is_long] = np.where(ninth < 0x80, 9, 10)
        wrong = (ninth >= 0x80) & (tenth >= 0x80)
        if wrong.any():
            raise WireError(int(owner[is_long[wrong.argmax()]]), "an integer of more than ten bytes")
    return width


def _width(stop: NDArray[np.uint64]) -> Ints:
    """Of words with one bit set, the highest of a byte: which byte that is, from 1."""
    width: Ints = (np.frexp(stop.astype(np.float64))[1] >> 3).astype(np.int64)
    return width


def _squeezed(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The lower seven bits of each byte, side by side."""
    for low, high, shift in (
        (0x007F007F007F007F, 0x7F007F007F007F00, 1),
        (0x00003FFF00003FFF, 0x3FFF00003FFF0000, 2),
        (0x000000000FFFFFFF, 0x0FFFFFFF00000000, 4),
    ):
        word = (word & np.uint64(low)) | ((word & np.uint64(high)) >> np.uint64(shift))
    return word


def _walk_one(data: Bytes, owner: int, position: int, end: int) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """The fields of one message, as `Fields` has them: for a message of very many."""
    found = walk_one(data, owner, position, end)
    number, wire_type, start, after = np.array(found, np.int64).T
    return np.full(len(found), owner), number, wire_type, start, after


def walk_one(
    data: Bytes, owner: int, position: int, end: int, max_fields: int | None = None
) -> list[tuple[int, int, int, int]]:
    """Number, wire type, start and end of each field of one message, without numpy.

    Args:
        max_fields: after which the rest is left out; None for all.

    Raises:
        WireError: as `walk` does, of the message `owner`.
    """
    content = data.data
    found: list[tuple[int, int, int, int]] = []
    while position < end and len(found) != max_fields:
        tag, start = _read_varint(content, owner, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == DELIMITED:
            length, start = _read_varint(content, owner, start)
            position = start + length
        elif wire_type == VARINT:
            _, position = _read_varint(content, owner, start)
        elif wire_type in (FIXED32, FIXED64):
            position = start + (4 if wire_type == FIXED32 else 8)
        else:
            raise WireError(owner, f"a field of wire type {wire_type}, where 0, 1, 2 and 5 are known")
        if position > end or not number:
            raise WireError(owner, "a field that reaches beyond its message, or has number 0")
        found.append((number, wire_type, start, position))
    return found


def _read_varint(content: memoryview, owner: int, position: int) -> tuple[int, int]:
    value = 0
    for index in range(MAX_VARINT_BYTES):
        byte = content[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise WireError(owner, "an integer of more than ten bytes")


def decode_varints(ranges: Ragged) -> tuple[Ints, Ints]:
    """The integers, int64, that fill the rows, and how many each row has, `[n]`.

    Raises:
        WireError: a row that ends within an integer, or an integer of more than ten bytes.
    """
    content = ranges.joined()
    is_last = content < 0x80
    if is_last.all():
        return content.astype(np.int64), ranges.lengths
    row_ends = np.cumsum(ranges.lengths)
    is_cut = (ranges.lengths > 0) & ~is_last[np.maximum(row_ends - 1, 0)]
    if is_cut.any():
        raise WireError(int(is_cut.argmax()), "an integer that ends too early")
    num_before = np.concatenate([[0], np.cumsum(is_last)])
    counts = num_before[row_ends] - num_before[row_ends - ranges.lengths]
    last = np.flatnonzero(is_last)
    first = np.concatenate([[0], last[:-1] + 1])
    width = last - first + 1
    if int(width.max()) > MAX_VARINT_BYTES:
        row = int(np.searchsorted(row_ends, first[width.argmax()], side="right"))
        raise WireError(row, "an integer of more than ten bytes")
    content = with_slack(content)
    value = _squeezed(words(content)[first] & byte_mask(np.minimum(width, 8)) & ~_STOPS)
    is_long = np.flatnonzero(width > 8)
    for index in (8, 9):
        place = is_long[width[is_long] > index]
        value[place] |= (content[first[place] + index] & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * index)
    return value.view(np.int64), counts


_WIDTH_LIMITS = np.array([1 << 7 * width for width in range(1, MAX_VARINT_BYTES)], np.uint64)


def varint_widths(values: Ints) -> Ints:
    """How many bytes each value takes; ten for a negative one."""
    unsigned = values.view(np.uint64)
    if not len(values) or int(unsigned.max()) < 0x80:
        return np.ones(len(values), np.int64)
    return np.searchsorted(_WIDTH_LIMITS, unsigned, side="right").astype(np.int64) + 1


def put_varints(columns: Bytes, values: Ints) -> None:
    """Writes `values`, `[n]`, into `columns`, `[n, width]`, which is as wide as each of them is."""
    unsigned, width = values.view(np.uint64), columns.shape[1]
    for index in range(width):
        septet = (unsigned >> np.uint64(7 * index)).astype(np.uint8) & np.uint8(0x7F)
        columns[:, index] = septet | np.uint8(0x80 if index < width - 1 else 0)


def encode_varints(values: Ints) -> Ragged:
    """A row of bytes for each value."""
    widths = varint_widths(values)
    if not len(values) or int(widths.max()) == 1:
        return Ragged.matrix(values.astype(np.uint8).reshape(-1, 1))
    rows = Ragged(np.empty(int(widths.sum()), np.uint8), np.cumsum(widths) - widths, widths)
    unsigned = values.view(np.uint64)
    for index in range(int(widths.max())):
        which = slice(None) if index == 0 else np.flatnonzero(widths > index)
        septet = (unsigned[which] >> np.uint64(7 * index)).astype(np.uint8) & np.uint8(0x7F)
        more = (widths[which] > index + 1).astype(np.uint8) << 7
        rows.data[rows.starts[which] + index] = septet | more
    return rows
