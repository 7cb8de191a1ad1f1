"""A worker's notebook: what is sent, what waits, what is dropped; and a process's log in it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from tensorspark.errors import ProtocolError
from tensorspark.ps import headers, protocol
from tensorspark.ps.protocol import Kind
from tensorspark.telemetry.notes import Line, Notebook, Timing, logged, untimed

TIMEOUT_S = 10.0
Sent = tuple[tuple[Line, ...], tuple[Timing, ...]]


class Post:
    """Takes notes, or refuses them; lets who waits know."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.notes: list[Sent] = []
        self.is_open = is_open
        self.num_refused = 0
        self._changed = threading.Condition()

    def send(self, lines: tuple[Line, ...], timings: tuple[Timing, ...]) -> bool:
        with self._changed:
            if self.is_open:
                self.notes.append((lines, timings))
            else:
                self.num_refused += 1
            self._changed.notify_all()
            return self.is_open

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, TIMEOUT_S)

    @property
    def lines(self) -> list[Line]:
        return [line for lines, _ in self.notes for line in lines]

    @property
    def timings(self) -> list[Timing]:
        return [timing for _, timings in self.notes for timing in timings]


def line(number: int) -> Line:
    return Line(logging.WARNING, "a.logger", f"line {number}")


def test_lines_arrive_in_order_without_anybody_asking() -> None:
    post = Post()
    with Notebook(post.send) as notebook:
        for number in range(40):
            notebook.write(line(number))
        post.wait_for(lambda: len(post.lines) == 40)
    assert post.lines == [line(number) for number in range(40)]


def test_what_could_not_be_sent_waits_and_comes_once() -> None:
    post = Post(is_open=False)
    with Notebook(post.send) as notebook:
        notebook.write(line(1))
        notebook.write(line(2))
        post.wait_for(lambda: post.num_refused >= 2)
        post.is_open = True
        post.wait_for(lambda: len(post.lines) == 2)
        notebook.write(line(3))
    assert post.lines == [line(1), line(2), line(3)]


def test_too_many_lines_leave_the_newest_out_and_say_how_many() -> None:
    post = Post(is_open=False)
    with Notebook(post.send) as notebook:
        for number in range(213):
            notebook.write(line(number))
        post.is_open = True
        post.wait_for(lambda: len(post.lines) == 201)
    assert post.lines[:200] == [line(number) for number in range(200)]
    assert post.lines[200].message == "13 more lines of this worker were dropped"
    assert post.lines[200].level == logging.WARNING
    assert len(post.lines) == 201


def test_a_line_that_comes_while_it_is_told_what_was_dropped_is_not_dropped_too() -> None:
    post = Post(is_open=False)
    told: list[Line] = []

    def send(lines: tuple[Line, ...], timings: tuple[Timing, ...]) -> bool:
        if post.is_open and "dropped" in lines[0].message and not told:
            told.append(lines[0])
            notebook.write(line(1000))
        return post.send(lines, timings)

    with Notebook(send) as notebook:
        for number in range(201):
            notebook.write(line(number))
        post.is_open = True
        post.wait_for(lambda: line(1000) in post.lines)
    assert [line.message for line in post.lines].count("1 more lines of this worker were dropped") == 1
    assert post.lines.count(line(1000)) == 1


def test_closing_sends_what_is_left_and_does_not_wait_where_nobody_listens() -> None:
    post = Post()
    with Notebook(post.send, times=True) as notebook:
        with notebook.timing("train"):
            pass
        notebook.write(line(1))
    assert post.lines == [line(1)]
    assert [timing.name for timing in post.timings] == ["train"]

    deaf = Post(is_open=False)
    began = time.monotonic()
    with Notebook(deaf.send) as notebook:
        notebook.write(line(1))
    assert time.monotonic() - began < 1.5
    assert deaf.num_refused


def test_a_notebook_that_nobody_wrote_to_says_nothing_and_leaves_no_thread() -> None:
    post = Post()
    before = threading.active_count()
    with Notebook(post.send) as notebook, notebook.timing("train"):  # nobody wants to know
        pass
    assert threading.active_count() == before
    notebook.write(line(1))  # after its end
    assert post.notes == []


def test_a_line_that_a_finalizer_writes_in_the_middle_of_writing_one_blocks_nobody() -> None:
    """The garbage collector may run anywhere, also where a line is being added."""
    post = Post()
    with Notebook(post.send) as notebook:

        class Logged(str):
            def __getitem__(self, key: object) -> str:  # called while the line is made ready
                notebook.write(line(2))
                return "line 1"

        notebook.write(Line(logging.WARNING, "a.logger", Logged("line 1")))
        post.wait_for(lambda: len(post.lines) == 2)
    assert sorted(post.lines, key=lambda sent: sent.message) == [line(1), line(2)]


def test_a_sender_that_raises_does_not_end_the_notebook() -> None:
    post = Post()

    def send(lines: tuple[Line, ...], timings: tuple[Timing, ...]) -> bool:
        if not post.num_refused:
            post.num_refused += 1
            raise RuntimeError("on purpose")
        return post.send(lines, timings)

    with Notebook(send) as notebook:
        notebook.write(line(1))
        post.wait_for(lambda: post.lines == [line(1)])
    assert post.num_refused == 1


def test_timings_say_when_and_how_long_by_the_monotonic_clock_also_of_what_raised() -> None:
    post = Post()
    began = time.monotonic()
    with Notebook(post.send, times=True) as notebook:
        with notebook.timing("outer"), pytest.raises(ValueError), notebook.timing("inner"):
            raise ValueError
        ended = time.monotonic()
    inner, outer = post.timings
    assert (inner.name, outer.name) == ("inner", "outer")
    assert began <= outer.began <= inner.began
    assert inner.began + inner.duration_s <= outer.began + outer.duration_s <= ended
    with untimed("anything"):
        pass


def test_every_note_fits_into_a_frame_however_long_its_lines_are() -> None:
    sizes: list[int] = []

    def send(lines: tuple[Line, ...], timings: tuple[Timing, ...]) -> bool:
        header = headers.note_header(1.7e308, 1.7e308, lines, timings)
        sizes.append(len(protocol.encode(Kind.NOTE, header)))
        return True

    with Notebook(send, times=True) as notebook:
        for _ in range(100):
            notebook.write(Line(2**63, "\U0001f600" * 500, "\U0001f600" * 5000))
        for _ in range(5000):
            with notebook.timing("evaluate held-out rows"):
                pass
    assert len(sizes) >= 100 / 12 + 5000 / 800
    assert max(sizes) <= protocol.MAX_HEADER_BYTES


def test_a_line_with_half_a_character_is_sent_and_so_are_those_behind_it() -> None:
    """A file's name that is not UTF-8, say, as Python has it."""
    post = Post()

    def send(lines: tuple[Line, ...], timings: tuple[Timing, ...]) -> bool:
        protocol.encode(Kind.NOTE, headers.note_header(1.0, None, lines, timings))
        return post.send(lines, timings)

    with Notebook(send) as notebook:
        notebook.write(Line(logging.WARNING, "a\udcff", "cannot read 'r\udce9sum\udce9'"))
        post.wait_for(lambda: len(post.lines) == 1)
        notebook.write(line(2))
        post.wait_for(lambda: len(post.lines) == 2)
    assert post.lines[0] == Line(logging.WARNING, "a\\udcff", "cannot read 'r\\udce9sum\\udce9'")


# A note's header


def test_a_note_comes_back_from_its_header_as_it_was() -> None:
    lines, timings = (line(1), Line(50, "b", "é")), (Timing("train", 12.5, 0.25),)
    header = protocol.decode_header(protocol.encode(Kind.NOTE, headers.note_header(7.5, None, lines, timings))[16:])
    note = headers.note(header)
    assert (note.sent_at, note.clock_bound, note.lines, note.timings) == (7.5, None, lines, timings)
    assert headers.note({**header, "clock_bound": 3}).clock_bound == 3.0


GOOD = {"clock": 1.0, "clock_bound": None, "lines": [], "timings": []}


@pytest.mark.parametrize(
    "change",
    [
        {"clock": None},
        {"clock": "1"},
        {"clock": float("nan")},
        {"clock": float("inf")},
        {"clock": 1e308},
        {"clock_bound": float("-inf")},
        {"clock_bound": True},
        {"lines": None},
        {"lines": {}},
        {"lines": ["abc"]},
        {"lines": [[30, "logger"]]},
        {"lines": [["30", "logger", "message"]]},
        {"lines": [[30, "logger", b"message"]]},
        {"lines": [[True, "logger", "message"]]},
        {"timings": [["train", 1.0]]},
        {"timings": [["train", float("nan"), 1.0]]},
        {"timings": [["train", 1.0, float("inf")]]},
        {"timings": [["train", 1.0, -0.5]]},
        {"timings": [[7, 1.0, 0.5]]},
    ],
    ids=str,
)
def test_what_is_no_note_is_a_protocol_error(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        headers.note({**GOOD, **change})


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_note_without_one_of_its_fields_is_a_protocol_error_but_for_the_bound(name: str) -> None:
    header = {key: value for key, value in GOOD.items() if key != name}
    if name == "clock_bound":
        assert headers.note(header).clock_bound is None
    else:
        with pytest.raises(ProtocolError, match=name):
            headers.note(header)


# A process's log


@pytest.fixture
def quiet_logger() -> logging.Logger:
    """A logger of the test's own; what it says reaches the root logger alone."""
    return logging.getLogger("tests.telemetry.notes")


def test_the_processs_warnings_are_noted_with_what_was_raised_and_others_are_not(quiet_logger: logging.Logger) -> None:
    post = Post()
    with Notebook(post.send) as notebook, logged(notebook):
        quiet_logger.info("not this")
        quiet_logger.warning("%d rows have no %s", 3, "label")
        try:
            raise KeyError("x")
        except KeyError:
            quiet_logger.exception("it failed")
        post.wait_for(lambda: len(post.lines) == 2)
    quiet_logger.warning("nor this: nobody listens any more")
    assert post.lines == [
        Line(logging.WARNING, quiet_logger.name, "3 rows have no label"),
        Line(logging.ERROR, quiet_logger.name, "it failed (KeyError: 'x')"),
    ]
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_a_line_that_cannot_be_formatted_harms_nobody(
    quiet_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    post = Post()
    root = logging.getLogger()
    with Notebook(post.send) as notebook, logged(notebook):
        handlers = root.handlers[:]
        for handler in handlers:  # pytest's own, which raise
            root.removeHandler(handler)
        try:
            quiet_logger.warning("%d", "not a number")
        finally:
            for handler in handlers:
                root.addHandler(handler)
        quiet_logger.warning("and on")
        post.wait_for(lambda: len(post.lines) == 2)
    assert [line.message for line in post.lines] == ["%d", "and on"]


def test_a_users_own_logging_is_set_up_as_it_would_be_without_a_notebook(
    quiet_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Own(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    monkeypatch.setattr(logging, "lastResort", Own(logging.WARNING))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    post = Post()
    with Notebook(post.send) as notebook, logged(notebook):
        quiet_logger.warning("nobody handles this")
        logging.basicConfig(level=logging.INFO, handlers=[Own()])
        quiet_logger.info("this is the executor's own")
        post.wait_for(lambda: len(post.lines) == 1)
    assert seen == ["nobody handles this", "this is the executor's own"]
    assert [line.message for line in post.lines] == ["nobody handles this"]
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]  # of levels, which monkeypatch does not know of


def test_two_notebooks_at_once_both_take_lines_and_leave_nothing_behind(quiet_logger: logging.Logger) -> None:
    first, second = Post(), Post()
    with Notebook(first.send) as one, Notebook(second.send) as other:
        outer, inner = logged(one), logged(other)
        outer.__enter__()
        inner.__enter__()
        quiet_logger.warning("both")
        outer.__exit__(None, None, None)
        quiet_logger.warning("the second alone")
        inner.__exit__(None, None, None)
        quiet_logger.warning("none")
    assert [line.message for line in first.lines] == ["both"]
    assert [line.message for line in second.lines] == ["both", "the second alone"]
    assert logging.getLogRecordFactory() is logging.LogRecord
