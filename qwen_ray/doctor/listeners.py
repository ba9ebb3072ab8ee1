"""Who listens on a TCP port of this machine, from Linux's tables. Other users' processes have no name here."""

from __future__ import annotations

import socket
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"


def can_bind(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises OSError for a host that is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            if error.errno in (98, 13):  # EADDRINUSE, EACCES
                return False
            raise
        return True


def listener(port: int) -> str | None:
    """`NAME (process PID)` of who listens on `port`; None where that is not to be seen."""
    inodes = {f"socket:[{inode}]" for inode in _inodes(port)}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and inodes and _holds(entry, inodes):
            return f"{(entry / 'comm').read_text().strip()} (process {entry.name})"
    return None


def _inodes(port: int) -> list[str]:
    found: list[str] = []
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found


def _holds(process: Path, sockets: set[str]) -> bool:
    try:
        return any(str(link.readlink()) in sockets for link in (process / "fd").iterdir())
    except OSError:  # somebody else's, or gone
        return False
