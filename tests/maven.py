"""Jars of Maven Central for tests, kept in Maven's own repository."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

_GOAL = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:build-classpath"
_DEADLINE_S = 300.0
_ALONE = "<exclusions><exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion></exclusions>"


@functools.cache
def resolve(pom: Path) -> tuple[str, str | None]:
    """The runtime classpath of a project; and why there is none, where there is none."""
    if shutil.which("mvn") is None:
        return "", "mvn is not on the PATH"
    with tempfile.TemporaryDirectory(prefix="tensorspark-maven-") as directory:
        output = Path(directory, "classpath")
        # Without the network first: where the jars are in Maven's repository already, it takes a second or two.
        for offline in (["--offline"], []):
            reason = _run(
                ["--file", str(pom), *offline, _GOAL, f"-Dmdep.outputFile={output}", "-DincludeScope=runtime"]
            )
            if reason is None and output.is_file():
                return output.read_text().strip(), None
    return "", f"mvn could not resolve {pom}: {reason or 'it wrote no classpath'}"


def classpath(*alone: str, whole: Sequence[str] = ()) -> str:
    """The classpath of artifacts ``group:name:version``; skips the test where Maven cannot get them.

    Args:
        alone: those that are wanted without what they depend on.
        whole: those that are wanted with it.
    """
    with tempfile.TemporaryDirectory(prefix="tensorspark-jars-") as directory:
        pom = Path(directory, "pom.xml")
        dependencies = "".join([*(_dependency(each, _ALONE) for each in alone), *map(_dependency, whole)])
        pom.write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>tensorspark.tests</groupId><artifactId>jars</artifactId>"
            f"<version>1</version><packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>"
        )
        found, reason = resolve(pom)
    if reason is not None:
        pytest.skip(f"{', '.join((*alone, *whole))}: {reason}")
    return found


def _run(arguments: list[str]) -> str | None:
    try:
        ended = subprocess.run(
            ["mvn", "--batch-mode", "--quiet", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_DEADLINE_S:g} s"
    # Its first line says what is missing, the others how to ask for more.
    said = re.sub(r"\x1b\[\d*m", "", ended.stdout + ended.stderr).strip()
    return None if ended.returncode == 0 else said.partition("\n")[0]


def _dependency(artifact: str, exclusions: str = "") -> str:
    group, name, version = artifact.split(":")
    names = f"<groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version>"
    return f"<dependency>{names}{exclusions}</dependency>"
