"""What outlasts a run: the parameter server and the published files, removed when their session goes."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyspark import cloudpickle

from tensorspark.config import Config
from tensorspark.driver.checkpoints import CheckpointDirectory, Checkpointer
from tensorspark.driver.publishing import Publisher
from tensorspark.errors import ConfigError, PortTakenError
from tensorspark.ps.checkpoint import Plain, RunCheckpoint
from tensorspark.ps.http import Site
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.server import ParameterServer
from tensorspark.shards.fleet import Hosts
from tensorspark.shards.host import ShardJob
from tensorspark.shards.processes import ShardProcesses
from tensorspark.shards.sharded_server import AnyServer, Endpoint, ShardedServer
from tensorspark.weights.combiners import WeightCombiner
from tensorspark.weights.layout import WeightLayout
from tensorspark.weights.ranges import Shard, split

logger = logging.getLogger(__name__)

StartShards = Callable[[Sequence[ShardJob]], Hosts]


_LOOPBACK = "127.0.0.1"
_MIN_CAPTURE_TIMEOUT_S = 60.0
_MAX_PORT_RETRIES = 16


class Resources:
    """A session's server and files. It does not know the session, so that this can be forgotten and finalized.

    Args:
        server_host: advertised to executors.
        user: who writes to HDFS.
        start_shards: starts the processes of all shards but the first.
        site: pages that servers serve beside their own.
    """

    def __init__(
        self,
        publisher: Publisher,
        config: Config,
        server_host: str,
        user: str,
        start_shards: StartShards = ShardProcesses,
        site: Site | None = None,
    ) -> None:
        self._site = site
        self._publisher = publisher
        self._config = config
        self._server_host = server_host
        self._user = user
        self._start_shards = start_shards
        self._has_said_fewer = False
        self.server: AnyServer | None = None

    def server_for(self, layout: WeightLayout, combiner: WeightCombiner) -> AnyServer:
        """The server that runs, if it serves this layout as the combiner wants it, else a new one in its place.

        Raises:
            ConfigError: see `ParameterServer`.
        """
        shards = self._shards(layout, combiner)
        if self.server is not None and _what_it_serves(self.server) != [s.layout.fingerprint for s in shards]:
            self.stop_server()
        if self.server is None:
            self.server = start_server(layout, self._config, self._server_host, shards, self._start_shards, self._site)
        return self.server

    def _shards(self, layout: WeightLayout, combiner: WeightCombiner) -> Sequence[Shard]:
        whole, wanted = (Shard(0, layout.num_bytes, layout),), self._config.num_shards
        if wanted == 1:
            return whole
        shards = split(layout, wanted, whole_tensors=not combiner.is_elementwise)
        if len(shards) < wanted and not self._has_said_fewer:
            self._has_said_fewer = True
            logger.warning(
                "%d shard(s) instead of num_shards=%d: the weights are %d bytes in %d tensors%s",
                len(shards),
                wanted,
                layout.num_bytes,
                len(layout.specs),
                "" if combiner.is_elementwise else f", which {type(combiner).__name__} takes whole",
            )
        return shards if len(shards) > 1 else whole

    def checkpoints(
        self,
        server: AnyServer,
        url: str | None,
        planned: Callable[[], Mapping[str, Plain]],
        on_written: Callable[[int, str, int, float], None] = lambda version, url, num_bytes, duration_s: None,
    ) -> contextlib.AbstractContextManager[Checkpointer | None]:
        """Writes checkpoints of the server's current run to `url` meanwhile, if it is to have any.

        Args:
            planned: says what each is to say of the run; see `driver.continuing`.
            on_written: told of each: version, URL, bytes, seconds that it took.
        """
        if url is None:
            return contextlib.nullcontext()

        # A bulk-synchronous round may last for long: who looked for its end for a part of the interval only might never
        # see one.
        timeout_s = max(_MIN_CAPTURE_TIMEOUT_S, self._config.checkpoint_interval_s)

        def capture() -> RunCheckpoint | None:
            captured = server.capture(timeout_s)
            return captured and replace(captured, plan=planned())

        directory = CheckpointDirectory(url, user=self._user, keep=self._config.keep_checkpoints)
        logger.info("checkpoints go to %s", url)
        return Checkpointer(directory, capture, self._config.checkpoint_interval_s, on_written)

    def retire_server(self) -> None:
        """Frees what the server holds of its run; it goes on to show its pages, until the next run or the end."""
        server = self.server
        if server is None:
            return
        try:
            server.retire()
        except Exception as error:  # it is closed already, or too busy: what is over does not fail of it
            logger.debug("the server was not retired: %s", error)
            self.stop_server()

    def stop_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()

    def close(self) -> None:
        try:
            self.stop_server()
        finally:
            self._publisher.remove()


def _what_it_serves(server: AnyServer) -> list[str]:
    if isinstance(server, ShardedServer):
        return [shard.layout.fingerprint for shard in server.shards]
    return [server.layout.fingerprint]


def start_server(
    layout: WeightLayout,
    config: Config,
    host: str,
    shards: Sequence[Shard] = (),
    start_shards: StartShards = ShardProcesses,
    site: Site | None = None,
) -> AnyServer:
    """A parameter server as `config` says, of all weights or of several shards, at its port or the next free one.

    Raises:
        ConfigError: see `ParameterServer`.
    """
    arguments: dict[str, Any] = {
        "receive_buffer_bytes": config.receive_buffer_bytes // max(1, len(shards)),
        "io_timeout_s": config.io_timeout_s,
        "lease_timeout_s": config.lease_timeout_s,
        "tls": config.tls_enabled,
        "max_connections": config.max_connections,
    }
    first = shards[0].layout if len(shards) > 1 else layout
    primary = _at_free_port(config.server_port, lambda port: ParameterServer(first, host, port, site=site, **arguments))
    if len(shards) < 2:
        return primary
    return ShardedServer(
        layout,
        shards,
        primary,
        start=start_shards,
        dumps=_pickled,
        server=arguments,
        address_of=functools.partial(address_of, config=config),
        listen_host=host if config.num_task_shards else _LOOPBACK,
        shards_host=None if config.num_task_shards else host,
    )


def _at_free_port(port: int, start: Callable[[int], ParameterServer]) -> ParameterServer:
    """Starts a server at the port or, as Spark does with its own, at one of the next sixteen.

    Raises:
        PortTakenError: all are taken.
    """
    last = min(port + _MAX_PORT_RETRIES, 65535)
    for candidate in range(port, last + 1):
        try:
            server = start(candidate)
            break
        except PortTakenError:
            if candidate == last:
                raise
    if candidate != port:
        logger.warning("port %d (spark.tensorspark.server.port) is taken: the server listens at %d", port, candidate)
    return server


def _pickled(combiner: WeightCombiner) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(combiner)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ConfigError(
            f"{type(combiner).__name__} cannot be sent to the processes of shards: {type(error).__name__}: {error}; "
            f"have it hold nothing but plain values, or take num_shards=1"
        ) from error
    return pickled


def address_of(server: Endpoint, config: Config) -> ServerAddress:
    """What workers need to know to speak with a server."""
    return ServerAddress(
        server.host,
        server.port,
        server.token,
        connect_timeout_s=config.connect_timeout_s,
        io_timeout_s=config.io_timeout_s,
        reconnect_timeout_s=config.reconnect_timeout_s,
        lease_timeout_s=config.lease_timeout_s,
        certificate=server.certificate,
    )
