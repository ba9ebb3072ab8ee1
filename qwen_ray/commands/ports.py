"""TCP ports of this machine: which are free."""

from __future__ import annotations

import secrets
import socket

# Below what Linux gives to outgoing connections and to whoever lets it choose, above Ray's workers, and below 30000,
# where Serve's replicas begin: what is free here now is likely to be so in ten seconds.
QUIET_PORTS = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on, and that nobody else is likely to take soon."""
    ports: list[int] = []
    while len(ports) < count:
        port = secrets.choice(QUIET_PORTS)
        if port not in ports and port_is_free("0.0.0.0", port):
            ports.append(port)
    return ports


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
        return True
