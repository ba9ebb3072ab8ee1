"""Whether ranks reach each other: on one machine through each of its interfaces, in a cluster between its nodes."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from qwen_ray.doctor.finding import Finding
from qwen_ray.doctor.reach import Meeting, Met, attend, free_port

SIOCGIFADDR = 0x8915
ADVICE = "Let these nodes reach each other on all TCP ports (firewall, security group, NetworkPolicy)."

# Asks a node to attend; the answer comes when it has.
Attend = Callable[[str, Sequence[Meeting]], list[Met]]


def interfaces() -> dict[str, str]:
    """IPv4 addresses by the name of the interface, those that are down left out."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(one, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                address = socket.inet_ntoa(answer[20:24])
                free_port(address)
            except OSError:
                continue
            found[name] = address
    return found


def own_network(num_gpus: int) -> list[Finding]:
    """Two processes of this machine, through each interface in turn; and over NCCL where there are two GPUs."""
    names = interfaces()
    if not names:
        message = "no interface has an IPv4 address and is up, not even lo"
        return [Finding(check="network", verdict="fail", message=message, advice="ip link set lo up")]
    ways = [(f"{name} ({address})", address, False) for name, address in names.items()]
    if num_gpus > 1:
        ways.append(("NCCL", next(iter(names.values())), True))
    spots = [(address, free_port(address), is_nccl) for _, address, is_nccl in ways]
    sides = [
        [
            Meeting(rank=rank, host=host, port=port, own=host, is_nccl=is_nccl, device=rank)
            for host, port, is_nccl in spots
        ]
        for rank in (0, 1)
    ]
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(attend, sides)
    return [
        _judged(way, "", one, other, "Let processes of this machine reach each other there.")
        for (way, _, _), one, other in zip(ways, first, second, strict=True)
    ]


def between(nodes: Sequence[str], port: Callable[[str], int], ask: Attend, num_gpus: dict[str, int]) -> list[Finding]:
    """The first node with each of the others; over NCCL too where both have GPUs. `nodes` are addresses."""
    findings: list[Finding] = []
    first = nodes[0]
    with ThreadPoolExecutor(2) as both:
        for other in nodes[1:]:
            kinds = [False] + ([True] if num_gpus.get(first) and num_gpus.get(other) else [])
            spots = [(port(first), is_nccl) for is_nccl in kinds]
            sides: list[Future[list[Met]]] = []
            for rank, node in enumerate((first, other)):
                meetings = [Meeting(rank=rank, host=first, port=p, own=node, is_nccl=nccl) for p, nccl in spots]
                sides.append(both.submit(ask, node, meetings))
            one, two = (side.result() for side in sides)
            for is_nccl, met, its in zip(kinds, one, two, strict=True):
                findings.append(_judged(f"{'NCCL' if is_nccl else 'TCP'} with {first}", other, met, its, ADVICE))
    return findings


def _judged(way: str, node: str, one: Met, other: Met, advice: str) -> Finding:
    if one.error or other.error:
        why = "; ".join(dict.fromkeys(filter(None, (other.error, one.error))))
        return Finding(check="network", verdict="fail", message=f"{way}: {why}", advice=advice, node=node)
    milliseconds = max(one.seconds, other.seconds) * 1e3
    message = f"{way}: two ranks met; a sum of 1 MB took {milliseconds:.1f} ms"
    return Finding(check="network", verdict="ok", message=message, node=node)
