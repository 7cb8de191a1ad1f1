"""Which files a read takes, what their directories say, and how they are packed."""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from tensorspark.data.tfrecord.options import Options
from tensorspark.data.tfrecord.storage.paths import (
    DataFile,
    codec_of,
    directory_name,
    list_files,
    pack,
    partition_schema,
    partition_value,
)
from tensorspark.errors import ConfigError


def _write(path: Path, num_bytes: int = 3) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(num_bytes))
    return str(path)


def _paths(*urls: str | Path, **options: str) -> list[str]:
    given = {"paths": "[" + ",".join(f'"{url}"' for url in urls) + "]", **options}
    return [file.path for file in list_files(Options.parse(given))]


def _file(path: str, num_bytes: int, **values: str | None) -> DataFile:
    return DataFile("/", path, num_bytes, 0, tuple(values.items()))


# --- listing ----------------------------------------------------------------------------------------------------------


def test_a_directory_gives_its_visible_files_in_order(tmp_path: Path) -> None:
    second, first = _write(tmp_path / "part-r-00001"), _write(tmp_path / "part-r-00000.gz")
    for hidden in ("_SUCCESS", "_temporary/0/part-r-00002", ".part-r-00000.crc", "part-r-00003._COPYING_"):
        _write(tmp_path / hidden)
    _write(tmp_path / "other" / "part-r-00004")

    assert _paths(tmp_path) == [first, second]


def test_a_files_size_and_time_are_those_of_the_filesystem(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", 17)
    os.utime(path, (1_700_000_000, 1_700_000_000))

    (file,) = list_files(Options.parse({"path": str(tmp_path)}))

    assert (file.num_bytes, file.modified_us) == (17, 1_700_000_000_000_000)


def test_recursive_lookup_enters_all_directories_and_takes_no_columns(tmp_path: Path) -> None:
    deep, shallow = _write(tmp_path / "a" / "b" / "one"), _write(tmp_path / "two")
    partitioned = _write(tmp_path / "p=1" / "three")

    files = list_files(Options.parse({"path": str(tmp_path), "recursiveFileLookup": "true"}))

    assert [file.path for file in files] == [deep, partitioned, shallow]
    assert all(file.values == () for file in files)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("2024-*", ["2024-01/f", "2024-02/f"]),
        ("2024-0[2-9]", ["2024-02/f"]),
        ("202?-01", ["2024-01/f", "2025-01/f"]),
        ("{2024-02,2025-01}", ["2024-02/f", "2025-01/f"]),
        ("2024-*/f", ["2024-01/f", "2024-02/f"]),
    ],
)
def test_a_glob_takes_what_hadoops_takes(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for month in ("2024-01", "2024-02", "2025-01"):
        _write(tmp_path / month / "f")

    assert _paths(tmp_path / pattern) == [str(tmp_path / path) for path in expected]


def test_a_path_that_exists_as_it_is_written_is_no_glob(tmp_path: Path) -> None:
    literal = _write(tmp_path / "a[1]" / "f")
    _write(tmp_path / "a1" / "f")

    assert _paths(tmp_path / "a[1]") == [literal]


@pytest.mark.parametrize("again", ["{}/b", "{}/b/", "{}/b/f*", "{}/*", "file://{}/b"])
def test_a_list_of_paths_gives_each_file_once(tmp_path: Path, again: str) -> None:
    first, second = _write(tmp_path / "a" / "f"), _write(tmp_path / "b" / "f")

    assert _paths(tmp_path / "b", tmp_path / "a", again.format(tmp_path)) == [second, first]


@pytest.mark.parametrize("urls", [[""], ["*"], ["a.tfrecord", "b.tfr", "c.txt"]], ids=["directory", "glob", "files"])
def test_the_name_filter_applies_to_names_of_files(tmp_path: Path, urls: list[str]) -> None:
    wanted = [_write(tmp_path / "a.tfrecord"), _write(tmp_path / "b.tfr")]
    _write(tmp_path / "c.txt")

    assert _paths(*(tmp_path / url for url in urls), pathGlobFilter="*.{tfrecord,tfr}") == wanted


def test_links_are_followed_and_what_has_no_end_is_passed_over(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    expected = [_write(tmp_path / "in" / "k=0" / "f"), str(tmp_path / "in" / "k=1" / "g")]
    _write(elsewhere / "g")
    (tmp_path / "in" / "k=1").symlink_to(elsewhere)
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe")

    assert _paths(tmp_path / "in") == expected
    assert _paths(tmp_path / "in", recursiveFileLookup="true") == expected[:1]


@pytest.mark.parametrize(("texts", "values"), [(["+7", "007"], [7, 7]), (["\u0661\u0662", "7"], ["\u0661\u0662", "7"])])
def test_numbers_of_directories_are_read_as_they_were_typed(texts: list[str], values: list[Any]) -> None:
    files = [_file(f"/{text}", 1, k=text) for text in texts]
    (field,) = partition_schema(files)
    assert [partition_value(file, field).as_py() for file in files] == values


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"expected '{tmp_path}/absent' to exist, but nothing is there"):
        _paths(tmp_path / "absent")


def test_a_glob_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected '.*/absent\*' to match files or directories, but it matches none"):
        _paths(tmp_path / "absent*")


def test_an_empty_directory_has_no_files(tmp_path: Path) -> None:
    assert _paths(tmp_path) == []


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    directory = f"/listing-{uuid.uuid4().hex}"
    yield f"memory:/{directory}"
    filesystem.rm(directory, recursive=True)


def test_other_filesystems_are_listed_alike(memory: str) -> None:
    filesystem, directory = fsspec.url_to_fs(memory)
    for name in ("p=2/b", "p=10/a", "_SUCCESS"):
        filesystem.pipe(f"{directory}/{name}", b"12345")

    files = list_files(Options.parse({"path": memory}))

    assert [(file.path, file.num_bytes, file.values) for file in files] == [
        (f"{directory}/p=10/a", 5, (("p", "10"),)),
        (f"{directory}/p=2/b", 5, (("p", "2"),)),
    ]


class _RemembersListings(fsspec.AbstractFileSystem):
    """Local files, listed once, as some of fsspec's remote filesystems are until their cache is invalidated."""

    protocol = "remembered"

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        if path not in self.dircache:
            if not Path(path).is_dir():
                raise FileNotFoundError(path)
            self.dircache[path] = [
                {"name": str(each), "size": each.stat().st_size, "type": "directory" if each.is_dir() else "file"}
                for each in sorted(Path(path).iterdir())
            ]
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


@pytest.mark.parametrize("name", ["late", "l*", ""], ids=["file", "glob", "directory"])
def test_what_was_written_since_the_last_listing_is_found(tmp_path: Path, name: str) -> None:
    fsspec.register_implementation("remembered", _RemembersListings, clobber=True)
    early, url = _write(tmp_path / "early"), f"remembered://{tmp_path}"
    for before in ("", "/*", "/early"):
        assert _paths(f"{url}{before}") == [early]

    late = _write(tmp_path / "late")

    assert late in _paths(f"{url}/{name}")


# --- columns from directories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "-20"], pa.int32()),
        (["1", str(2**31)], pa.int64()),
        ([str(-(2**63)), str(2**63 - 1)], pa.int64()),
        ([str(2**63)], pa.string()),
        (["1", "2.5"], pa.float64()),
        (["2024-02-29", "2024-12-31"], pa.date32()),
        (["2023-02-29"], pa.string()),
        (["1", "x"], pa.string()),
        (["7", None], pa.int32()),
        ([None], pa.string()),
    ],
)
def test_directories_columns_are_typed_by_all_their_values(texts: list[str | None], expected: pa.DataType) -> None:
    schema = partition_schema([_file("f", 1, p=text) for text in texts])

    assert schema == pa.schema([pa.field("p", expected)])


def test_nested_directories_give_columns_outermost_first(tmp_path: Path) -> None:
    _write(tmp_path / "year=2024" / "name=a%2Fb c" / "f")
    _write(tmp_path / "year=2025" / "name=__HIVE_DEFAULT_PARTITION__" / "f")

    files = list_files(Options.parse({"path": str(tmp_path)}))

    assert [file.values for file in files] == [
        (("year", "2024"), ("name", "a/b c")),
        (("year", "2025"), ("name", None)),
    ]


def test_a_base_path_gives_columns_above_what_is_read(tmp_path: Path) -> None:
    wanted = _write(tmp_path / "year=2024" / "month=2" / "f")
    _write(tmp_path / "year=2025" / "month=2" / "f")

    for url in (tmp_path / "year=2024", tmp_path / "year=2024" / "month=2", wanted, tmp_path / "year=*4"):
        (file,) = list_files(Options.parse({"path": str(url), "basePath": str(tmp_path)}))

        assert (file.path, file.values) == (wanted, (("year", "2024"), ("month", "2")))


def test_a_base_path_that_is_not_above_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a" / "f")

    with pytest.raises(ConfigError, match=f"basePath: expected a directory above {tmp_path}/a, got {tmp_path}/b"):
        list_files(Options.parse({"path": str(tmp_path / "a"), "basePath": str(tmp_path / "b")}))


@pytest.mark.parametrize(
    ("text", "data_type", "expected"),
    [
        ("12", pa.int64(), 12),
        ("12", pa.string(), "12"),
        ("true", pa.bool_(), True),
        ("2024-02-29", pa.date32(), datetime.date(2024, 2, 29)),
        (None, pa.int32(), None),
    ],
)
def test_a_directorys_value_takes_the_type_that_is_asked_for(
    text: str | None, data_type: pa.DataType, expected: object
) -> None:
    assert partition_value(_file("f", 1, p=text), pa.field("p", data_type)).as_py() == expected


def test_a_directorys_value_of_another_type_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"column 'p': expected int32 from the name of the directory, got 'x' \(/d/f\)"
    ):
        partition_value(_file("/d/f", 1, p="x"), pa.field("p", pa.int32()))


def test_directories_that_disagree_on_columns_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "p=1" / "f")
    _write(tmp_path / "f")

    with pytest.raises(ConfigError, match=r"directories that give the same columns, got none: .*; p: .*p=1/f"):
        _paths(tmp_path)


@pytest.mark.parametrize("text", ["plain", "a/b", "50%", "a=b:c", 'q"uote', "line\nbreak", "[x]{y}^", "ünï"])
def test_a_directorys_name_gives_back_its_value(tmp_path: Path, text: str) -> None:
    name = directory_name("the column", text)
    assert "/" not in name
    _write(tmp_path / name / "f")

    (file,) = list_files(Options.parse({"path": str(tmp_path)}))

    assert file.values == (("the column", text),)


def test_null_and_the_empty_text_share_a_directory_as_in_spark() -> None:
    assert directory_name("p", None) == directory_name("p", "") == "p=__HIVE_DEFAULT_PARTITION__"


# --- packing ----------------------------------------------------------------------------------------------------------


def test_large_files_go_alone_and_small_ones_together() -> None:
    sizes = {"a": 90, "b": 200, "c": 30, "d": 20, "e": 40}
    packed = pack([_file(name, size) for name, size in sizes.items()], 100, 1, 1)

    # By size: 200 | 90 | 40 + 30 + 20, each but the first in a partition counting one more byte.
    assert [[file.path for file in part] for part in packed] == [["b"], ["a"], ["e", "c", "d"]]


def test_files_spread_over_the_wanted_number_of_partitions() -> None:
    files = [_file(f"f{i}", 10) for i in range(8)]

    # (8 x 11) / 4 = 22 bytes a partition: two files of 10 + 1.
    assert [len(part) for part in pack(files, 1000, 1, 4)] == [2, 2, 2, 2]
    assert [len(part) for part in pack(files, 1000, 1, 1)] == [8]


def test_no_file_is_split_or_lost() -> None:
    files = [_file(f"f{i}", (i * 37) % 101) for i in range(50)]

    packed = pack(files, 120, 4, 3)

    assert sorted(file.path for part in packed for file in part) == sorted(file.path for file in files)
    assert pack([], 120, 4, 3) == []


# --- codecs -----------------------------------------------------------------------------------------------------------


def test_the_codec_is_what_the_name_says_before_what_the_option_says() -> None:
    assert codec_of("part-r-00000.gz", None) == "gzip"
    assert codec_of("part-r-00000.DEFLATE", "gzip") == "zlib"
    assert codec_of("train.tfrecord", "gzip") == "gzip"
    assert codec_of("train.tfrecord", None) is None


def test_a_codec_that_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"part-0\.bz2: expected a file without compression, or \.gz, \.deflate"):
        codec_of("part-0.bz2", None)
