"""A schema for records that bring none, with the connectors' rules.

A feature that has one value in every record becomes a column of single values, and one that somewhere has several an
array; a FeatureList becomes an array of arrays. Int64List gives long, FloatList float, BytesList string, and a feature
that never has a value void. Where records differ, the later of this order holds: void, long, float, string, arrays of
them, arrays of arrays of them. What has been inferred from records of different kinds cannot be read, as in the
connectors: leave that column out, or give a schema.

One departure: byte strings of which one that was looked at is no UTF-8 become binary, where the connectors say string
and then put other characters in the place of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from tensorspark.data.tfrecord.format import features
from tensorspark.data.tfrecord.format.features import Entries, Messages
from tensorspark.data.tfrecord.format.framing import Records
from tensorspark.data.tfrecord.format.ragged import Ints, Ragged
from tensorspark.data.tfrecord.format.types import (
    BYTE_ARRAY_COLUMN,
    BYTES,
    FLOATS,
    INTS,
    RecordType,
    check_record_type,
)
from tensorspark.data.tfrecord.format.wire import DELIMITED, Fields, WireError
from tensorspark.errors import ConfigError, FeedError

# By rank.
_LEAVES = (pa.null(), pa.int64(), pa.float32(), pa.string(), pa.binary())
_RANKS = {INTS: 1, FLOATS: 2, BYTES: 3}
_TEXT, _BINARY = 3, 4

_Place = tuple[int, int]
"""How deep the arrays are, and the rank of what is in them; with rank 0, nothing is."""
_Found = dict[bytes, _Place]
"""By the feature's name."""


def infer_schema(
    records: Iterable[Records], record_type: RecordType = "Example", *, sample_ratio: float = 1.0, seed: int = 0
) -> pa.Schema:
    """The schema that fits all sampled records: columns by name, all nullable.

    Args:
        sample_ratio: of the records that are looked at, drawn by `seed`; at least one of each batch.

    Raises:
        ConfigError: a ratio that is not above 0 and at most 1.
        FeedError: a record that is not of this type.
    """
    check_record_type(record_type)
    if not 0 < sample_ratio <= 1:
        raise ConfigError(f"inferSchemaSampleRatio: expected more than 0 and at most 1, got {sample_ratio!r}")
    if record_type == "ByteArray":
        return pa.schema([(BYTE_ARRAY_COLUMN, pa.binary())])
    found: _Found = {}
    random = np.random.default_rng(seed)
    for batch in records:
        if len(batch):
            _merge(found, _infer(batch, _sample(len(batch), sample_ratio, random), record_type))
    return _schema(found)


def merge_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The schema that fits what each fits: as if all their records had been looked at together.

    Args:
        schemas: as `infer_schema` makes them.
    """
    found: _Found = {}
    for schema in schemas:
        _merge(found, {field.name.encode(): _place(field.type) for field in schema})
    return _schema(found)


def _sample(num_records: int, ratio: float, random: np.random.Generator) -> Ints:
    """Indices of the records that are looked at."""
    if ratio == 1:
        return np.arange(num_records)
    chosen = np.flatnonzero(random.random(num_records) < ratio)
    return chosen if len(chosen) else random.integers(0, num_records, 1)


def _infer(records: Records, which: Ints, record_type: RecordType) -> _Found:
    found: _Found = {}
    messages = features.records(records.ragged()).picked(which)
    try:
        top = messages.fields()
        if record_type == "Example":
            _require_no_lists(messages, top)
        _merge(found, _single(features.entries(messages, top, features.FEATURES)))
        if record_type == "SequenceExample":
            _merge(found, _listed(features.entries(messages, top, features.FEATURE_LISTS)))
    except WireError as error:
        where = f"{records.name}: " if records.name else ""
        raise FeedError(
            f"{where}record {records.first_index + error.message}: expected a tf.train.{record_type}, got {error}; set "
            "recordType to what the file holds"
        ) from None
    return found


def _require_no_lists(messages: Messages, top: Fields) -> None:
    """Raises WireError where a record has feature lists: of its features, an Example has the context alone."""
    has_lists = (top.number == features.FEATURE_LISTS) & (top.wire_type == DELIMITED)
    if has_lists.any():
        row = int(messages.rows[top.owner[has_lists].min()])
        raise WireError(row, "the feature lists of a SequenceExample")


def _single(entries: Entries) -> _Found:
    """Of plain features."""
    found: _Found = {}
    for index, name in enumerate(entries.names):
        found[name] = (0, 0)
        for place in _places(entries.under(index)):
            found[name] = _wider(found[name], place)
    return found


def _listed(entries: Entries) -> _Found:
    """Of feature lists."""
    found: _Found = {}
    for index, name in enumerate(entries.names):
        lists = entries.under(index)
        inner, _ = lists.within(lists.fields().ordered(), 1)
        found[name] = (2, 0)
        for _, rank in _places(inner):
            found[name] = _wider(found[name], (2, rank))
    return found


def _places(messages: Messages) -> list[_Place]:
    """Of features: for each kind that has values, whether somewhere several, and their rank."""
    lists = features.lists(messages)
    places: list[_Place] = []
    for kind, rank in _RANKS.items():
        values = features.values(lists.of_kind(kind), kind)
        most = int(values.counts.max(initial=0))
        if most:
            is_text = values.strings is None or _is_text(values.strings)
            places.append((int(most > 1), rank if is_text else _BINARY))
    return places


def _is_text(strings: Ragged) -> bool:
    try:
        strings.to_arrow(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


def _merge(found: _Found, others: _Found) -> None:
    """Adds to `found` what is in `others`."""
    for name, place in others.items():
        found[name] = _wider(found.get(name, (0, 0)), place)


def _wider(one: _Place, other: _Place) -> _Place:
    if not one[1] or not other[1]:
        return max(one, other, key=lambda place: place[1])
    if min(one[1], other[1]) >= _TEXT:  # one string that is no text makes all of them binary
        return max(one[0], other[0]), max(one[1], other[1])
    return max(one, other)


def _place(data_type: pa.DataType) -> _Place:
    depth = 0
    while pa.types.is_list(data_type):
        depth, data_type = depth + 1, data_type.value_type
    return depth, _LEAVES.index(data_type)


def _schema(found: _Found) -> pa.Schema:
    fields = []
    for name, (depth, rank) in sorted(found.items()):
        data_type = _LEAVES[rank]
        for _ in range(depth if rank else 0):
            data_type = pa.list_(data_type)
        fields.append((_text(name), data_type))
    return pa.schema(fields)


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise FeedError(f"expected features with names in UTF-8, got {name!r}; give a schema without it") from error
