"""Options of the TFRecord data source: names, values, and what is said of wrong ones."""

from __future__ import annotations

import pytest

from tensorspark.data.tfrecord.options import Options
from tensorspark.errors import ConfigError


def test_names_and_values_do_not_depend_on_case() -> None:
    options = Options.parse({"PATH": "/a", "RecordTYPE": "sequenceexample", "verifychecksum": "FALSE"})

    assert options.urls == ("/a",)
    assert options.record_type == "SequenceExample"
    assert options.verifies is False


def test_a_list_of_paths_comes_as_json() -> None:
    assert Options.parse({"paths": '["/a","/b,c"]'}).urls == ("/a", "/b,c")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", None),
        ("none", None),
        ("GZIP", "gzip"),
        ("org.apache.hadoop.io.compress.GzipCodec", "gzip"),
        ("zlib", "zlib"),
        ("deflate", "zlib"),
        ("org.apache.hadoop.io.compress.DefaultCodec", "zlib"),
    ],
)
def test_a_codec_has_the_connectors_names_and_hadoops(given: str, expected: str | None) -> None:
    assert Options.parse({"path": "/a", "codec": given}).codec == expected


@pytest.mark.parametrize(("given", "expected"), [("1234", 1234), ("128MB", 2**27), ("3k", 3072), ("134217728b", 2**27)])
def test_sizes_take_sparks_units(given: str, expected: int) -> None:
    assert Options.parse({"path": "/a", "maxPartitionBytes": given}).max_partition_bytes == expected


def test_columns_stand_between_commas() -> None:
    options = Options.parse({"path": "/a", "partitionBy": "year, month", "binaryFeatures": "image"})

    assert options.partition_by == ("year", "month")
    assert options.binary_features == {"image"}


def test_names_that_are_nobodys_are_ignored() -> None:
    others = ("header", "inferSchema", "mergeSchema", "ignoreMissingFiles", "checkpointLocation", "queryName", "path")

    assert Options.parse(dict.fromkeys(others, "/a")) == Options(("/a",))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("recordTyp", "recordType"),
        ("RECORD_TYPE", "recordType"),
        ("verifyCheckSums", "verifyChecksum"),
        ("compression", "codec"),
        ("codecs", "codec"),
        ("maxRecordPerFile", "maxRecordsPerFile"),
        ("recursiveLookup", "recursiveFileLookup"),
    ],
)
def test_a_misspelled_name_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected the name of an option, .*; did you mean {meant}\\?$"):
        Options.parse({"path": "/a", name: "x"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("recordType", "Sample", "recordType: expected one of Example, SequenceExample, ByteArray, got 'Sample'"),
        ("codec", "snappy", "codec: expected one of none, gzip, zlib, deflate, org.apache.*, got 'snappy'"),
        ("writeLocality", "remote", "writeLocality: expected one of distributed, local, got 'remote'"),
        (
            "saveMode",
            "upsert",
            "saveMode: expected one of append, overwrite, error, errorifexists, ignore, got 'upsert'",
        ),
        ("verifyChecksum", "yes", "verifyChecksum: expected one of true, false, got 'yes'"),
        ("inferSchemaSampleRatio", "0", "inferSchemaSampleRatio: expected a number above 0 and at most 1, got '0'"),
        ("inferSchemaSampleRatio", "nan", "inferSchemaSampleRatio: expected a number above 0 and at most 1, got 'nan'"),
        ("maxRecordsPerFile", "many", "maxRecordsPerFile: expected a whole number"),
        ("maxRecordBytes", "0", "maxRecordBytes: expected more than 0, got '0'"),
        ("maxPartitionBytes", "1 parsec", "maxPartitionBytes: expected a whole number, with or without a unit"),
        ("partitionBy", "a,,b", "partitionBy: expected names of columns, each once, between commas, got 'a,,b'"),
        ("partitionOverwriteMode", "some", "partitionOverwriteMode: expected one of static, dynamic, got 'some'"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_those_that_can(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options.parse({"path": "/a", name: value})


def test_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a path to read from or write to, got none"):
        Options.parse({"recordType": "Example"})
