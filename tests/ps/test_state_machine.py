"""The server's decisions under random interleavings, checked against books that this test keeps of its own.

`World` is what surrounds a `RunState`: Spark, which starts attempts in a few slots; workers, which pull, compute, push
and finish as real ones do; connections that break, seen by the server at once or later; and the shell, which executes
folds and publications late and in order. What must always hold is asserted as it happens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tensorspark.errors import CombinerError, LeaseLostError, NonFiniteError, RefusedError
from tensorspark.history import Recorder
from tensorspark.ps.messages import (
    Accept,
    Close,
    Cursor,
    Decision,
    Fold,
    Grant,
    Keep,
    Publish,
    Push,
    Refuse,
    Registration,
    SendSnapshot,
    TimeSpent,
)
from tensorspark.ps.state import RunState
from tensorspark.ps.sync import SyncPlan
from tensorspark.weights.layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout([TensorSpec("W:0", (3,), "float32")])
START_TIMEOUT_S = 10.0
RECOVERY_TIMEOUT_S = 20.0
# What an attempt goes on with on a new connection; from any other, it pulls again, or waits again for its lease.
PHASES_THAT_GO_ON = ("computing", "skipping", "evaluating")


def cursor_after(sequence: int) -> Cursor:
    return Cursor(*divmod(sequence, 3))


@dataclass(eq=False)
class Attempt:
    """A task that trains a partition.

    Attributes:
        phase: "out" (to connect and register), "asking" (for the lease), "ready" (for a pull or the end), "pulling",
            "computing", "finishing" or "gone".
        next_phase: where it goes on when its lease is granted.
    """

    number: int
    partition: int
    phase: str = "out"
    next_phase: str = "ready"
    connection: int | None = None
    sequence: int = 0
    version: int = 0
    is_resuming: bool = False
    unanswered: list[Push] = field(default_factory=list)


class Books:
    """Leases, rounds and weights, as this test understands them."""

    def __init__(self, plan: SyncPlan, lengths: list[int]) -> None:
        self.plan = plan
        self.holder: dict[int, int] = {}
        self.folded: list[list[Push]] = [[] for _ in lengths]
        self.num_published = [0] * len(lengths)
        self.finished: set[int] = set()
        self.version = 0
        self.begin_anew([0] * len(lengths))

    def begin_anew(self, rounds: list[int]) -> None:
        """A first or restored run: nobody is there, and the weights are those of the pushes published so far."""
        self.rounds = [max(rounds)] * len(rounds) if self.plan.is_bulk else rounds
        self.floor = min((r for p, r in enumerate(self.rounds) if p not in self.finished), default=0)
        self.holder.clear()
        self.lost_at: dict[int, float] = {}
        self.came: set[int] = set()
        self.first_came_at: float | None = None
        self.has_begun = self.plan.staleness is None
        self.may_be_late: set[int] = set()  # partitions that the others may have left behind since their last pull

    def counted(self) -> set[int]:
        return {p for p in self.holder if p not in self.finished} | set(self.lost_at)

    def slowest(self) -> int:
        if self.has_begun:
            self.floor = max(self.floor, min((self.rounds[p] for p in self.counted()), default=self.floor))
        return self.floor

    def grant(self, partition: int, connection: int, now: float) -> None:
        assert partition not in self.holder, "two holders of one lease"
        if partition not in self.lost_at:
            self.rounds[partition] = max(self.rounds[partition], self.slowest())
        self.holder[partition] = connection
        self.lost_at.pop(partition, None)
        self.came.add(partition)
        self.first_came_at = now if self.first_came_at is None else self.first_came_at
        self.has_begun = self.has_begun or len(self.came) >= self.plan.num_first

    def release(self, partition: int, connection: int, now: float) -> None:
        if self.holder.get(partition) == connection:
            del self.holder[partition]
            if partition not in self.finished:
                self.lost_at[partition] = now

    def pass_time(self, now: float) -> None:
        if self.first_came_at is not None and now - self.first_came_at >= START_TIMEOUT_S:
            self.has_begun = True
        for partition in [p for p, at in self.lost_at.items() if now - at >= RECOVERY_TIMEOUT_S]:
            del self.lost_at[partition]
            self.may_be_late.add(partition)

    def fold(self, partition: int, push: Push) -> None:
        assert push.sequence == len(self.folded[partition]) + 1, "a push is missing, or counts twice"
        self.folded[partition].append(push)

    def publish(self, partitions: list[int]) -> None:
        self.slowest()
        self.version += bool(partitions)
        for partition in partitions:
            self.num_published[partition] += 1
        for partition in self.counted() if self.plan.is_bulk else set(partitions):
            self.rounds[partition] += 1

    def require_in_weights(self, partition: int, push: Push) -> None:
        published = self.folded[partition][: self.num_published[partition]]
        assert push in published[push.sequence - 1 : push.sequence], "an acknowledged push is not in the weights"

    def lets_begin(self, partition: int) -> bool:
        if self.plan.staleness is None:
            return True
        return self.has_begun and self.rounds[partition] - self.slowest() <= self.plan.staleness

    def require_may_pull(self, partition: int) -> None:
        assert self.num_published[partition] == len(self.folded[partition]), "a pull without the worker's own pushes"
        assert self.lets_begin(partition), f"partition {partition} begins a round too early"


class World:
    """Everything around the state; methods are what may happen, in any order."""

    def __init__(self, plan: SyncPlan, lengths: list[int], num_slots: int) -> None:
        self.plan, self.lengths, self.num_slots = plan, lengths, num_slots
        self.books = Books(plan, lengths)
        self.state = self.state_of()
        self.now = 1000.0
        self.num_numbers = 0
        self.attempts: list[Attempt] = []
        self.clients: dict[int, Attempt] = {}  # by connection, as long as the worker's end is open
        self.partition_of: dict[int, int] = {}  # by connection, as long as the server's end is open
        self.kept: dict[tuple[int, int], Push] = {}
        self.queue: deque[Fold | Publish] = deque()
        self.round: list[Fold] = []
        self.was_refused_in_round = False

    def state_of(self, **restored: Any) -> RunState:
        return RunState(1, LAYOUT, len(self.lengths), self.plan, **restored)

    def next_number(self) -> int:
        self.num_numbers += 1
        return self.num_numbers

    def cursor_of(self, partition: int, sequence: int) -> Cursor:
        """Where a partition stands after so many pushes."""
        return cursor_after(sequence)

    def totals_of_push(self) -> bytes:
        return b""

    # Spark and its workers

    def launch_missing(self) -> None:
        for partition in range(len(self.lengths)):
            self.launch(partition, may_speculate=False)

    def launch(self, partition: int, *, may_speculate: bool) -> None:
        if partition in self.books.finished or self.state.stopped:
            return
        rivals = sum(attempt.partition == partition for attempt in self.attempts)
        if len(self.attempts) < self.num_slots and (rivals == 0 or (may_speculate and rivals < 3)):
            self.attempts.append(Attempt(self.next_number(), partition))

    def act(self, attempt: Attempt) -> bool:
        """The attempt does what is next; False where it waits for an answer."""
        if attempt.phase == "out":
            self._register(attempt)
        elif attempt.phase == "computing":
            self._push(attempt)
        elif attempt.phase == "ready" and attempt.sequence < self.lengths[attempt.partition]:
            attempt.phase = "pulling"
            self.execute(self.state.pull(self._connection(attempt)))
        elif attempt.phase == "ready" and not attempt.unanswered:
            self._finish(attempt)
        else:
            return False
        return True

    def _register(self, attempt: Attempt) -> None:
        attempt.connection, attempt.phase = self.next_number(), "asking"
        self.clients[attempt.connection] = attempt
        self.partition_of[attempt.connection] = attempt.partition
        registration = Registration(
            1, attempt.partition, attempt.number, LAYOUT.fingerprint, f"host{attempt.number}", attempt.is_resuming
        )
        self.execute(self.state.register(attempt.connection, registration, self.now))

    def _push(self, attempt: Attempt, *, arrives: bool = True) -> None:
        attempt.sequence += 1
        cursor = self.cursor_of(attempt.partition, attempt.sequence)
        sums = {"loss": float(self.next_number())}  # tells this push from any other
        totals = self.totals_of_push()
        push = Push(attempt.sequence, cursor, 5, 50, version=attempt.version, sums=sums, totals=totals)
        attempt.unanswered.append(push)
        attempt.phase = "ready"
        if arrives:
            self._send_push(attempt, push)

    def _send_push(self, attempt: Attempt, push: Push) -> None:
        connection = self._connection(attempt)
        is_twice = push in self.books.folded[attempt.partition]
        decisions = self.state.push(connection, push)
        if Keep() in decisions:
            assert decisions[0] == Keep()
            assert not is_twice
            self.kept[connection, push.sequence] = push
        self.execute(decisions)

    def _finish(self, attempt: Attempt) -> None:
        connection = self._connection(attempt)
        decisions = self.state.finish(connection, TimeSpent())
        if isinstance(decisions[0], Accept):
            assert self.books.holder[attempt.partition] == connection
            self.books.finished.add(attempt.partition)
        attempt.phase = "finishing"
        self.execute(decisions)

    def _connection(self, attempt: Attempt) -> int:
        assert attempt.connection is not None
        return attempt.connection

    def break_connection(self, attempt: Attempt, *, is_seen: bool, loses_push: bool, dies: bool) -> None:
        if attempt.connection is None:
            return
        if loses_push and attempt.phase == "computing":
            self._push(attempt, arrives=False)
        connection = self._connection(attempt)
        self._hang_up(attempt)
        if attempt.phase != "asking":
            attempt.next_phase = attempt.phase if attempt.phase in PHASES_THAT_GO_ON else "ready"
        attempt.phase = "out"
        if dies:
            self._end(attempt)
        if is_seen:
            self.notice(connection)

    def _hang_up(self, attempt: Attempt) -> None:
        if attempt.connection is not None:
            del self.clients[attempt.connection]
            attempt.connection = None

    def _end(self, attempt: Attempt) -> None:
        """The task is over; the server sees its connection close later."""
        self._hang_up(attempt)
        attempt.phase = "gone"
        self.attempts.remove(attempt)

    def unseen(self) -> list[int]:
        return [connection for connection in self.partition_of if connection not in self.clients]

    def notice(self, connection: int) -> None:
        """The server sees that a connection has closed."""
        self.books.release(self.partition_of.pop(connection), connection, self.now)
        self.execute(self.state.disconnect(connection, self.now))

    # The shell

    def work(self, error: type[Exception] | None = None, *, dies: bool = False) -> None:
        """Executes the first decision in the queue; `error`: what a fold meets, and whether its worker dies of it."""
        if not self.queue:
            return
        step = self.queue.popleft()
        if isinstance(step, Publish):
            assert step.num_workers is None or step.num_workers >= 1
            folds, self.round = self.round, []
            self.books.publish([fold.partition for fold in folds])
            self.was_refused_in_round = False
            self.execute(self.state.published(folds, self.now))
            return
        push = self.kept.pop((step.connection, step.push.sequence))
        assert push == step.push
        if error is None and self.state.is_next(step):
            self._require_order(step)
            self.books.fold(step.partition, push)
            self.round.append(step)
            self.state.folded(step, self.now)
            return
        self.was_refused_in_round = True
        self.books.may_be_late.add(step.partition)
        if error is CombinerError:
            self.execute(self.state.not_folded(step, CombinerError("compute raised"), self.now))
            return
        refusal = RefusedError("behind") if error is None else NonFiniteError("NaN in W:0")
        worker = self.clients.get(step.connection)
        self.execute(self.state.not_folded(step, refusal, self.now))
        if dies and worker is not None and worker.phase != "gone":
            self._end(worker)

    def _require_order(self, fold: Fold) -> None:
        if not self.plan.is_bulk:
            assert not self.round, "a push is a round of its own, unless the run is bulk-synchronous"
            return
        if not self.was_refused_in_round:  # who comes again after a refusal comes last
            assert all(before.partition < fold.partition for before in self.round), "folds out of order"
        assert fold.partition not in {before.partition for before in self.round}, "two pushes of one worker in a round"
        if fold.partition not in self.books.may_be_late:
            assert fold.push.version == self.books.version, "pushes in a round are based on one version"

    def execute(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Fold | Publish):
                assert not self.state.stopped, f"{decision} after the end"
                self.queue.append(decision)
            elif isinstance(decision, Close):
                assert decision.connection not in self.clients, "the connection of a live worker is closed"
                self.books.release(self.partition_of[decision.connection], decision.connection, self.now)
            elif isinstance(decision, Grant):
                self._on_grant(decision)
            elif isinstance(decision, SendSnapshot):
                self._on_snapshot(decision)
            elif isinstance(decision, Accept):
                self._on_accept(decision)
            elif isinstance(decision, Refuse):
                self._on_refusal(decision)

    def _on_grant(self, grant: Grant) -> None:
        partition = self.partition_of[grant.connection]
        assert not any(self.partition_of.get(c, -1) == partition for c, _ in self.kept), "a grant while a push is due"
        self.note_grant(partition, grant.connection)
        folded = self.books.folded[partition]
        assert self.books.num_published[partition] == len(folded), "a grant while the partition's round is open"
        assert (grant.sequence, grant.cursor) == (len(folded), self.cursor_of(partition, len(folded)))
        assert grant.finished == (partition in self.books.finished)
        attempt = self.clients.get(grant.connection)
        if attempt is None:
            return
        assert attempt.phase == "asking"
        if grant.finished:
            self._end(attempt)
            return
        if not attempt.is_resuming:
            attempt.sequence = grant.sequence
        attempt.phase, attempt.is_resuming = attempt.next_phase, True
        for push in attempt.unanswered:
            if push.sequence <= grant.sequence:
                self.books.require_in_weights(partition, push)
        attempt.unanswered = [push for push in attempt.unanswered if push.sequence > grant.sequence]
        assert attempt.sequence - len(attempt.unanswered) == grant.sequence, "another attempt held the lease meanwhile"
        for push in attempt.unanswered:
            self._send_push(attempt, push)

    def note_grant(self, partition: int, connection: int) -> None:
        self.books.grant(partition, connection, self.now)

    def _on_snapshot(self, decision: SendSnapshot) -> None:
        partition = self.partition_of[decision.connection]
        assert self.books.holder[partition] == decision.connection
        self.books.require_may_pull(partition)
        attempt = self.clients.get(decision.connection)
        if attempt is not None:
            assert attempt.phase == "pulling"
            assert not attempt.unanswered
            attempt.phase, attempt.version = "computing", self.books.version
            self.books.may_be_late.discard(partition)

    def _on_accept(self, decision: Accept) -> None:
        attempt = self.clients.get(decision.connection)
        if attempt is None:
            return
        if attempt.phase == "finishing":
            connection = self._connection(attempt)
            self._end(attempt)
            self.notice(connection)
            return
        push = attempt.unanswered.pop(0)
        assert push.sequence == decision.sequence
        self.books.require_in_weights(attempt.partition, push)

    def _on_refusal(self, decision: Refuse) -> None:
        attempt = self.clients.get(decision.connection)
        if attempt is None:
            return
        if isinstance(decision.error, LeaseLostError):
            assert self.books.holder.get(attempt.partition) != decision.connection
        if not self.state.stopped and attempt.unanswered and not isinstance(decision.error, LeaseLostError):
            attempt.unanswered.clear()  # it pulls again, and tries again
            attempt.sequence = len(self.books.folded[attempt.partition])
            return
        self._end(attempt)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.books.pass_time(self.now)
        self.execute(self.state.tick(self.now))

    def stop(self) -> None:
        """As the driver does it: what is queued is forgotten."""
        self.execute(self.state.stop())
        self.queue.clear()
        self.kept.clear()

    def restore(self) -> None:
        """The driver dies between two rounds, and a new one goes on from there."""
        if self.round or self.state.stopped:
            return
        for attempt in list(self.attempts):
            self._end(attempt)
        self.partition_of.clear()
        self.queue.clear()
        self.kept.clear()
        self.was_refused_in_round = False
        before, _ = self.state.export()
        self.books.begin_anew([partition.round for partition in before])
        recorder = Recorder(points=self.state.recorder.export())
        self.state = self.state_of(partitions=before, version=self.books.version, recorder=recorder)

    # What must hold

    def check(self) -> None:
        status = self.state.overview.status()
        assert status.num_live == len(self.books.holder)
        assert status.num_finished == len(self.books.finished)
        assert status.num_steps == 5 * sum(map(len, self.books.folded))
        for connection, attempt in self.clients.items():
            if self.state.stopped:
                continue
            waits = attempt.phase in ("asking", "pulling") or bool(attempt.unanswered)
            assert self.state.is_waiting(connection) == waits, f"{attempt} waits: {waits}"
            if attempt.phase == "pulling" and not attempt.unanswered and not self.queue:
                assert not self.is_due(attempt.partition), f"{attempt} waits for nothing"

    def is_due(self, partition: int) -> bool:
        """Whether a pull is to be answered, once the partition's own pushes are published."""
        return self.books.lets_begin(partition)

    def play_out(self) -> None:
        """From now on nobody dies: everybody who lives comes to an end."""
        for _ in range(2000):
            for connection in self.unseen():
                self.notice(connection)
            self.launch_missing()
            can_act = [self.act(attempt) for attempt in list(self.attempts) if attempt.phase != "gone"]
            if self.queue:
                self.work()
            elif not any(can_act):
                if not self.attempts:
                    break
                self.pass_time(RECOVERY_TIMEOUT_S)
        assert not self.attempts, f"they wait for ever: {self.attempts}"
        if not self.state.stopped:
            assert all(report.finished for report in self.state.overview.reports())
            assert [len(folded) for folded in self.books.folded] == self.lengths
            assert self.books.num_published == self.lengths
            assert not self.kept


class Interleavings(RuleBasedStateMachine):
    world: World

    @initialize(
        staleness=st.sampled_from([None, 0, 1, 3]),
        lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
        num_slots=st.integers(1, 6),
    )
    def begin(self, staleness: int | None, lengths: list[int], num_slots: int) -> None:
        plan = SyncPlan(staleness, min(len(lengths), num_slots), START_TIMEOUT_S, RECOVERY_TIMEOUT_S)
        self.world = World(plan, lengths, num_slots)
        self.world.launch_missing()

    @rule(partition=st.integers(0, 4))
    def speculate(self, partition: int) -> None:
        self.world.launch(partition % len(self.world.lengths), may_speculate=True)

    @rule(who=st.lists(st.integers(0, 5), min_size=3, max_size=12))
    def act(self, who: list[int]) -> None:
        for index in who:
            attempts = self.world.attempts
            if attempts:
                self.world.act(attempts[index % len(attempts)])

    @rule(num_steps=st.integers(1, 6))
    def work(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.world.work()

    @rule(num_turns=st.integers(1, 8), num_steps=st.integers(0, 3))
    def bustle(self, num_turns: int, num_steps: int) -> None:
        """Spark starts what it can, and all attempts act in turn, while the shell does so much a turn."""
        for _ in range(num_turns):
            self.world.launch_missing()
            for attempt in list(self.world.attempts):
                self.world.act(attempt)
            self.work(num_steps)

    @rule(dies=st.booleans(), chance=st.integers(0, 3))
    def refuse(self, dies: bool, chance: int) -> None:
        if chance == 0:
            self.world.work(NonFiniteError, dies=dies)

    @rule(who=st.integers(0, 5), is_seen=st.booleans(), loses_push=st.booleans(), dies=st.booleans())
    def break_connection(self, who: int, is_seen: bool, loses_push: bool, dies: bool) -> None:
        attempts = self.world.attempts
        if attempts:
            attempt = attempts[who % len(attempts)]
            self.world.break_connection(attempt, is_seen=is_seen, loses_push=loses_push, dies=dies)

    @rule(who=st.integers(0, 5))
    def notice(self, who: int) -> None:
        unseen = self.world.unseen()
        if unseen:
            self.world.notice(unseen[who % len(unseen)])

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0, 21.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.play_out()


class Endings(Interleavings):
    """Also what ends a run, or has another driver go on with it."""

    @rule(chance=st.integers(0, 9))
    def stop(self, chance: int) -> None:
        if chance == 0:
            self.world.stop()

    @rule(chance=st.integers(0, 9))
    def break_combiner(self, chance: int) -> None:
        if chance == 0:
            self.world.work(CombinerError)

    @rule(who=st.integers(0, 5), chance=st.integers(0, 9))
    def fail(self, who: int, chance: int) -> None:
        attempts = [attempt for attempt in self.world.attempts if attempt.connection and attempt.phase == "computing"]
        if attempts and chance == 0:
            attempt = attempts[who % len(attempts)]
            assert attempt.connection is not None
            decisions = self.world.state.fail(attempt.connection, "ValueError: bad row", "Traceback")
            self.world._end(attempt)
            self.world.execute(decisions)

    @rule(chance=st.integers(0, 3))
    def restore(self, chance: int) -> None:
        if chance == 0:
            self.world.restore()


def test_whatever_happens_pushes_count_once_the_gate_holds_and_the_living_finish() -> None:
    run_state_machine_as_test(Interleavings, settings=settings(max_examples=500, stateful_step_count=40))


def test_whatever_ends_a_run_nobody_is_left_waiting_and_a_restored_one_goes_on_exactly() -> None:
    run_state_machine_as_test(Endings, settings=settings(max_examples=500, stateful_step_count=40))
