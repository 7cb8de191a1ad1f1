"""What Linux tells of processes under ``/proc``: who is whose child, what each runs, and how much memory it holds.

A process may end while it is looked at, or be another user's; then it has no arguments and no memory.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
_KIB = 1024


def parents() -> dict[int, int]:
    """The parent of every process that runs, by process id, ascending."""
    found = {}
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        with contextlib.suppress(*_GONE):
            # The command's name stands in parentheses and may hold anything.
            found[pid] = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return found


def children() -> dict[int, list[int]]:
    """The children of every process that has any, ascending."""
    found = defaultdict(list)
    for pid, parent in parents().items():
        found[parent].append(pid)
    return dict(found)


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    by_parent = children()
    found = [pid]
    for member in found:  # grows on the way
        found += by_parent.get(member, ())
    return found


def is_python_daemon(pid: int) -> bool:
    """Whether it is Spark's Python daemon or ours; also one of its workers, which have its command line."""
    return not {"pyspark.daemon", "tensorspark.daemon"}.isdisjoint(arguments(pid))


def arguments(pid: int) -> list[str]:
    """A process's command line. One that was forked and runs no other program has its parent's."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except _GONE:
        return []
    return line.split("\0")


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A size in ``/proc/PID/status``; 0 where the process has ended.

    Args:
        field: such as ``VmRSS``, all that is resident, ``VmHWM``, its peak, or ``RssAnon``, what no file stands for.
    """
    return _fields(pid, "status").get(field, 0)


def shared_out_bytes(pid: int, field: str) -> int:
    """A size in ``/proc/PID/smaps_rollup``, for which the kernel walks the page tables; 0 where the process has ended.

    Args:
        field: such as ``Pss``, where pages that n processes share count as an n-th, or ``Pss_Anon``, of those that no
            file stands for.
    """
    return _fields(pid, "smaps_rollup").get(field, 0)


def forget_peak() -> None:
    """Has this process's ``VmHWM`` begin anew, at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def sizes(text: str) -> dict[str, int]:
    """Every size that a file of ``/proc`` tells in kB, in bytes.

    >>> sizes("Name: some kB\\nThreads:  4\\nPss_Anon:  500 kB\\n")
    {'Pss_Anon': 512000}
    """
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): _KIB * int(row[1]) for row in rows if row[2:] == ["kB"] and row[1].isdecimal()}


def _fields(pid: int | str, file: str) -> dict[str, int]:
    try:
        return sizes(Path(f"/proc/{pid}/{file}").read_text())
    except _GONE:
        return {}
