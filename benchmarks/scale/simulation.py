"""A run of many workers, simulated event by event: `simulate`.

A worker computes its steps, prepares its push, sends it, asks for new weights, waits at the gate and takes them in,
over and over, as `tensorspark.worker` does. What is simulated is contention: for the cores of a machine, for the
servers' links, for each server's loop and for its thread for arithmetic, for buffers. What is not: workers that come,
go or die, ends of epochs, reading the feed, TLS, a network whose middle is slower than the servers' links.
"""

from __future__ import annotations

import random
from functools import partial

from benchmarks.scale.engine import Clock, Cores, Link, Thread, Transfer
from benchmarks.scale.model import Cluster, Costs, Outcome, Plan, at_size
from benchmarks.scale.server import Server


def simulate(plan: Plan, costs: Costs, cluster: Cluster) -> Outcome:
    """Runs it to the end; the same arguments give the same outcome."""
    if plan.num_workers < 1 or plan.num_rounds < 1 or plan.num_shards < 1 or plan.sync_interval < 1:
        raise ValueError(f"expected at least one worker, round, shard and step, got {plan}")
    return _Simulation(plan, costs, cluster).run()


class _Worker:
    """One worker and where it is in its round."""

    def __init__(self, index: int, thread: Thread, simulation: _Simulation) -> None:
        self.steps_s = 0.0  # of the clock, not of a core
        self.ended_at = 0.0
        self._index, self._thread, self._simulation = index, thread, simulation
        self._random = random.Random(simulation.plan.seed * 1_000_003 + index)
        self._num_left = simulation.plan.num_rounds
        self._began_at = 0.0
        self._num_awaited = 0  # of the servers, whatever is under way

    def begin_round(self) -> None:
        clock, plan = self._simulation.clock, self._simulation.plan
        if not self._num_left:
            self.ended_at = clock.now
            return
        self._num_left -= 1
        self._began_at = clock.now
        self._thread.submit(plan.steps.draw(self._random, plan.sync_interval), self._end_steps)

    def _end_steps(self) -> None:
        self.steps_s += self._simulation.clock.now - self._began_at
        self._thread.submit(self._simulation.prepare_s, self._push)

    def _push(self) -> None:
        servers = self._simulation.servers
        self._num_awaited = len(servers)
        for server in servers:
            server.begin_push(self._index)
            num_chunks, window = server.push_chunks
            Transfer(
                self._thread,
                server.inward,
                server.loop,
                num_bytes=server.push_bytes,
                num_chunks=num_chunks,
                window=window,
                send_s=self._simulation.send_s,
                receive_s=server.receive_s,
                sent=self._on_sent,
                received=partial(server.on_push, self._index),
                ask_to_admit=partial(server.admit, self._index),
            ).start()

    def _on_sent(self) -> None:
        self._num_awaited -= 1
        if not self._num_awaited:
            self._thread.submit(self._simulation.ask_s, self._pull)

    def _pull(self) -> None:
        servers = self._simulation.servers
        self._num_awaited = len(servers)
        for server in servers:
            server.inward.send(0, partial(server.on_pull, self._index, self._thread, self._on_part))

    def _on_part(self) -> None:
        self._num_awaited -= 1
        if not self._num_awaited:
            self._thread.submit(self._simulation.decode_s, self.begin_round)


class _Simulation:
    def __init__(self, plan: Plan, costs: Costs, cluster: Cluster) -> None:
        self.plan = plan
        self.clock = Clock()
        shard_bytes = plan.num_bytes / plan.num_shards
        encode_s = plan.push_codec.encode_s + plan.push_codec.feedback_s
        self.prepare_s = at_size(costs.prepare, plan.num_bytes) + encode_s * plan.num_bytes
        self.decode_s = plan.pull_codec.decode_s * plan.num_bytes
        self.send_s = at_size(costs.client_push, shard_bytes * plan.push_codec.ratio)
        self.ask_s = costs.client_pull[0][1] * plan.num_shards
        self._published_at: list[tuple[float, int]] = []
        self._num_published = 0
        self.servers = self._make_servers(costs, cluster, shard_bytes)
        own = [self._driver_cores] * plan.num_workers if cluster.is_one_machine else []
        cores = own or [Cores(self.clock, 1) for _ in range(plan.num_workers)]
        self.workers = [_Worker(index, Thread(cores[index]), self) for index in range(plan.num_workers)]

    def _make_servers(self, costs: Costs, cluster: Cluster, shard_bytes: float) -> list[Server]:
        latency_s = 0.0 if cluster.is_one_machine else cluster.latency_s
        bandwidth = None if cluster.is_one_machine else cluster.link_bytes_per_s

        def machine() -> tuple[Cores, Link, Link]:
            cores = Cores(self.clock, cluster.server_cores)
            return cores, Link(self.clock, bandwidth, latency_s), Link(self.clock, bandwidth, latency_s)

        driver = machine()
        self._driver_cores = driver[0]
        servers = []
        for index in range(self.plan.num_shards):
            cores, inward, outward = machine() if self.plan.has_own_machines and index else driver
            on_published = self._note_published if index == 0 else _ignore
            servers.append(
                Server(self.clock, cores, inward, outward, shard_bytes, costs, cluster, self.plan, on_published)
            )
        return servers

    def _note_published(self, num_pushes: int) -> None:
        self._num_published += num_pushes
        self._published_at.append((self.clock.now, self._num_published))

    def run(self) -> Outcome:
        for worker in self.workers:
            worker.begin_round()
        self.clock.run()
        seconds = max(worker.ended_at for worker in self.workers)
        samples = self.plan.sync_interval * self.plan.batch_size
        total_s = sum(worker.ended_at for worker in self.workers)
        num_pushes = self._num_published
        return Outcome(
            num_pushes=num_pushes,
            seconds=seconds,
            samples_per_s=num_pushes * samples / seconds if seconds else float("inf"),
            steady_samples_per_s=self._steady_pushes_per_s() * samples,
            idle_share=1 - sum(worker.steps_s for worker in self.workers) / total_s if total_s else 0.0,
            staleness=self.servers[0].staleness_sum / num_pushes,
            max_lead=max(server.max_lead for server in self.servers),
            busy=self._busy(seconds),
        )

    def _steady_pushes_per_s(self) -> float:
        """From the moment when a quarter of the pushes was published."""
        at, before = next(
            ((at, num) for at, num in self._published_at if num * 4 >= self._num_published), self._published_at[0]
        )
        end, num_pushes = self._published_at[-1]
        if end > at:
            return (num_pushes - before) / (end - at)
        return num_pushes / end if end else float("inf")

    def _busy(self, seconds: float) -> dict[str, float]:
        if not seconds:
            return {}
        shares = len(self.servers) * seconds
        return {
            "loop": sum(server.loop.busy_s for server in self.servers) / shares,
            "arithmetic": sum(server.arithmetic.busy_s for server in self.servers) / shares,
            "link in": sum(server.inward.busy_s for server in self.servers) / shares,
            "link out": sum(server.outward.busy_s for server in self.servers) / shares,
        }


def _ignore(num_pushes: int) -> None:
    """Only the first shard's rounds are counted: all have the same."""
