"""What a task that reads takes of memory is bounded by its batches, whatever the file's size."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.format.encoding import Encoder
from tensorspark.data.tfrecord.format.framing import frame, masked_crc32c

MIB = 2**20
NUM_ROWS, ROW_FLOATS = 10_000, 784

_READ = """
import resource
import sys

import pyarrow as pa

from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.paths import list_files
from tensorspark.data.tfrecord.storage.reading import read_batches

options = Options.parse({"path": sys.argv[1], "ignoreCorruptFiles": "true"})
schema = pa.schema([("image", pa.list_(pa.float32())), ("label", pa.int64())])
num_rows = sum(batch.num_rows for batch in read_batches(list_files(options), schema, options))
print(num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.fixture(scope="module")
def content() -> bytes:
    """Of a file of 30 MB: files of records, one after the other, are one."""
    rows = np.random.default_rng(4).normal(size=(NUM_ROWS, ROW_FLOATS)).astype(np.float32)
    images = pa.FixedSizeListArray.from_arrays(rows.ravel(), ROW_FLOATS)
    batch = pa.RecordBatch.from_arrays([images, pa.array(range(NUM_ROWS))], ["image", "label"])
    return frame(Encoder(batch.schema).encode(batch))


def _read(path: Path) -> tuple[int, int]:
    """Rows, and the most bytes that a process of its own had resident while it read them."""
    ended = subprocess.run([sys.executable, "-c", _READ, path], check=True, capture_output=True, text=True, timeout=120)
    num_rows, peak_bytes = map(int, ended.stdout.split())
    return num_rows, peak_bytes


@pytest.mark.parametrize("end", ["", ".gz"])
def test_ten_times_the_file_takes_no_more_memory(content: bytes, tmp_path: Path, end: str) -> None:
    small, large = tmp_path / f"small{end}", tmp_path / f"large{end}"
    member = gzip.compress(content, 1) if end else content
    small.write_bytes(member)
    with large.open("wb") as file:
        for _ in range(10):
            file.write(member)

    (small_rows, small_bytes), (large_rows, large_bytes) = _read(small), _read(large)
    large.unlink()

    assert (small_rows, large_rows) == (NUM_ROWS, 10 * NUM_ROWS)
    # The file is 300 MB; a batch is 4 MiB, and its rows as much again.
    assert large_bytes - small_bytes < 30 * MIB


def test_a_length_beyond_the_files_end_takes_no_memory(content: bytes, tmp_path: Path) -> None:
    length = (2**30).to_bytes(8, "little")
    header = length + masked_crc32c(length).to_bytes(4, "little")
    (tmp_path / "short").write_bytes(content[: 5 * MIB])
    (tmp_path / "long").write_bytes(header + content[: 5 * MIB])

    (num_rows, usual_bytes), (num_damaged, peak_bytes) = _read(tmp_path / "short"), _read(tmp_path / "long")

    assert num_rows > 1000
    assert num_damaged == 0
    assert peak_bytes - usual_bytes < 30 * MIB
