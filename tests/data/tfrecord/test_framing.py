"""Framing, byte for byte as TensorFlow's; batches; codecs; every kind of damage."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from tensorspark.data.tfrecord.format.framing import (
    Codec,
    Records,
    frame,
    masked_crc32c,
    open_writer,
    read_records,
)
from tensorspark.errors import ConfigError, FeedError

PAYLOADS = [b"one", b"", b"the third is longer", bytes(range(256)) * 5]
TF_CODECS = [(None, ""), ("gzip", "GZIP"), ("zlib", "ZLIB")]

many_payloads = st.one_of(
    st.lists(st.binary(max_size=300), max_size=40),
    # Runs of equal lengths, which are found several at once.
    st.lists(st.tuples(st.binary(max_size=40), st.integers(1, 100)), max_size=6).map(
        lambda runs: [payload for payload, count in runs for _ in range(count)]
    ),
)


def _read(content: bytes, **options: Any) -> list[bytes]:
    batches = read_records(io.BytesIO(content), name="part-0", **options)
    return [bytes(payload) for batch in batches for payload in batch.payloads()]


def _written_by_tensorflow(path: Path, payloads: Sequence[bytes], compression: str = "") -> bytes:
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for payload in payloads:
            writer.write(payload)
    return path.read_bytes()


def _compressed(payloads: Sequence[bytes], codec: Codec | None) -> bytes:
    file = io.BytesIO()
    writer = open_writer(file, codec)
    writer.write(frame(Records.of(list(payloads))))
    writer.close()
    return file.getvalue()


def _intact(compressed: bytes, codec: Codec, content: bytes) -> bytes:
    """The beginning of `content` that comes of a damaged file, given to zlib byte by byte."""
    inflater = zlib.decompressobj(31 if codec == "gzip" else 15)
    inflated = bytearray()
    with contextlib.suppress(zlib.error):
        for byte in compressed:
            inflated += inflater.decompress(bytes([byte]))
    is_equal = [one == other for one, other in zip(inflated, content, strict=False)]
    return content[: [*is_equal, False].index(False)]


def _read_until_damage(content: bytes, **options: Any) -> tuple[list[bytes], str]:
    found: list[bytes] = []

    def read() -> None:
        for batch in read_records(io.BytesIO(content), name="hdfs://h/part-0", **options):
            found.extend(bytes(payload) for payload in batch.payloads())

    with pytest.raises(FeedError) as raised:
        read()
    return found, str(raised.value)


def test_frames_are_byte_for_byte_tensorflows(tmp_path: Path) -> None:
    assert frame(Records.of(PAYLOADS)) == _written_by_tensorflow(tmp_path / "a", PAYLOADS)


def test_frames_of_equally_long_records_are_byte_for_byte_tensorflows(tmp_path: Path) -> None:
    payloads = [bytes([index]) * 70_000 for index in range(20)]
    assert frame(Records.of(payloads)) == _written_by_tensorflow(tmp_path / "a", payloads)


def test_no_records_make_no_bytes() -> None:
    assert frame(Records.of([])) == b""


def test_the_checksum_is_the_published_one_of_crc32c_masked() -> None:
    crc = 0xE3069283  # CRC-32C of the digits 1 to 9, in every catalogue
    assert masked_crc32c(b"123456789") == (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize(("codec", "compression"), TF_CODECS)
def test_files_of_tensorflow_are_read(tmp_path: Path, codec: Codec | None, compression: str) -> None:
    content = _written_by_tensorflow(tmp_path / "a", PAYLOADS, compression)
    assert _read(content, codec=codec) == PAYLOADS


@pytest.mark.parametrize(("codec", "compression"), TF_CODECS)
def test_tensorflow_reads_our_files(tmp_path: Path, codec: Codec | None, compression: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(_compressed(PAYLOADS, codec))
    dataset = tf.data.TFRecordDataset(str(path), compression)
    assert list(dataset.as_numpy_iterator()) == PAYLOADS


@given(many_payloads, st.integers(1, 2000), st.integers(1, 50), st.sampled_from([None, "gzip", "zlib"]))
def test_batches_of_any_size_hold_the_same_records(
    payloads: list[bytes], batch_bytes: int, max_batch_records: int, codec: Codec | None
) -> None:
    content = _compressed(payloads, codec)
    batches = list(
        read_records(
            io.BytesIO(content),
            name="part-0",
            codec=codec,
            batch_bytes=batch_bytes,
            max_batch_records=max_batch_records,
        )
    )
    assert [bytes(payload) for batch in batches for payload in batch.payloads()] == payloads
    assert [batch.first_index for batch in batches] == np.cumsum([0, *map(len, batches)])[:-1].tolist()
    assert all(0 < len(batch) <= max_batch_records for batch in batches)
    largest = max((len(payload) for payload in payloads), default=0) + 16
    assert all(len(batch.data) <= max(batch_bytes, largest) + 64 for batch in batches)


def test_a_file_that_reads_a_few_bytes_at_a_time_gives_the_same_records() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(7, size or 0))

    batches = read_records(Slow(frame(Records.of(PAYLOADS))), name="a", batch_bytes=100)
    assert [bytes(payload) for batch in batches for payload in batch.payloads()] == PAYLOADS


def test_memory_is_bounded_by_the_batch_not_by_the_file() -> None:
    content = _compressed([bytes(1000)] * 30_000, "gzip")
    tracemalloc.start()
    try:
        num_read = sum(
            len(batch) for batch in read_records(io.BytesIO(content), name="a", codec="gzip", batch_bytes=2**20)
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_read == 30_000
    assert peak < 6 * 2**20


def test_several_members_of_a_compressed_file_are_read_as_one() -> None:
    content = frame(Records.of(PAYLOADS))
    parts = [gzip.compress(content[:100]), gzip.compress(b""), gzip.compress(content[100:])]
    assert _read(b"".join(parts), codec="gzip") == PAYLOADS


@pytest.mark.parametrize("codec", [None, "gzip", "zlib"])
def test_an_empty_file_has_no_records(codec: Codec | None) -> None:
    assert _read(b"", codec=codec) == []
    assert _read(_compressed([], codec), codec=codec) == []


@pytest.mark.parametrize("codec", [None, "gzip", "zlib"])
@pytest.mark.parametrize("batch_bytes", [64, 2**20])
def test_a_file_cut_anywhere_is_an_error_and_its_whole_records_are_given(codec: Codec | None, batch_bytes: int) -> None:
    payloads = [bytes([65 + index]) * 30 for index in range(6)]
    content = frame(Records.of(payloads))
    whole = _compressed(payloads, codec)
    for kept in range(1, len(whole), 3):
        if codec is None and kept % 46 == 0:
            continue  # between two records
        found, message = _read_until_damage(whole[:kept], codec=codec, batch_bytes=batch_bytes)
        assert "hdfs://h/part-0" in message
        assert "truncated" in message
        intact = whole[:kept] if codec is None else _intact(whole[:kept], codec, content)
        assert found == payloads[: len(intact) // 46]
        if codec is None:
            assert f"offset {kept // 46 * 46}" in message
    assert _read(_compressed(payloads, codec), codec=codec) == _read(content) == payloads


@pytest.mark.parametrize("damaged", [0, 3, 59])
@pytest.mark.parametrize(("place", "what"), [(1, "length"), (9, "length"), (15, "data"), (43, "data")])
@pytest.mark.parametrize("batch_bytes", [100, 2**20])
def test_a_wrong_checksum_names_file_and_offset(damaged: int, place: int, what: str, batch_bytes: int) -> None:
    payloads = [bytes([index]) * 30 for index in range(60)]
    content = bytearray(frame(Records.of(payloads)))
    content[damaged * 46 + place] ^= 0x40
    found, message = _read_until_damage(bytes(content), batch_bytes=batch_bytes)
    assert found == payloads[:damaged]
    assert f"offset {damaged * 46}" in message
    assert what in message
    assert "checksum" in message
    assert message.startswith("hdfs://h/part-0: ")


def test_checksums_are_not_compared_where_the_caller_says_so() -> None:
    content = bytearray(frame(Records.of([b"abcd", b"efgh"])))
    content[12] ^= 1
    content[9] ^= 1
    assert _read(bytes(content), verifies=False) == [b"`bcd", b"efgh"]


def test_a_record_over_the_limit_is_refused_before_it_is_read() -> None:
    header = struct.pack("<Q", 2**50)
    content = frame(Records.of([b"ab"])) + header + struct.pack("<I", masked_crc32c(header)) + b"xy"
    found, message = _read_until_damage(content)
    assert found == [b"ab"]
    assert str(2**50) in message
    assert "offset 18" in message
    assert _read(frame(Records.of([b"abc"] * 9)), max_record_bytes=3) == [b"abc"] * 9
    found, message = _read_until_damage(frame(Records.of([b"abc"] * 9 + [b"abcd"])), max_record_bytes=3)
    assert found == [b"abc"] * 9
    assert "at most 3 bytes, got one of 4" in message


def test_the_rest_of_a_damaged_file_is_skipped_and_counted_on_demand() -> None:
    content = bytearray(frame(Records.of([b"one", b"two", b"three"])))
    content[19 + 12] ^= 1
    skipped: list[FeedError] = []
    assert _read(bytes(content), on_corrupt="skip", counter=skipped.append) == [b"one"]
    assert len(skipped) == 1
    assert "part-0" in str(skipped[0])
    assert "offset 19" in str(skipped[0])


def test_damage_within_compressed_data_is_an_error() -> None:
    noise = [np.random.default_rng(5).bytes(5000) for _ in range(20)]
    whole = _compressed(noise, "gzip")
    wrong_sum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    found, message = _read_until_damage(wrong_sum, codec="gzip", batch_bytes=10_000)
    assert found == noise
    assert "gzip" in message
    found, message = _read_until_damage(whole + b"rubbish", codec="gzip")
    assert found == noise
    assert "gzip" in message


@pytest.mark.parametrize("codec", ["gzip", "zlib"])
@pytest.mark.parametrize("batch_bytes", [1000, 10_000, 2**22])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_all_records_before_damage_in_compressed_data_are_given(codec: Codec, batch_bytes: int, share: float) -> None:
    rng = np.random.default_rng(17)
    payloads = [bytes(rng.integers(0, 20, 84).astype(np.uint8)) for _ in range(2000)]
    content = frame(Records.of(payloads))
    whole = bytearray(_compressed(payloads, codec))
    place = int(len(whole) * share)
    whole[place : place + 100] = bytes([0xFF]) * 100
    num_intact = len(_intact(bytes(whole), codec, content)) // 100
    found, _ = _read_until_damage(bytes(whole), codec=codec, batch_bytes=batch_bytes)
    assert abs(num_intact - share * 2000) < 100
    assert found == payloads[:num_intact]


def test_zeros_after_the_members_of_a_gzip_file_are_padding() -> None:
    content = frame(Records.of(PAYLOADS))
    padded = b"".join(gzip.compress(part) + bytes(num) for part, num in ((content[:100], 9), (content[100:], 2**18)))
    assert gzip.decompress(padded) == content
    assert _read(padded, codec="gzip") == PAYLOADS
    assert _read_until_damage(padded + b"rubbish", codec="gzip")[0] == PAYLOADS
    assert _read_until_damage(zlib.compress(content) + bytes(9), codec="zlib")[0] == PAYLOADS


@pytest.mark.parametrize(
    ("compressed", "codec"),
    [
        (gzip.compress(frame(Records.of(PAYLOADS)), mtime=1_800_000_000), "gzip"),
        (gzip.compress(frame(Records.of(PAYLOADS)), mtime=0), "gzip"),  # which gives a length below the limit
        *((zlib.compress(frame(Records.of(PAYLOADS)), level), "zlib") for level in (1, 6, 9)),
    ],
)
@pytest.mark.parametrize("verifies", [True, False])
def test_a_compressed_file_read_without_its_codec_is_told_from_a_large_record(
    compressed: bytes, codec: str, verifies: bool
) -> None:
    found, message = _read_until_damage(compressed, verifies=verifies)
    assert not found
    assert f"it looks like {codec}: set codec" in message


def test_a_length_over_the_limit_may_be_damage_where_checksums_are_not_compared() -> None:
    content = frame(Records.of([bytes(120)]))
    assert "damaged" not in _read_until_damage(content, max_record_bytes=100)[1]
    message = _read_until_damage(content, max_record_bytes=100, verifies=False)[1]
    assert "raise maxRecordBytes, or write smaller ones; or the file is damaged" in message
    assert "ignoreCorruptFiles" in message
    assert "codec" not in message
    assert "codec" not in _read_until_damage(content[:-1], verifies=False)[1]


def test_a_compressed_file_read_without_its_codec_says_which() -> None:
    assert "it looks like gzip: set codec" in _read_until_damage(_compressed(PAYLOADS, "gzip"))[1]
    assert "set codec" in _read_until_damage(frame(Records.of(PAYLOADS)), codec="zlib")[1]


def test_a_codec_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected none, gzip or zlib, got 'snappy'"):
        _read(b"", codec="snappy")
    with pytest.raises(ConfigError, match="snappy"):
        open_writer(io.BytesIO(), "snappy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 to 9"):
        open_writer(io.BytesIO(), "gzip", 11)


def test_our_gzip_takes_level_1_unless_told() -> None:
    content = bytes(np.random.default_rng(2).integers(0, 20, 50_000).astype(np.uint8))
    expected = zlib.compressobj(1, zlib.DEFLATED, 31)
    framed = frame(Records.of([content]))
    assert _compressed([content], "gzip") == expected.compress(framed) + expected.flush()
