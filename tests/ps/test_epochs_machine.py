"""Epochs under random interleavings: who rests, evaluates, skips and dies there, against books that this test keeps.

`EpochWorld` is the world of `test_state_machine` with workers that do what they are ordered, and with a driver.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from tensorspark.ps.messages import (
    Accept,
    Close,
    Cursor,
    Decision,
    EpochPlan,
    Grant,
    Order,
    OrderKind,
    Push,
    Refuse,
    SendSnapshot,
)
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tests.ps.test_state_machine import (
    RECOVERY_TIMEOUT_S,
    START_TIMEOUT_S,
    Attempt,
    Books,
    Endings,
    Interleavings,
    World,
)

NUM_TOTALS = 2


class EpochBooks(Books):
    """Also who is where in which epoch, as this test understands it.

    Attributes:
        lengths: pushes of each partition in an epoch.
        phase: of the released epoch: "training", "complete", "ready" or "over".
        trained, evaluated: of the released epoch, what each partition reported: totals and samples.
        absent: partitions that the others have left behind, at some time.
    """

    def __init__(self, plan: SyncPlan, epochs: EpochPlan, lengths: list[int]) -> None:
        self.epochs, self.lengths = epochs, lengths
        self.epoch, self.phase = 0, "training"
        self.values: dict[str, float] = dict(epochs.values)
        self.num_skipped = [0] * len(lengths)
        self.trained: dict[int, list[float]] = {}
        self.evaluated: dict[int, list[float]] = {}
        self.evaluators: set[int] = set()
        self.absent: set[int] = set()
        self.is_stopping = self.is_hurried = self.has_assembled = False
        self.reported: list[int] = []
        self.resting: set[int] = set()
        super().__init__(plan, lengths)

    def begin_anew(self, rounds: list[int]) -> None:
        super().begin_anew(rounds)
        self.resting.clear()
        self.is_stopping = self.is_hurried = self.has_assembled = False
        if self.phase != "over":
            self.phase = "training"

    @property
    def is_finishing(self) -> bool:
        return self.phase == "over" or self.is_stopping

    def cursor(self, partition: int) -> Cursor:
        if self.lengths[partition] == 0:
            return Cursor(self.num_skipped[partition])
        return Cursor(*divmod(self.num_published[partition], self.lengths[partition]))

    def is_at_end(self, partition: int) -> bool:
        return self.cursor(partition).epoch > self.epoch

    def awaited(self) -> set[int]:
        return super().counted()

    def counted(self) -> set[int]:
        return super().counted() - self.resting

    def grant(self, partition: int, connection: int, now: float) -> None:
        super().grant(partition, connection, now)
        self.has_assembled = self.has_assembled or len(self.came) >= self.plan.num_first
        self.rest_at_end(partition)

    def rest_at_end(self, partition: int) -> None:
        self.slowest()
        if self.is_at_end(partition):
            self.resting.add(partition)
        self.slowest()

    def pass_time(self, now: float) -> None:
        if self.first_came_at is not None and now - self.first_came_at >= START_TIMEOUT_S and not self.has_assembled:
            self.has_assembled = True
            self.absent |= set(range(len(self.lengths))) - self.came
        lost = set(self.lost_at)
        super().pass_time(now + RECOVERY_TIMEOUT_S if self.is_hurried else now)
        self.absent |= lost - set(self.lost_at)

    def hurry(self) -> None:
        self.is_hurried = self.has_begun = self.has_assembled = True

    def fold(self, partition: int, push: Push) -> None:
        cursor = Cursor(*divmod(len(self.folded[partition]), self.lengths[partition]))
        super().fold(partition, push)
        if cursor.epoch == self.epoch and self.phase == "training":
            add(self.trained, partition, push.totals, push.num_samples)

    def publish(self, partitions: list[int]) -> None:
        super().publish(partitions)
        for partition in partitions:
            self.rest_at_end(partition)

    def settle(self, *, is_idle: bool) -> None:
        """What has happened may have ended the epoch; `is_idle`: no push is between its arrival and its publication."""
        self.slowest()
        awaited, everybody = self.awaited(), set(range(len(self.lengths)))
        if self.is_finishing or not (awaited or self.finished == everybody):
            return
        if self.phase == "training" and self.has_assembled and is_idle and all(map(self.is_at_end, awaited)):
            self.phase = "complete"
            self.evaluators = {partition for partition in everybody if self.is_at_end(partition)}
            self.absent |= everybody - self.evaluators
        if self.phase == "complete":
            is_due = self.epochs.validates and awaited & self.evaluators - set(self.evaluated)
            self.phase = "complete" if is_due else "ready"

    def order_for(self, partition: int) -> OrderKind | None:
        if self.is_finishing:
            return OrderKind.FINISH
        if self.phase == "training" and not self.is_at_end(partition):
            return OrderKind.TRAIN if self.lets_begin(partition) else None
        is_due = self.phase == "complete" and partition in self.evaluators and partition not in self.evaluated
        return OrderKind.EVALUATE if is_due else None

    def release_epoch(self, values: dict[str, float], *, finish: bool) -> None:
        assert self.phase == "ready"
        self.reported.append(self.epoch)
        self.values = values
        if finish or self.epoch + 1 == self.epochs.num_epochs:
            self.phase = "over"
            self.hurry()
        else:
            self.epoch += 1
            self.phase = "training"
            self.trained, self.evaluated, self.evaluators = {}, {}, set()
        for partition in [p for p in self.resting if not self.is_at_end(p)]:
            self.resting.remove(partition)
            self.rounds[partition] = max(self.rounds[partition], self.floor)
        self.slowest()


def add(reports: dict[int, list[float]], partition: int, totals: bytes, num_samples: int) -> None:
    """Adds to a report: totals, and then samples."""
    more = [*np.frombuffer(totals, "<f8").tolist(), float(num_samples)]
    reports[partition] = [a + b for a, b in zip(reports.get(partition, [0.0] * len(more)), more, strict=True)]


class EpochWorld(World):
    """A world with epochs; an attempt may also be "skipping" or "evaluating", and is "done" when told to finish."""

    books: EpochBooks

    def __init__(self, plan: SyncPlan, epochs: EpochPlan, lengths: list[int], num_slots: int) -> None:
        self.epochs = epochs
        super().__init__(plan, lengths, num_slots)
        self.books = EpochBooks(plan, epochs, lengths)
        self.evaluating: dict[int, tuple[int, bytes]] = {}  # by attempt, the epoch and what came of it

    def state_of(self, **restored: Any) -> RunState:
        progress = self.state.export()[1] if restored else None
        return super().state_of(epochs=self.epochs, epoch_progress=progress, **restored)

    def cursor_of(self, partition: int, sequence: int) -> Cursor:
        if self.lengths[partition] == 0:
            return Cursor(self.books.num_skipped[partition])
        return Cursor(*divmod(sequence, self.lengths[partition]))

    def totals_of_push(self) -> bytes:
        return np.array([self.next_number(), 1.0], "<f8").tobytes()

    # Workers

    def act(self, attempt: Attempt) -> bool:
        if attempt.phase == "ready":
            attempt.phase = "pulling"
            self.execute(self.state.pull(self._connection(attempt)))
        elif attempt.phase == "skipping":
            self._skip(attempt)
        elif attempt.phase == "evaluating":
            self._evaluate(attempt)
        elif attempt.phase == "done":
            self._finish(attempt)
        else:
            return super().act(attempt)
        return True

    def _skip(self, attempt: Attempt) -> None:
        partition, epoch = attempt.partition, self.evaluating[attempt.number][0]
        decisions = self.state.skip(self._connection(attempt), epoch)
        if not isinstance(decisions[0], Refuse):
            self.books.num_skipped[partition] = max(self.books.num_skipped[partition], epoch + 1)
            self.books.rest_at_end(partition)
        self.execute(decisions)

    def _evaluate(self, attempt: Attempt) -> None:
        partition, (epoch, totals) = attempt.partition, self.evaluating[attempt.number]
        decisions = self.state.evaluate(self._connection(attempt), epoch, totals, 7)
        if isinstance(decisions[0], Accept):
            books = self.books
            if epoch == books.epoch and books.phase == "complete" and partition not in books.evaluated:
                add(books.evaluated, partition, totals, 7)
        self.execute(decisions)

    def break_connection(self, attempt: Attempt, *, is_seen: bool, loses_push: bool, dies: bool) -> None:
        if loses_push and attempt.connection is not None and attempt.phase in ("skipping", "evaluating"):
            # The answer is lost.
            connection, phase = attempt.connection, attempt.phase
            (self._skip if phase == "skipping" else self._evaluate)(attempt)
            if attempt.connection != connection:
                return
            attempt.phase = phase
        super().break_connection(attempt, is_seen=is_seen, loses_push=loses_push, dies=dies)

    # The server's answers

    def execute(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Close):
                self.books.release(self.partition_of[decision.connection], decision.connection, self.now)
            elif isinstance(decision, Grant):  # before anybody's answer that follows from it
                self.books.grant(self.partition_of[decision.connection], decision.connection, self.now)
        if not self.state.stopped:
            self.books.settle(is_idle=not self.kept and not self.round)
        super().execute(decisions)

    def note_grant(self, partition: int, connection: int) -> None:
        assert self.books.holder[partition] == connection

    def _on_snapshot(self, decision: SendSnapshot) -> None:
        partition, books = self.partition_of[decision.connection], self.books
        assert books.holder[partition] == decision.connection
        assert books.num_published[partition] == len(books.folded[partition]), "a pull without the worker's own pushes"
        assert decision.order is books.order_for(partition), f"{decision}, expected {books.order_for(partition)}"
        epoch = min(books.cursor(partition).epoch, books.epoch)
        order = self.state.order(decision, books.version)
        num_steps = 5 * sum(books.num_published)
        assert order == Order(books.version, decision.order, epoch, num_steps, order.num_workers, books.values)
        if not self.plan.is_bulk:
            assert order.num_workers == len(books.awaited())
        attempt = self.clients.get(decision.connection)
        if attempt is None:
            return
        assert attempt.phase == "pulling"
        assert not attempt.unanswered
        attempt.version = books.version
        books.may_be_late.discard(partition)
        self._obey(attempt, decision.order, epoch)

    def _obey(self, attempt: Attempt, order: OrderKind, epoch: int) -> None:
        if order is OrderKind.FINISH:
            attempt.phase = "done"
        elif order is OrderKind.EVALUATE:
            attempt.phase = "evaluating"
            self.evaluating[attempt.number] = (epoch, self.totals_of_push())
        elif self.lengths[attempt.partition] == 0:
            attempt.phase = "skipping"
            self.evaluating[attempt.number] = (epoch, b"")
        else:
            attempt.phase = "computing"

    def _on_accept(self, decision: Accept) -> None:
        attempt = self.clients.get(decision.connection)
        if attempt is not None and attempt.phase in ("skipping", "evaluating"):
            assert not attempt.unanswered
            attempt.phase = "ready"
            return
        super()._on_accept(decision)

    def is_due(self, partition: int) -> bool:
        return self.books.order_for(partition) is not None

    # The driver

    def drive(self, *, finish: bool = False) -> bool:
        """Looks for an epoch that is ready, and releases the next one; False where there is none."""
        end, books = self.state.epoch_end(1.5), self.books
        if end is None:
            assert books.phase != "ready" or self.state.stopped or books.is_finishing or self.queue
            return False
        assert books.phase == "ready"
        assert (end.epoch, end.seconds) == (books.epoch, 1.5)
        trained, evaluated = sorted(books.trained.items()), sorted(books.evaluated.items())
        assert [(p, totals.tolist()) for p, totals in end.totals] == [(p, report[:-1]) for p, report in trained]
        assert [(p, totals.tolist()) for p, totals in end.evaluation] == [(p, report[:-1]) for p, report in evaluated]
        assert end.num_samples == sum(report[-1] for _, report in trained)
        assert end.evaluation_samples == sum(report[-1] for _, report in evaluated)
        values = {"learning_rate": 1.0 / self.next_number()}
        decisions = self.state.release_epoch(end.epoch, values, finish=finish)
        books.release_epoch(values, finish=finish)
        self.execute(decisions)
        return True

    def request_stop(self) -> None:
        if self.state.stopped:
            return
        decisions = self.state.request_stop()
        self.books.is_stopping = True
        self.books.absent = set(range(len(self.lengths)))  # who is told to finish now has not trained all
        self.books.hurry()
        self.execute(decisions)

    def check(self) -> None:
        super().check()
        if self.state.stopped:
            return
        status, books = self.state.overview.status(), self.books
        assert (status.epoch, status.num_epochs) == (books.epoch, self.epochs.num_epochs)
        assert status.num_resting == len([p for p in books.holder if p in books.resting and p not in books.finished])
        if not books.is_finishing:
            assert (self.state.epoch_end(1.0) is not None) == (books.phase == "ready")

    def play_out(self) -> None:
        for _ in range(3000):
            for connection in self.unseen():
                self.notice(connection)
            self.launch_missing()
            can_act = [self.act(attempt) for attempt in list(self.attempts) if attempt.phase != "gone"]
            if self.queue:
                self.work()
            elif not any(can_act) and not self.drive():
                if not self.attempts:
                    break
                self.pass_time(RECOVERY_TIMEOUT_S)
        assert not self.attempts, f"they wait for ever: {self.attempts}"
        if self.state.stopped:
            return
        assert all(report.finished for report in self.state.overview.reports())
        assert not self.kept
        books = self.books
        assert books.reported == list(range(len(books.reported)))
        if not books.is_stopping and books.phase == "over" and len(books.reported) == self.epochs.num_epochs:
            for partition, length in enumerate(self.lengths):
                if partition not in books.absent:
                    assert len(books.folded[partition]) == length * self.epochs.num_epochs


class EpochInterleavings(Interleavings):
    world: EpochWorld

    @initialize(
        staleness=st.sampled_from([None, 0, 1, 3]),
        lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        num_spare=st.integers(0, 2),
        num_epochs=st.integers(1, 3),
        validates=st.booleans(),
    )
    def begin(
        self, staleness: int | None, lengths: list[int], num_spare: int, num_epochs: int, validates: bool
    ) -> None:
        plan = SyncPlan(staleness, len(lengths), START_TIMEOUT_S, RECOVERY_TIMEOUT_S)
        epochs = EpochPlan(num_epochs, validates, NUM_TOTALS, {"learning_rate": 0.5})
        self.world = EpochWorld(plan, epochs, lengths, len(lengths) + num_spare)
        self.world.launch_missing()

    @rule(chance=st.integers(0, 9))
    def drive(self, chance: int) -> None:
        self.world.drive(finish=chance == 0)

    @rule(num_turns=st.integers(5, 20))
    def live(self, num_turns: int) -> None:
        """Everybody does what is next, the driver too."""
        for _ in range(num_turns):
            self.world.launch_missing()
            for attempt in list(self.world.attempts):
                self.world.act(attempt)
            self.work(3)
            self.world.drive()


class EpochEndings(EpochInterleavings, Endings):
    @rule(chance=st.integers(0, 5))
    def request_stop(self, chance: int) -> None:
        if chance == 0:
            self.world.request_stop()


def test_epochs_end_when_all_rest_their_totals_are_those_of_the_pushes_and_nobody_waits_for_ever() -> None:
    run_state_machine_as_test(EpochInterleavings, settings=settings(max_examples=400, stateful_step_count=40))


def test_a_stop_or_a_restore_at_any_moment_of_an_epoch_leaves_nobody_waiting_and_no_totals_lost() -> None:
    run_state_machine_as_test(EpochEndings, settings=settings(max_examples=400, stateful_step_count=40))
