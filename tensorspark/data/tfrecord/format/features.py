"""`tf.train.Example` and `SequenceExample` messages, taken apart in bulk: which feature lies where.

::

    Example          { Features features = 1 }
    SequenceExample  { Features context = 1;  FeatureLists feature_lists = 2 }
    Features         { map<string, Feature> feature = 1 }
    FeatureLists     { map<string, FeatureList> feature_list = 1 }
    FeatureList      { repeated Feature feature = 1 }
    Feature          { oneof { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3 } }
    (each list)      { repeated ... value = 1 }                         floats and integers packed, or one by one
    (a map's entry)  { string key = 1;  value = 2 }
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorspark.data.tfrecord.format.ragged import Bytes, Ints, Ragged, byte_mask, words
from tensorspark.data.tfrecord.format.types import BYTES, FLOATS, INTS, NO_KIND
from tensorspark.data.tfrecord.format.wire import (
    DELIMITED,
    FIXED32,
    VARINT,
    Fields,
    WireError,
    decode_varints,
    walk,
    walk_one,
)

FEATURES, FEATURE_LISTS = 1, 2
_KEY, _VALUE = 1, 2
_VALUES = 1
# Names are compared place by place where so many records, for each feature in one, have their features in one order.
_MIN_ROWS_A_ROUND = 4
# With fewer records, or more layouts, there is little to gain.
_MIN_ALIKE, _MAX_LAYOUTS = 16, 8


@dataclass(frozen=True)
class Messages:
    """Some messages of one kind.

    Attributes:
        data: where they lie, with slack after the last.
        starts: `[m]`.
        ends: `[m]`.
        rows: `[m]`, index of the record that each belongs to.
    """

    data: Bytes
    starts: Ints
    ends: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows)

    def fields(self) -> Fields:
        """Their fields, of every number; `owner` is an index of these messages.

        Raises:
            WireError: bytes that are no message; `message` is the record's index.
        """
        try:
            return walk(self.data, self.starts, self.ends)
        except WireError as error:
            raise WireError(int(self.rows[error.message]), str(error)) from None

    def within(self, fields: Fields, number: int) -> tuple[Messages, Ints]:
        """The messages in the fields of that number, and the owner of each.

        Raises:
            WireError: a field of that number that holds no message.
        """
        chosen = fields.chosen(fields.number == number)
        is_wrong = chosen.wire_type != DELIMITED
        if is_wrong.any():
            row = int(self.rows[chosen.owner[is_wrong.argmax()]])
            raise WireError(row, f"field {number} of wire type {chosen.wire_type[is_wrong.argmax()]} instead of 2")
        return Messages(self.data, chosen.start, chosen.end, self.rows[chosen.owner]), chosen.owner

    def picked(self, which: Ints | slice) -> Messages:
        """Those at the indices `which`, or in this slice."""
        return Messages(self.data, self.starts[which], self.ends[which], self.rows[which])


@dataclass(frozen=True)
class Entries:
    """The entries of the maps in some records.

    Attributes:
        names: their keys, as bytes, each once.
        values: of the entries, as messages: those under each name apart, or all together.
        code: `[e]`, which of `names` each entry has, where `values` are together; else None.
    """

    names: list[bytes]
    values: list[Messages]
    code: Ints | None = None

    def under(self, index: int) -> Messages:
        """All values under the name of this index."""
        if self.code is None:
            return self.values[index]
        return self.values[0].picked(np.flatnonzero(self.code == index))

    def last_under(self, name: bytes, num_rows: int) -> Messages:
        """The values under the name by ascending row; of several in a row, the last. Of a name not there, none."""
        if name not in self.names:
            return self.values[0].picked(np.empty(0, np.int64))
        values = self.under(self.names.index(name))
        if (np.diff(values.rows) > 0).all():
            return values
        last = np.full(num_rows, -1, np.int64)
        last[values.rows] = np.arange(len(values))
        return values.picked(last[last >= 0])


def records(rows: Ragged) -> Messages:
    """Whole records as messages."""
    return Messages(rows.data, rows.starts, rows.starts + rows.lengths, np.arange(len(rows)))


def entries(messages: Messages, top: Fields, number: int) -> Entries:
    """The entries of the maps in field `number` of the records, `top` being the records' fields.

    Raises:
        WireError: bytes that are no such message.
    """
    maps, _ = messages.within(top.ordered(), number)
    fields = maps.fields()
    num_rounds = fields.num_rounds
    if len(maps) and (np.diff(maps.rows) <= 0).any():  # one record's map in several parts: the later ones win
        fields, num_rounds = fields.ordered(), 0
    each, _ = maps.within(fields, 1)
    if num_rounds and len(each) == len(fields) and len(maps) >= _MIN_ROWS_A_ROUND * num_rounds:
        same = [_entries_of(each.picked(slice(at, at + len(maps)))) for at in range(0, len(each), len(maps))]
        names = [_only_name(keys) for keys, _ in same]
        if None not in names and len(set(names)) == len(names):
            return Entries([name for name in names if name is not None], [values for _, values in same])
    keys, values = _entries_of(each)
    found = keys.to_arrow(pa.binary()).dictionary_encode()
    return Entries(found.dictionary.to_pylist(), [values], found.indices.to_numpy().astype(np.int64))


def _entries_of(each: Messages) -> tuple[Ragged, Messages]:
    """Keys and values of a map's entries."""
    parts = each.fields()
    key_starts, key_lengths = _last(*each.within(parts, _KEY), len(each))
    value_starts, value_lengths = _last(*each.within(parts, _VALUE), len(each))
    values = Messages(each.data, value_starts, value_starts + value_lengths, each.rows)
    return Ragged(each.data, key_starts, key_lengths), values


def _only_name(keys: Ragged) -> bytes | None:
    """The key that all are; None where they differ."""
    start, length = int(keys.starts[0]), int(keys.lengths[0])
    if (keys.lengths != length).any():
        return None
    eight = words(keys.data)
    for place in range(0, length, 8):
        differs = (eight[keys.starts + place] ^ eight[start + place]) & byte_mask(min(length - place, 8))
        if differs.any():
            return None
    return keys.data[start : start + length].tobytes()


def _last(found: Messages, owner: Ints, num_owners: int) -> tuple[Ints, Ints]:
    """Start and length of each owner's last; nothing, at 0, where it has none."""
    if len(owner) == num_owners and (owner == np.arange(num_owners)).all():
        return found.starts, found.ends - found.starts
    starts, lengths = np.zeros(num_owners, np.int64), np.zeros(num_owners, np.int64)
    starts[owner] = found.starts
    lengths[owner] = found.ends - found.starts
    return starts, lengths


@dataclass(frozen=True)
class Lists:
    """The lists of some features.

    Attributes:
        kind: `[m]`, which list each feature has: `BYTES`, `FLOATS`, `INTS` or `NO_KIND`.
        messages: the lists themselves; a feature may have several parts of one, or none.
        owner: index of each message's feature, ascending.
        content: `[m]`, the values of each feature, where each is known to be one string or one packed field; else None.
    """

    kind: Ints
    messages: Messages
    owner: Ints
    content: Ragged | None = None

    def of_kind(self, kind: int) -> Lists:
        """The same, without the lists of other kinds: their features have no values."""
        chosen = np.flatnonzero(self.kind[self.owner] == kind)
        return Lists(self.kind, self.messages.picked(chosen), self.owner[chosen])


def lists(features: Messages) -> Lists:
    """The lists of features. Where one says several kinds, the last holds, as in protobuf.

    Raises:
        WireError: bytes that are no Feature.
    """
    fields = features.fields().ordered()
    fields = fields.chosen((fields.number >= BYTES) & (fields.number <= INTS))
    kind = np.full(len(features), NO_KIND, np.int64)
    kind[fields.owner] = fields.number
    fields = fields.chosen(fields.number == kind[fields.owner])
    is_wrong = fields.wire_type != DELIMITED
    if is_wrong.any():
        raise WireError(int(features.rows[fields.owner[is_wrong.argmax()]]), "a feature whose list is no message")
    messages = Messages(features.data, fields.start, fields.end, features.rows[fields.owner])
    return Lists(kind, messages, fields.owner)


@dataclass(frozen=True)
class Values:
    """The values of some features' lists, all of one kind.

    Attributes:
        counts: `[m]`, how many values each feature has.
        numbers: float32 or int64, one after another; None for bytes.
        strings: where each of the byte strings lies; None for numbers.
    """

    counts: Ints
    numbers: np.ndarray[tuple[int], np.dtype[np.float32 | np.int64]] | None = None
    strings: Ragged | None = None


def alike(rows: Ragged) -> dict[bytes, Lists] | None:
    """The lists of `Example` records by name, where the records have few layouts.

    Records of one layout have the bytes of the first everywhere but in the values: so are those that one program wrote,
    with a layout for each width that an integer has in them. Then nothing has to be walked but the first of each. None
    where there are more than `_MAX_LAYOUTS`, or one is not of the plainest form: under each name one list with one
    string or one packed field. Of several entries of one name, the last holds.
    """
    if len(rows) < _MIN_ALIKE or len(np.unique(rows.lengths)) > _MAX_LAYOUTS:
        return None
    found: dict[bytes, list[tuple[_Place, Ints]]] = {}
    left = np.arange(len(rows))
    for num_before in range(_MAX_LAYOUTS):
        first = int(left[0])
        try:
            places = _places(rows.data, int(rows.starts[first]), int(rows.lengths[first]))
        except WireError:
            return None
        is_same = _has_layout_of(first, places, rows, left)
        for place in places:
            found.setdefault(place.name, []).append((place, left[is_same]))
        left = left[~is_same]
        if not len(left):
            return {name: _lists_at(parts, rows) for name, parts in found.items()}
        # Some records are of the first layouts where eight cover all; the first two may be rare ones.
        if len(left) * _MAX_LAYOUTS > len(rows) * (_MAX_LAYOUTS + 1 - num_before):
            return None
    return None


@dataclass(frozen=True)
class _Place:
    """Where the values of a feature lie, from the beginning of its record."""

    name: bytes
    kind: int
    start: int
    end: int


def _has_layout_of(first: int, places: list[_Place], rows: Ragged, which: Ints) -> NDArray[np.bool_]:
    """Of the records `which`, those that have the bytes of record `first` everywhere but at its values."""
    start, num_bytes = int(rows.starts[first]), int(rows.lengths[first])
    is_same: NDArray[np.bool_] = rows.lengths[which] == num_bytes
    starts, equal = rows.starts[which[is_same]], np.True_
    eight = words(rows.data)
    for begin, end in zip(
        [0, *(place.end for place in places)], [*(place.start for place in places), num_bytes], strict=True
    ):
        for at in range(begin, end, 8):
            equal = equal & ((eight[starts + at] ^ eight[start + at]) & byte_mask(min(end - at, 8)) == 0)
    is_same[is_same] = equal
    return is_same


def _lists_at(parts: list[tuple[_Place, Ints]], rows: Ragged) -> Lists:
    """The lists of one feature, by ascending record, from its place in some records and the indices of those."""
    index = np.concatenate([which for _, which in parts])
    order = np.argsort(index, kind="stable")
    start, end, kind = (
        np.repeat(each, [len(which) for _, which in parts])[order]
        for each in zip(*((place.start, place.end, place.kind) for place, _ in parts), strict=True)
    )
    index = index[order]
    content = Ragged(rows.data, rows.starts[index] + start, end - start)
    messages = Messages(rows.data, content.starts, content.starts + content.lengths, index)
    return Lists(kind, messages, np.arange(len(index)), content)


def _places(data: Bytes, first: int, num_bytes: int) -> list[_Place]:
    """The features of the record at `first`, in its order.

    Raises:
        WireError: also for a record that is not of the plainest form.
    """
    places: dict[bytes, _Place] = {}
    (top,) = _delimited(walk_one(data, 0, first, first + num_bytes, max_fields=2), FEATURES)
    each = walk_one(data, 0, *top)
    for entry in _delimited(each, *[1] * len(each)):
        key, feature = _delimited(walk_one(data, 0, *entry, max_fields=3), _KEY, _VALUE)
        of_kind = walk_one(data, 0, *feature, max_fields=2)
        kind = of_kind[0][0] if of_kind else NO_KIND
        (inside,) = _delimited(of_kind, kind if kind in (BYTES, FLOATS, INTS) else NO_KIND)
        ((start, end),) = _delimited(walk_one(data, 0, *inside, max_fields=2), _VALUES)
        name = data[slice(*key)].tobytes()
        places[name] = _Place(name, kind, start - first, end - first)
    return list(places.values())


def _delimited(fields: list[tuple[int, int, int, int]], *numbers: int) -> list[tuple[int, int]]:
    """Where the values lie of fields that all are delimited; raises WireError where these numbers are not theirs."""
    if [field[:2] for field in fields] != [(number, DELIMITED) for number in numbers]:
        raise WireError(0, "other fields")
    return [field[2:] for field in fields]


def values(found: Lists, kind: int) -> Values:
    """The values of features that have this kind, or none.

    Raises:
        WireError: bytes that are no list of this kind.
    """
    num_features = len(found.kind)
    if found.content is not None:
        return _values_in(found.content, kind, found.owner, found.messages.rows, num_features)
    if kind == FLOATS and (unpacked := _single_floats(found)) is not None:
        return unpacked
    fields = found.messages.fields().ordered()
    fields = fields.chosen(fields.number == _VALUES)
    single = {BYTES: DELIMITED, FLOATS: FIXED32, INTS: VARINT}[kind]
    is_wrong = (fields.wire_type != single) & (fields.wire_type != DELIMITED)
    if is_wrong.any():
        row = int(found.messages.rows[fields.owner[is_wrong.argmax()]])
        raise WireError(row, f"a value of wire type {fields.wire_type[is_wrong.argmax()]}")
    ranges = Ragged(found.messages.data, fields.start, fields.end - fields.start)
    return _values_in(ranges, kind, found.owner[fields.owner], found.messages.rows[fields.owner], num_features)


def _values_in(ranges: Ragged, kind: int, owner: Ints, rows: Ints, num_features: int) -> Values:
    """The values in strings or packed fields, `[r]`; `owner` is the feature of each, and `rows` its record."""
    if kind == BYTES:
        return Values(_sums(owner, None, num_features), strings=ranges)
    if kind == FLOATS:
        is_odd = ranges.lengths % 4 != 0
        if is_odd.any():
            row = int(rows[is_odd.argmax()])
            raise WireError(row, f"{ranges.lengths[is_odd.argmax()]} bytes of floats, which is no multiple of 4")
        counts = _sums(owner, ranges.lengths // 4, num_features)
        return Values(counts, numbers=np.require(ranges.joined().view("<f4"), requirements="A"))
    try:
        integers, num_each = decode_varints(ranges)
    except WireError as error:
        raise WireError(int(rows[error.message]), str(error)) from None
    return Values(_sums(owner, num_each, num_features), numbers=integers)


def _single_floats(found: Lists) -> Values | None:
    """Values where each float has a tag of its own and nothing else is there; None where that is not so."""
    messages = found.messages
    lengths = messages.ends - messages.starts
    tag = np.uint8(_VALUES << 3 | FIXED32)
    if not len(messages) or (lengths % 5 != 0).any() or (messages.data[messages.starts[lengths > 0]] != tag).any():
        return None
    content = Ragged(messages.data, messages.starts, lengths).joined().reshape(-1, 5)
    if (content[:, 0] != tag).any():
        return None
    numbers = np.ascontiguousarray(content[:, 1:]).reshape(-1).view("<f4")
    return Values(_sums(found.owner, lengths // 5, len(found.kind)), numbers=numbers)


def _sums(owner: Ints, counts: Ints | None, num_owners: int) -> Ints:
    """For each owner, the sum of what it has; ones where `counts` is None."""
    if len(owner) == num_owners and (owner == np.arange(num_owners)).all():
        return np.ones(num_owners, np.int64) if counts is None else counts
    if counts is None:
        return np.bincount(owner, minlength=num_owners).astype(np.int64)
    sums = np.zeros(num_owners, np.int64)
    np.add.at(sums, owner, counts)
    return sums
