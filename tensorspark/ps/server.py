"""The parameter server: a Tornado HTTP server on a thread of the driver, in front of one `Run` at a time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import secrets
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from tensorspark.errors import SessionClosedError, TensorsparkError
from tensorspark.history import Point, WorkerReport
from tensorspark.ps import tls as certificates
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.ps.http import Door, LimitedServer, Site
from tensorspark.ps.listen import bind, connection_limit
from tensorspark.ps.messages import EpochEnd, EpochPlan, Status
from tensorspark.ps.run import Run
from tensorspark.ps.sync import SyncPlan
from tensorspark.telemetry.records import Observation
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.weights.compression import NO_COMPRESSION, Compression
from tensorspark.weights.layout import Buffer, WeightLayout

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 60.0
_ASYNCHRONOUS = SyncPlan()
_T = TypeVar("_T")


class ParameterServer:
    """Serves the weights of one layout; runs follow one another on it. Its methods may be called from any thread.

    ``GET /healthz`` is open and says that the server lives. ``GET /status`` answers JSON, and ``GET /workers`` upgrades
    to frames; both want the header ``Authorization: Bearer <token>`` and answer 401 without it, as does every other
    target: `ps.http` has the whole table.

    Attributes:
        token: what opens the server; a secret, made anew for each.
        certificate: PEM, what workers are to trust; None without TLS.

    Args:
        layout: of the weights.
        host: advertised to workers. The server listens on this address alone if it is one of this machine's, else
            on all interfaces (a forwarded address, say).
        port: 0 takes a free one.
        receive_buffer_bytes: bound of the memory for pushes in arrival; one push always fits.
        io_timeout_s: deadline of one transfer.
        lease_timeout_s: how long a partition stays with a worker that says nothing.
        tls: makes a key and a certificate, and speaks nothing but TLS.
        max_connections: one more is closed at once; never more than the process may open files for.
        handshake_timeout_s: how long a connection may take until it has shown the token.
        site: pages that are served beside its own.

    Raises:
        PortTakenError: another program listens at the port.
        ConfigError: the host has no address, or TLS is asked for without `cryptography`.

    >>> from tensorspark.weights.layout import TensorSpec
    >>> with ParameterServer(WeightLayout([TensorSpec("w", (2,), "float32")]), "127.0.0.1") as server:
    ...     server.port > 0
    True
    """

    def __init__(
        self,
        layout: WeightLayout,
        host: str,
        port: int = 0,
        *,
        receive_buffer_bytes: int = 2**28,
        io_timeout_s: float = 120.0,
        lease_timeout_s: float = 60.0,
        tls: bool = False,
        max_connections: int = 4096,
        handshake_timeout_s: float = 10.0,
        site: Site | None = None,
    ) -> None:
        self.layout = layout
        self.host = host
        self.token = secrets.token_urlsafe(32)
        self.certificate: str | None = None
        self._receive_buffer_bytes = receive_buffer_bytes
        self._io_timeout_s = io_timeout_s
        self._lease_timeout_s = lease_timeout_s
        self._max_connections = connection_limit(max_connections)
        self._handshake_timeout_s = handshake_timeout_s
        self._site = site
        self._run: Run | None = None
        self._num_runs = 0
        self._ssl_context = self._make_certificate() if tls else None
        self._sockets = bind(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="tensorspark-merge")
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name="tensorspark-server", daemon=True)
        self._thread.start()

    def _make_certificate(self) -> ssl.SSLContext:
        certificate = certificates.make_certificate(self.host)
        self.certificate = certificate.pem
        return certificates.server_context(certificate)

    def __repr__(self) -> str:
        tls = self.certificate is not None
        return f"ParameterServer(host={self.host!r}, port={self.port}, tls={tls}, closed={self._closed})"

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Runs

    def begin_run(
        self,
        weights: Buffer,
        combiner: WeightCombiner,
        num_partitions: int,
        *,
        sync: SyncPlan = _ASYNCHRONOUS,
        resume: RunCheckpoint | None = None,
        epochs: EpochPlan | None = None,
        compression: Compression = NO_COMPRESSION,
        follows: bool = False,
        keeps_spans: bool = False,
        traces: bool = False,
    ) -> int:
        """Starts a run and returns its number; workers of earlier runs are refused from now.

        Args:
            weights: initial weights, copied.
            sync: how workers are kept in step.
            resume: what the run goes on from; None begins anew.
            epochs: has workers stop at the end of every epoch, until `release_epoch`; None: they never do.
            compression: how weights travel; workers must be told the same.
            follows: whether this is a shard whose workers begin and evaluate as another shard tells them.
            keeps_spans: whether `observe` is to tell when workers were at what, not only for how long.
            traces: whether it is to tell what the server itself was at.

        Raises:
            CheckpointError: `resume` is of other metrics than `epochs`.
        """

        def begin() -> int:
            if self._run is not None:
                self._run.close()
                self._run = None  # so that its buffers are not held beside the new run's
            self._num_runs += 1
            self._run = Run(
                self._num_runs,
                self.layout,
                weights,
                combiner,
                num_partitions,
                receive_buffer_bytes=self._receive_buffer_bytes,
                executor=self._executor,
                io_timeout_s=self._io_timeout_s,
                lease_timeout_s=self._lease_timeout_s,
                sync=sync,
                resume=resume,
                epochs=epochs,
                compression=compression,
                follows=follows,
                keeps_spans=keeps_spans,
                traces=traces,
            )
            return self._num_runs

        return self._call(begin)

    def stop_run(self, failure: TensorsparkError | None = None) -> None:
        """Ends the current run: from now on its workers are refused."""
        self._call(lambda: self._current().stop(failure))

    def retire(self) -> None:
        """Forgets the current run, with all memory that it took; pages are served on, and another run may begin."""

        def forget() -> None:
            run, self._run = self._run, None
            if run is not None:
                run.close()

        self._call(forget)

    @property
    def began_at(self) -> float:
        """When the current run began, on the monotonic clock; a restored one, as if it had not been interrupted."""
        return self._current().began_at

    @property
    def has_run(self) -> bool:
        """Whether a run has begun, and is not forgotten."""
        return self._run is not None

    def request_stop(self) -> None:
        """Has the current run end soon and well: from now on every pull is answered that the worker is to finish."""
        self._call(lambda: self._current().request_stop())

    def wait_epoch(self, timeout_s: float) -> EpochEnd | None:
        """Waits until an epoch has ended, evaluation included, and workers rest until `release_epoch`.

        Returns:
            What came of it, the same until it is released; None where none ended within the timeout, or none will: the
            run has failed, was stopped or is finishing.
        """
        if self._closed:
            raise _closed_error()
        future = asyncio.run_coroutine_threadsafe(self._epoch_ended(timeout_s), self._loop)
        try:
            return future.result(timeout_s + _CALL_TIMEOUT_S)
        except concurrent.futures.CancelledError:  # the server is being closed
            return None
        finally:
            future.cancel()

    async def _epoch_ended(self, timeout_s: float) -> EpochEnd | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._current().epoch_ended()
        except TimeoutError:
            return None

    def release_epoch(self, epoch: int, values: Mapping[str, float], *, finish: bool = False) -> None:
        """Lets the epoch after `epoch` begin; after the last one, or to `finish` early, has workers finish.

        Args:
            epoch: that `wait_epoch` has returned. In a run that is stopped or finishing nothing is released.
            values: sent with every pull from now on; small.

        Raises:
            ValueError: another epoch than that.
            ConfigError: the values would not fit into a frame's header.
        """
        self._call(lambda: self._current().release_epoch(epoch, values, finish=finish))

    def status(self) -> Status:
        return self._call(lambda: self._current().status())

    def failure(self) -> TensorsparkError | None:
        """The first thing that went wrong in the current run, as a worker or the combiner reported it."""
        return self._call(lambda: self._current().state.failure)

    def observe(self) -> Observation:
        """What has happened in the current run since this was asked last; for one who asks."""
        return self._call(lambda: self._current().observe())

    def records(self) -> tuple[tuple[Point, ...], tuple[WorkerReport, ...]]:
        """The current run's course so far, and what every worker did."""
        return self._call(lambda: (self._current().points(), self._current().reports()))

    def read_weights(self, out: Buffer) -> int:
        """Copies the newest weights to `out` and returns their version: how often they were published."""
        run = self._current()
        snapshot = self._call(run.store.pin)
        try:
            out[:] = snapshot.buffer
        finally:
            self._call(lambda: run.store.unpin(snapshot))
        return snapshot.version

    def capture(self, timeout_s: float = _CALL_TIMEOUT_S) -> RunCheckpoint | None:
        """The current run between two rounds, its weights copied.

        Returns:
            None where no round ended within the timeout, and the log says so, or none will: the run is over.
        """
        future = asyncio.run_coroutine_threadsafe(self._captured(), self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.CancelledError:
            return None
        except TimeoutError:
            future.cancel()
            logger.warning(
                "no checkpoint was made: the open round did not end within %g s; where no worker hangs, but its "
                "intervals take so long, lower spark.tensorspark.sync.interval, or give checkpoints more time with a "
                "longer spark.tensorspark.checkpoint.interval",
                timeout_s,
            )
            return None

    async def _captured(self) -> RunCheckpoint:
        return await self._current().capture()

    def hold(self, at_version: int, timeout_s: float) -> int | None:
        """Stops the current run between two rounds, once its weights are of this version, until `go_on`.

        Returns:
            Their version; None where that did not come about within the timeout: then nothing is stopped.
        """
        future = asyncio.run_coroutine_threadsafe(self._held(at_version), self._loop)
        try:
            return future.result(timeout_s)
        except (TimeoutError, concurrent.futures.CancelledError):
            future.cancel()
            with contextlib.suppress(SessionClosedError):
                self.go_on()
            return None

    async def _held(self, at_version: int) -> int:
        return await self._current().hold(at_version)

    def go_on(self) -> None:
        """Ends what `hold` began."""
        self._call(lambda: self._current().go_on())

    @property
    def is_ending(self) -> bool:
        """Whether no more epoch of the current run will end: it has failed, was stopped or is finishing."""
        return self._call(lambda: self._current().state.stopped or self._current().state.is_finishing)

    def close(self) -> None:
        """Ends the run, closes all connections and the port, and ends the threads. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_CALL_TIMEOUT_S)
        self._executor.shutdown(wait=False, cancel_futures=True)  # a user's combiner may be at it for long

    # The loop's thread

    def _run_loop(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        http = LimitedServer(
            Door(self.token, lambda: self._run, self._io_timeout_s, self.port, self._site),
            max_connections=self._max_connections,
            handshake_timeout_s=self._handshake_timeout_s,
            max_frame_bytes=self.layout.num_bytes,
            ssl_context=self._ssl_context,
        )
        http.add_sockets(self._sockets)
        await self._closing.wait()
        http.stop()
        if self._run is not None:
            self._run.close()
        try:
            if self._site is not None:
                await self._site.stop()
        finally:
            http.close_streams()

    def _call(self, function: Callable[[], _T]) -> _T:
        """Runs `function` on the loop and returns its result."""
        if self._closed:
            raise _closed_error()
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return future.result(_CALL_TIMEOUT_S)

    def _current(self) -> Run:
        if self._run is None:
            raise RuntimeError("no run has begun on this server")
        return self._run


def _closed_error() -> SessionClosedError:
    return SessionClosedError("the parameter server is closed: stop_param_server() or close() ended it")
