"""Sockets: where the server listens, how many connections it can bear, and how the kernel tells it of the dead."""

from __future__ import annotations

import errno
import logging
import resource
import socket

from tensorspark.errors import ConfigError, PortTakenError

logger = logging.getLogger(__name__)

# Files that the rest of the process (Spark's gateway, a checkpoint, TensorBoard) may want open at the same time.
_RESERVED_FILES = 128

# Linux takes no more for TCP_KEEPIDLE and TCP_KEEPINTVL (EINVAL).
_MAX_PROBE_S = 32767


def bind(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of `host` if it is this machine's, else on all interfaces; all on one port.

    Args:
        port: 0 takes a free one.

    Raises:
        PortTakenError: another program listens at the port.
        ConfigError: the host has no address, or the port may not be opened.
    """
    try:
        return _listening_sockets(host, port)
    except (socket.gaierror, UnicodeError) as error:  # the second: a name that DNS cannot spell
        raise ConfigError(
            f"server_host {host!r} has no address on the driver ({error}); set server_host "
            f"(or spark.tensorspark.server.host) to a name or address of the driver that executors can reach"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and host:
            logger.warning("server_host %s is not an address of this machine: listening on all interfaces", host)
            return bind("", port)
        raise (PortTakenError if error.errno == errno.EADDRINUSE else ConfigError)(
            f"port {port} cannot be opened on {host or 'any interface'}: {error}; choose another server_port "
            f"(or spark.tensorspark.server.port), or 0 for a free one"
        ) from error


def _listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One socket for each of the host's addresses, all on one port."""
    addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if _is_own_name(host) and all(str(address[4][0]).startswith("127.") for address in addresses):
        # Debian resolves a machine's own name to 127.0.1.1; elsewhere it stands for an address of the network.
        return _listening_sockets("", port)
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(addresses):
        try:
            listener = socket.create_server((address[0], port), family=family, backlog=1024)
        except OSError as error:
            if sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # "localhost" may have an IPv6 address that the machine does not
            for opened in sockets:
                opened.close()
            raise
        listener.setblocking(False)
        port = listener.getsockname()[1]
        sockets.append(listener)
    return sockets


def _is_own_name(host: str) -> bool:
    return host not in ("", "localhost") and host in (socket.gethostname(), socket.getfqdn())


def connection_limit(max_connections: int) -> int:
    """As many connections as asked for, or as the process may open files for, whichever is fewer.

    A server that runs out of files cannot even accept a connection to close it: it would be called again and again.
    """
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY:
        return max_connections
    limit = min(max_connections, max(1, max_files - min(_RESERVED_FILES, max_files // 2)))
    if limit < max_connections:
        logger.info("at most %d connections at once, not %d: `ulimit -n` is %d", limit, max_connections, max_files)
    return limit


def notice_vanished_peer(connection: socket.socket, deadline_s: float) -> None:
    """Has the kernel close the connection of a host that lost power or network and will never say so.

    Without it the lease of such a worker would last for ever, and Spark's retry of the partition wait as long.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = min(max(1, round(deadline_s / 4)), _MAX_PROBE_S)
    for option, value in (("TCP_KEEPIDLE", probe_s), ("TCP_KEEPINTVL", probe_s), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS calls the first TCP_KEEPALIVE
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
