"""What outlasts a run: the parameter server and the published files, removed when their session goes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from tensorspark.config import Config
from tensorspark.driver.checkpoints import CheckpointDirectory, Checkpointer
from tensorspark.driver.publishing import Publisher
from tensorspark.ps.checkpoint import Plain, RunCheckpoint
from tensorspark.ps.link import ServerAddress
from tensorspark.ps.server import ParameterServer
from tensorspark.weights.layout import WeightLayout

logger = logging.getLogger(__name__)

_MIN_CAPTURE_TIMEOUT_S = 60.0


class Resources:
    """A session's server and files. It does not know the session, so that this can be forgotten and finalized.

    Args:
        server_host: advertised to executors.
        user: who writes to HDFS.
    """

    def __init__(self, publisher: Publisher, config: Config, server_host: str, user: str) -> None:
        self._publisher = publisher
        self._config = config
        self._server_host = server_host
        self._user = user
        self.server: ParameterServer | None = None

    def server_for(self, layout: WeightLayout) -> ParameterServer:
        """The server that runs, if it serves this layout, else a new one in its place.

        Raises:
            ConfigError: see `ParameterServer`.
        """
        if self.server is not None and self.server.layout.fingerprint != layout.fingerprint:
            self.stop_server()
        if self.server is None:
            self.server = start_server(layout, self._config, self._server_host)
        return self.server

    def checkpoints(
        self, server: ParameterServer, url: str | None, planned: Callable[[], Mapping[str, Plain]]
    ) -> contextlib.AbstractContextManager[Checkpointer | None]:
        """Writes checkpoints of the server's current run to `url` meanwhile, if it is to have any.

        Args:
            planned: says what each is to say of the run; see `driver.continuing`.
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
        return Checkpointer(directory, capture, self._config.checkpoint_interval_s)

    def stop_server(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()

    def close(self) -> None:
        try:
            self.stop_server()
        finally:
            self._publisher.remove()


def start_server(layout: WeightLayout, config: Config, host: str) -> ParameterServer:
    """A parameter server as `config` says; raises ConfigError, see `ParameterServer`."""
    return ParameterServer(
        layout,
        host,
        config.server_port,
        receive_buffer_bytes=config.receive_buffer_bytes,
        io_timeout_s=config.io_timeout_s,
        lease_timeout_s=config.lease_timeout_s,
        tls=config.tls_enabled,
        max_connections=config.max_connections,
    )


def address_of(server: ParameterServer, config: Config) -> ServerAddress:
    """What workers need to know to speak with the server."""
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
