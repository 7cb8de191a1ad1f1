"""How benchmarks measure: what `/proc` tells of processes, rates of epochs, and the report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import REPOSITORY
from benchmarks.measuring import ports, procfs
from benchmarks.measuring.epochs import Epochs, epochs_of, samples_per_s
from benchmarks.measuring.ports import free_port
from benchmarks.measuring.report import Report, argument_parser, program_name
from tensorspark.history import WorkerReport

NO_PROCESS = 2**22 + 1
"""Beyond the largest process id that Linux gives."""

# Ports


def test_free_ports_are_not_among_those_that_the_kernel_gives_to_whoever_asks_for_any() -> None:
    taken: list[socket.socket] = []
    try:
        for _ in range(20):
            taken.append(socket.create_server(("127.0.0.1", free_port())))
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        assert all(each.getsockname()[1] < lowest for each in taken)
    finally:
        for each in taken:
            each.close()


def test_where_no_port_is_free_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(ports, "_LOWEST", port)
        monkeypatch.setattr(ports, "_HIGHEST", port + 1)
        with pytest.raises(OSError, match=f"expected a free port from {port} to {port} of 127.0.0.1, found none"):
            free_port()


# Processes


def test_sizes_are_those_of_the_fields_in_kilobytes() -> None:
    text = "Name:\tsome kB\n1000-2000 ---p 00000000 00:00 0 [rollup]\nPss:  600 kB\nPss_Anon:  512 kB\nThreads:\t4\n"

    assert procfs.sizes(text) == {"Pss": 600 * 1024, "Pss_Anon": 512 * 1024}
    assert procfs.sizes("") == {}


def test_anonymous_memory_grows_by_what_a_process_allocates() -> None:
    num_bytes = 64 * 2**20
    before = procfs.status_bytes("RssAnon")
    held = np.ones(num_bytes, np.uint8)
    after = procfs.status_bytes("RssAnon")

    assert held[-1] == 1
    assert num_bytes * 0.9 <= after - before <= num_bytes * 1.5
    assert procfs.status_bytes("RssAnon", NO_PROCESS) == 0


def test_a_family_is_a_process_with_its_children_and_theirs() -> None:
    wait = "print('up', flush=True); input()"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        child, grandchild = procfs.family(process.pid)
        of_here, parents = procfs.family(os.getpid()), procfs.parents()
        arguments = procfs.arguments(grandchild)
        process.stdin.write("\n")

    assert child == process.pid
    assert (parents[child], parents[grandchild]) == (os.getpid(), child)
    assert {os.getpid(), child, grandchild} <= set(of_here)
    assert wait in arguments


def test_a_process_that_has_ended_runs_and_holds_nothing() -> None:
    assert procfs.arguments(NO_PROCESS) == []
    assert procfs.status_bytes("VmRSS", NO_PROCESS) == procfs.shared_out_bytes(NO_PROCESS, "Pss") == 0
    assert procfs.family(NO_PROCESS) == [NO_PROCESS]


# Epochs


def test_rates_of_workers_leave_the_first_epoch_out_and_add_up() -> None:
    workers = epochs_of(
        [
            WorkerReport(0, epoch_samples=(300, 300, 300), epoch_seconds=(60.0, 5.0, 15.0)),
            WorkerReport(1, epoch_samples=(200, 200, 200), epoch_seconds=(60.0, 6.0, 4.0)),
        ]
    )

    assert workers[1] == Epochs((200, 200, 200), (60.0, 6.0, 4.0))
    assert samples_per_s(workers) == pytest.approx(600 / 20 + 400 / 10)


# The report


def test_an_output_directory_gets_the_figures_and_a_plot(tmp_path: Path) -> None:
    report = Report("demo", ["numpy"])
    report.add("rate", 70_000.0, "samples/s")
    report.add("slow rate", 7.0, "samples/s")
    report.add("ratio", 2.0, "x", at_least=3.0)

    assert report.conclude(None, tmp_path / "new" / "directory", "demo") == 1

    written = tmp_path / "new" / "directory"
    assert [row["met"] for row in json.loads((written / "demo.json").read_text())["rows"]] == [True, True, False]
    assert (written / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        argument_parser("demo").parse_args(["--out", "plots"])

    assert "plots need matplotlib, which is not installed: pip install tensorspark[plot]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [("/repository/benchmarks/wire/__main__.py", "wire"), ("/repository/benchmarks/outer.py", "outer")],
)
def test_a_program_is_called_by_its_package_or_its_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, path: str, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [path])
    report = Report("demo", ["numpy"])
    report.add("rate", 70_000.0, "samples/s")

    assert program_name() == name
    assert argument_parser("demo").format_usage().startswith(f"usage: python -m benchmarks.{name} ")
    assert report.conclude(None, tmp_path) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}


@pytest.mark.parametrize(
    "program", sorted({path.parent.name for path in REPOSITORY.glob("benchmarks/*/__main__.py")} | {"outer", "startup"})
)
def test_every_benchmark_tells_its_options(program: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m benchmarks.{program} [-h] ")
    assert "--quick" in done.stdout
