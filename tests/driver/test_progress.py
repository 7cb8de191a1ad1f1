"""Progress as it is seen: on the screen of a real terminal, in a file, and in the cells of a real kernel."""

from __future__ import annotations

import fcntl
import io
import os
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import pytest
from tqdm import tqdm

from tensorspark.driver.displays import Part, fitting
from tensorspark.driver.progress import ProgressLine, describe
from tensorspark.ps.messages import Status

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 30
END = "~the end~"


class Clock:
    """Seconds that pass when the test says so; it begins somewhere."""

    def __init__(self) -> None:
        self.now = 5_000.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """What a terminal shows: rows of characters, a cursor, carriage returns, line ends and wrapping; nothing else."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = [""]
        self._column = 0

    def write(self, text: str) -> None:
        for sign in text:
            if sign == "\r":
                self._column = 0
            elif sign == "\n":
                self.rows.append("")
            else:
                assert sign.isprintable(), f"{sign!r} in {text!r}"
                self._put(sign)

    def _put(self, sign: str) -> None:
        if self._column == self.columns:
            self.rows.append("")
            self._column = 0
        row = self.rows[-1].ljust(self._column)
        self.rows[-1] = row[: self._column] + sign + row[self._column + 1 :]
        self._column += 1

    @property
    def lines(self) -> list[str]:
        """The rows, without what is blank at their ends and at the screen's."""
        rows = [row.rstrip() for row in self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows


class Terminal:
    """A pseudo-terminal: a stream to write to, and the screen that shows it."""

    def __init__(self, columns: int = 100) -> None:
        self.master, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.screen = Screen(columns)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        self.screen.columns = columns
        fcntl.ioctl(self.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def lines(self) -> list[str]:
        """Of the screen, once all that was written is there: a mark, written behind it, says so."""
        self.stream.write(END)
        self.stream.flush()
        self.screen.write(self.read_until(END).removesuffix(END))
        return self.screen.lines

    def read_until(self, text: str) -> str:
        read, give_up_at = b"", time.monotonic() + DEADLINE_S
        while not (wanted := text.encode()) or wanted not in read:
            ready, _, _ = select.select([self.master], [], [], max(0.0, give_up_at - time.monotonic()))
            assert ready, f"{text!r} never came: {read!r}"
            read += os.read(self.master, 65_536)
        return read.decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def begin(terminal: Terminal, clock: Clock) -> Iterator[Callable[..., ProgressLine]]:
    """Makes lines, on the terminal unless told otherwise. They are ended with the test: bars know of each other."""
    lines: list[ProgressLine] = []

    def begin(name: str = "mnist", enabled: bool = True, stream: TextIO | None = None) -> ProgressLine:
        lines.append(ProgressLine(name, enabled, stream or terminal.stream, clock=clock))
        return lines[-1]

    yield begin
    for line in lines:
        line.abandon()


Begin = Callable[..., ProgressLine]


def status(num_steps: int = 20, progress: float | None = 0.25, **changed: Any) -> Status:
    values: dict[str, Any] = {
        "run": 3,
        "num_steps": num_steps,
        "num_samples": 32 * num_steps,
        "num_partitions": 4,
        "num_live": 2,
        "num_lost": 0,
        "num_standby": 0,
        "num_waiting": 0,
        "num_finished": 0,
        "progress": progress,
        "scalars": {"loss": 1.2345678},
    }
    return Status(**(values | changed))


# In a terminal


def test_a_bar_shows_share_epoch_step_loss_rate_workers_and_time_left(
    terminal: Terminal, clock: Clock, begin: Begin
) -> None:
    terminal.resize(150)
    line = begin()
    line.show(status(200, 0.1, epoch=0, num_epochs=5))
    clock.now += 20
    line.show(status(1_200, 0.35, epoch=1, num_epochs=5, num_lost=1, num_waiting=2))
    # 1,000 steps of 32 rows in 20 s; a quarter took 20 s, 0.65 are left.
    (shown,) = terminal.lines()
    head, _, tail = shown.rpartition("|")
    assert head.startswith("mnist:  35%|█")
    expected = "epoch 2/5  step 1,200  loss 1.235  1,600 samples/s  2 live  1 lost  2 waiting  0 of 4 partitions done"
    assert tail.split() == (expected + "  ETA 0:52").split()


def test_the_bars_length_is_the_share(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    lengths = []
    for share in (0.0, 0.25, 0.5, 1.0):
        line.show(status(20, share))
        clock.now += 1
        bar = terminal.lines()[0].split("|")[1]
        lengths.append(sum(sign == "█" for sign in bar) / len(bar))
    assert lengths == pytest.approx([0, 0.25, 0.5, 1.0], abs=0.1)
    assert lengths[0] == 0
    assert lengths[-1] == 1


def test_the_bar_never_goes_back_and_is_not_there_before_the_share_is_known(
    terminal: Terminal, clock: Clock, begin: Begin
) -> None:
    line = begin()
    shown = []
    for share in (None, 0.5, 0.25, None, 0.75):
        line.show(status(20, share))
        clock.now += 1
        shown.append(terminal.lines()[0])
    assert shown[0].startswith("mnist: step 20  loss 1.235")
    assert "|" not in shown[0]
    assert [line.partition("|")[0] for line in shown[1:]] == ["mnist:  50%"] * 3 + ["mnist:  75%"]


def test_a_share_just_below_one_is_not_called_all(terminal: Terminal, begin: Begin) -> None:
    begin().show(status(20, 0.9999))
    assert terminal.lines()[0].startswith("mnist:  99%|")


def test_before_the_first_step_a_terminal_says_who_is_there(terminal: Terminal, begin: Begin) -> None:
    line = begin()
    line.show(status(0, None, num_live=1, scalars={}))
    assert terminal.lines() == ["mnist: starting, 1 live"]
    line.show(status(8))  # at once, however short a time has passed
    assert terminal.lines()[0].startswith("mnist:  25%|")


def test_the_screen_is_drawn_five_times_a_second_at_most(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    line.show(status(1))
    clock.now += 0.19
    line.show(status(2))
    assert "step 1 " in terminal.lines()[0]
    clock.now += 0.02
    line.show(status(3))
    assert "step 3 " in terminal.lines()[0]


def test_the_last_status_is_shown_at_once_and_ends_the_line_with_the_mean_rate(
    terminal: Terminal, clock: Clock, begin: Begin
) -> None:
    terminal.resize(130)
    clock_began = clock.now
    line = begin()
    clock.now = clock_began + 10  # start-up
    line.show(status(100, 0.1))
    clock.now = clock_began + 60
    line.show(status(600, 0.6))
    clock.now = clock_began + 75.1
    line.show(status(1_000, 1.0, num_live=0, num_finished=4), last=True)
    terminal.stream.write(">>> ")
    shown, prompt = terminal.lines()
    # 900 steps of 32 rows in 65.1 s
    assert shown.endswith("step 1,000  loss 1.235  442 samples/s  0 live  4 of 4 partitions done  took 1:15")
    assert shown.startswith("mnist: 100%|█")
    assert prompt == ">>>"


def test_the_rate_is_that_of_the_last_half_minute(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    num_steps = 0
    for second in range(121):
        num_steps += 10 if second < 60 else 1_000
        line.show(status(num_steps, 0.5))
        clock.now += 1
    assert "32,000 samples/s" in terminal.lines()[0]


@pytest.mark.parametrize("columns", [40, 57, 80, 300])
def test_a_bar_stays_on_one_row_however_wide_the_terminal_and_keeps_what_matters(
    columns: int, terminal: Terminal, clock: Clock, begin: Begin
) -> None:
    terminal.resize(columns)
    line = begin("a session whose name is long")
    scalars = {f"metric_{number}": number + 0.5 for number in range(9)}
    for step in range(1, 50):
        line.show(
            status(step * 12_345, step / 50, scalars={"loss": 1 / step} | scalars, epoch=step // 5, num_epochs=10)
        )
        clock.now += 60
    rows = terminal.lines()
    assert len(rows) == 1
    assert len(rows[0]) < columns
    assert "98%|" in rows[0]
    assert "loss 0.02041" in rows[0]
    assert ("ETA 1:00" in rows[0]) == (columns > 40)
    assert ("metric_8 8.5" in rows[0]) == (columns == 300)


def test_a_window_made_narrower_is_noticed(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    line.show(status(20))
    terminal.resize(50)
    terminal.lines()
    terminal.screen.rows = [""]  # how a terminal breaks the old row is its own affair
    clock.now += 1
    line.show(status(40))
    assert len(terminal.lines()) == 1
    assert len(terminal.lines()[0]) < 50


def test_a_note_stands_above_a_bar_that_is_whole(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    line.note("checkpoints go to file:///tmp/c")
    line.show(status(20))
    line.note("a worker was lost")
    line.note("and came again")
    clock.now += 1
    line.show(status(40), last=True)
    *notes, bar = terminal.lines()
    assert notes == ["mnist: checkpoints go to file:///tmp/c", "mnist: a worker was lost", "mnist: and came again"]
    assert bar.startswith("mnist:  25%|")
    assert bar.endswith("took 0:01")


def test_what_another_program_left_on_the_row_is_overwritten(terminal: Terminal, clock: Clock, begin: Begin) -> None:
    """Spark's shell draws a bar of 80 columns of its own, and puts the cursor back."""
    line = begin()
    line.show(status(20, None))
    terminal.stream.write("\r[Stage 0:" + ">".rjust(60) + "(0 + 2) / 2]\r")
    clock.now += 1
    line.show(status(40, None))
    assert terminal.lines() == ["mnist: step 40  loss 1.235  640 samples/s  2 live  0 of 4 partitions done"]


@pytest.mark.parametrize("num_shown", [0, 1, 3])
def test_a_traceback_begins_on_its_own_row(num_shown: int, terminal: Terminal, clock: Clock, begin: Begin) -> None:
    line = begin()
    for step in range(num_shown):
        line.show(status(step + 1))
        clock.now += 1
    line.abandon()
    line.abandon()
    terminal.stream.write("Traceback (most recent call last):\n")
    rows = terminal.lines()
    assert rows[-1] == "Traceback (most recent call last):"
    assert len(rows) == 1 + min(num_shown, 1)


def test_a_name_with_braces_and_line_breaks_is_shown_as_it_is(terminal: Terminal, begin: Begin) -> None:
    begin("a {bar}\n{0} c").show(status())
    assert terminal.lines()[0].startswith("a {bar} {0} c:  25%|")


def test_two_bars_in_a_row_take_a_row_each(terminal: Terminal, begin: Begin) -> None:
    for name in ("first", "second"):
        line = begin(name)
        line.show(status(20))
        line.show(status(40, 1.0), last=True)
    assert [row[:6] for row in terminal.lines()] == ["first:", "second"]


def test_the_bar_starts_no_thread(terminal: Terminal, clock: Clock) -> None:
    code = (
        "import sys, threading\nfrom tensorspark.driver.progress import ProgressLine\n"
        "from tests.driver.test_progress import Terminal, status\n"
        "terminal = Terminal()\nProgressLine('mnist', stream=terminal.stream).show(status())\n"
        "print(threading.active_count(), 'mnist' in terminal.lines()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.stdout == "1 True\n", done.stderr


INTERRUPTED = """
import fcntl, sys, termios, threading
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tensorspark.driver.progress import ProgressLine
from tests.driver.test_progress import status
line = ProgressLine("mnist")
try:
    line.show(status(20))
    print("shown", flush=True)
    threading.Event().wait(60)
except BaseException:
    line.abandon()
    raise
"""


@pytest.mark.parametrize("columns", [40, 80])
def test_ctrl_c_leaves_the_bar_whole_and_the_traceback_below_it(columns: int, terminal: Terminal) -> None:
    terminal.resize(columns)
    slave = terminal.stream.fileno()
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdin=slave, stdout=subprocess.PIPE, stderr=slave, cwd=REPOSITORY,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"shown\n"
        os.write(terminal.master, b"\x03")
        process.wait(DEADLINE_S)
    rows = terminal.lines()
    assert rows[0].startswith("mnist:  25%|")
    assert rows[0].endswith("^C")
    assert rows[1].startswith("Traceback")
    assert rows[-1] == "KeyboardInterrupt"


class Interrupted(io.TextIOBase):
    """A terminal at which somebody presses Ctrl-C while a bar is being written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_due = True

    def write(self, text: str) -> int:
        num = self._stream.write(text)
        if "%|" in text and self._is_due:
            self._is_due = False
            raise KeyboardInterrupt
        return num

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()


@pytest.mark.parametrize("num_shown", [0, 1])
def test_ctrl_c_in_the_middle_of_drawing_leaves_a_whole_bar_and_no_lock(
    num_shown: int, terminal: Terminal, clock: Clock, begin: Begin
) -> None:
    line = begin(stream=Interrupted(terminal.stream))
    for _ in range(num_shown):
        line.show(status(10, None))
        clock.now += 1
    with pytest.raises(KeyboardInterrupt):
        line.show(status(20))
    line.abandon()
    terminal.stream.write("Traceback")
    bar, traceback = terminal.lines()
    assert bar.startswith("mnist:  25%|")
    assert traceback == "Traceback"
    # Nobody else's bar waits for ours.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_can_lock).result(2 * DEADLINE_S)


def _can_lock() -> bool:
    for lock in tqdm.get_lock().locks:
        if not lock.acquire(timeout=DEADLINE_S):
            return False
        lock.release()
    return True


# Where there is no terminal


def test_a_file_gets_a_plain_line_for_the_first_step_then_one_every_ten_seconds_and_the_last(
    clock: Clock, begin: Begin
) -> None:
    file = io.StringIO()
    line = begin(stream=file)
    began = clock.now
    for tenth in range(1, 250):
        clock.now = began + tenth / 10
        num_steps = max(0, tenth - 20)
        line.show(status(num_steps, num_steps / 240 if num_steps else None))
    line.show(status(240, 1.0, num_live=0, num_finished=4), last=True)
    assert file.getvalue().splitlines() == [
        "mnist: step 1  loss 1.235  2 live  0 of 4 partitions done  0%",
        "mnist: step 101  loss 1.235  320 samples/s  2 live  0 of 4 partitions done  ETA 0:13  42%",
        "mnist: step 201  loss 1.235  320 samples/s  2 live  0 of 4 partitions done  ETA 0:03  83%",
        "mnist: step 240  loss 1.235  335 samples/s  0 live  4 of 4 partitions done  took 0:24  100%",
    ]


def test_a_file_is_told_every_ten_seconds_also_that_no_step_came_yet(clock: Clock, begin: Begin) -> None:
    file = io.StringIO()
    line = begin("", stream=file)
    for num_live in (0, 0, 1):
        line.show(status(0, None, num_live=num_live, scalars={}))
        clock.now += 9
    assert file.getvalue() == "tensorspark: starting, 1 live\n"


def test_notes_in_a_file_are_lines_and_an_end_writes_nothing(begin: Begin) -> None:
    file = io.StringIO()
    line = begin(stream=file)
    line.note("one")
    line.show(status())
    line.note("two")
    line.abandon()
    assert [text[:10] for text in file.getvalue().splitlines()] == ["mnist: one", "mnist: ste", "mnist: two"]
    assert file.getvalue().endswith("two\n")


def test_nothing_is_shown_where_progress_is_off(terminal: Terminal, begin: Begin) -> None:
    for stream in (terminal.stream, io.StringIO()):
        line = begin("mnist", False, stream)
        line.note("a note")
        line.show(status())
        line.show(status(), last=True)
        line.abandon()
    assert terminal.lines() == []
    assert stream.getvalue() == ""


def test_parts_go_by_their_rank_until_the_rest_fits() -> None:
    parts = [Part("a" * 5, 2), Part("b" * 5, 9), Part("c" * 5, 1)]
    assert fitting(parts, 19) == "aaaaa  bbbbb  ccccc"
    assert fitting(parts, 18) == "aaaaa  ccccc"
    assert fitting(parts, 11) == "ccccc"
    assert fitting(parts, 3) == "ccc"


@pytest.mark.parametrize(("staleness", "shown"), [(None, False), (0.0, False), (1.26, True)])
def test_staleness_is_shown_where_pushes_are_based_on_older_weights(staleness: float | None, shown: bool) -> None:
    texts = [part.text for part in describe(status(staleness=staleness))]
    assert ("staleness 1.3" in texts) == shown
    assert sum(text.startswith("staleness") for text in texts) == shown


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [Broken, closed, lambda: None], ids=["its reader is gone", "closed", "none at all"])
def test_a_stderr_that_takes_nothing_ends_no_training(
    make: Callable[[], io.StringIO | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    for enabled in (True, False):
        line = ProgressLine("mnist", enabled)
        line.note("dashboard at ...")
        line.show(status())
        line.show(status(), last=True)
        line.abandon()


def test_a_name_that_stderr_cannot_spell_ends_no_training() -> None:
    raw = io.BytesIO()
    line = ProgressLine("\u8a13\u7df4", stream=io.TextIOWrapper(raw, encoding="ascii"))
    line.show(status(), last=True)
    line.show(status(), last=True)
