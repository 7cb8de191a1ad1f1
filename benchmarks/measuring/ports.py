"""Ports for servers that have to be told one, as they cannot say which they chose."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_LOWEST, _HIGHEST = 20_000, 32_768
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, and that the kernel gives to none who asks for any: those take it in the meantime.

    Raises:
        OSError: no such port was found.
    """
    highest = min(_HIGHEST, int(_EPHEMERAL.read_text().split()[0])) if _EPHEMERAL.exists() else _HIGHEST
    candidates = range(_LOWEST, highest) or range(_LOWEST, _HIGHEST)
    # Not the program's own generator: what it draws from a seed must not depend on ports.
    for port in random.SystemRandom().sample(candidates, min(100, len(candidates))):
        try:
            with socket.create_server((host, port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"expected a free port from {_LOWEST} to {highest - 1} of {host}, found none")
