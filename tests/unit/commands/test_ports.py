"""Which ports are free."""

from __future__ import annotations

import socket

from qwen_ray.commands.ports import QUIET_PORTS, free_ports, port_is_free


def test_a_port_in_use_is_not_free() -> None:
    (port,) = free_ports(1)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port))
        busy.listen()
        assert not port_is_free("127.0.0.1", port)
    assert port_is_free("127.0.0.1", port)


def test_free_ports_differ_and_lie_where_nobody_else_looks() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert set(ports) <= set(QUIET_PORTS)
