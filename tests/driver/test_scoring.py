"""Models that are saved and exported appear whole, on local disks and on a real HDFS, or not at all."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensorspark.data.filesystem import open_filesystem
from tensorspark.driver.scoring import export, save
from tensorspark.errors import ConfigError

USER = getpass.getuser()
FILES = {"saved_model.pb": b"graph", "variables/variables.index": b"index", "variables/variables.data": b"\0" * 100_000}


@pytest.fixture(params=["local", pytest.param("hdfs", marks=pytest.mark.hdfs)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty directory."""
    if request.param == "local":
        return str(tmp_path)
    hdfs = request.getfixturevalue("hdfs")
    name = f"/scoring-{tmp_path.name}"
    hdfs.make_directory(name, owner=USER)
    return f"{hdfs.url}{name}"


def write(directory: str) -> None:
    for name, content in FILES.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Path(directory, "assets").mkdir()


def found(url: str) -> dict[str, bytes]:
    """All files under the URL, by their names there."""
    filesystem, path = open_filesystem(url, USER)
    return {name.split(path, 1)[1].strip("/"): filesystem.cat_file(name) for name in filesystem.find(path)}


def test_an_exported_directory_has_all_files_and_stands_where_it_was_asked_for(root: str) -> None:
    export(write, f"{root}/models/digits", USER)
    assert found(f"{root}/models") == {f"digits/{name}": content for name, content in FILES.items()}
    filesystem, path = open_filesystem(f"{root}/models/digits", USER)
    assert filesystem.isdir(f"{path}/assets")
    with pytest.raises(ConfigError, match="models/digits exists already"):
        export(write, f"{root}/models/digits", USER)
    export(write, f"{root}/models/other/", USER)
    assert len(found(f"{root}/models")) == 2 * len(FILES)


def test_an_export_that_breaks_off_leaves_nothing_and_can_be_repeated(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes
    num_read = 0

    def break_off(path: Path) -> bytes:
        nonlocal num_read
        num_read += 1
        if num_read == 3:
            raise OSError("the disk is gone")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", break_off)
    with pytest.raises(OSError, match="the disk is gone"):
        export(write, f"{root}/digits", USER)
    assert found(root) == {}
    export(write, f"{root}/digits", USER)
    assert len(found(root)) == len(FILES)


@pytest.mark.parametrize("end", [lambda content: content, lambda content: content * 2])
def test_a_saved_file_is_replaced_whole(root: str, end: Callable[[bytes], Any]) -> None:
    save(b"first", f"{root}/deep/er/digits.keras", USER)
    save(end(b"second"), f"{root}/deep/er/digits.keras", USER)
    assert found(root) == {"deep/er/digits.keras": end(b"second")}
    with pytest.raises(ConfigError, match=r"ends with \.keras"):
        save(b"", f"{root}/digits.h5", USER)
