"""One session: a server is prepared, started, put through its workloads and ended; what it did is kept as it comes."""

from __future__ import annotations

import datetime
import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import this_machine
from benchmarks.peers import place, server
from benchmarks.peers.client import RequestFailed
from benchmarks.peers.peer import Peer
from benchmarks.peers.results import MEMORY, START, Cell, Results, failure_name
from benchmarks.peers.schedule import ARRIVING, SATURATING, Session, arrival_rate
from benchmarks.peers.workloads import Workload, warm_up
from qwen_ray.commands.ports import free_ports


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What stays the same over the sessions of a run."""

    results: Results
    path: Path
    workloads: Mapping[str, Workload]
    servers: tuple[str, ...]
    is_short: bool


async def run(bench: Bench, session: Session, peer: Peer) -> str | None:
    """What failed, in words, or None. A failure is kept, and what was measured before it, too."""
    name = failure_name(session.server, session.model, session.precision)
    path = place.log_file(f"{session.server}-{session.model}-{session.precision}")
    bench.results.failures.pop(name, None)
    failure: str | None = None
    with path.open("ab") as log:
        try:
            peer.prepare(session.model, session.precision, log)
            recorder = _Recorder(bench=bench, session=session, peer=peer, bandwidth=_bandwidth())
            (port,) = free_ports(1)
            launch = peer.launch(session.model, session.precision, port)
            async with server.running(launch, port, log) as up:
                seconds = up.seconds_to_first_token
                recorder.keep(START, {"first_token_s": seconds}, seconds)
                await _measure(recorder, up)
        except* (RequestFailed, TimeoutError, RuntimeError, OSError, ValueError) as errors:
            failure = f"{_first(errors)}; see {path}"
            bench.results.failures[name] = failure
    bench.results.save(bench.path)
    return failure


async def _measure(recorder: _Recorder, up: server.Running) -> None:
    bench, session = recorder.bench, recorder.session
    gc.freeze()  # a collection of all that torch has brought would be a pause in what is measured
    await warm_up(up.send, f"{session.round}")
    for name in session.workloads:
        rate = None
        if name == ARRIVING:
            rate = arrival_rate(bench.results, session.model, session.precision, bench.servers, short=bench.is_short)
            if rate is None:
                raise RuntimeError(f"{ARRIVING} arrives at a part of {SATURATING}'s rate: run {SATURATING} first")
        begun = time.perf_counter()
        figures = await bench.workloads[name].run(up.send, f"{name}-{session.round}", rate)
        recorder.keep(name, figures, time.perf_counter() - begun)
    up.measure_end()
    recorder.keep(MEMORY, up.memory.figures, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorder:
    bench: Bench
    session: Session
    peer: Peer
    bandwidth: float

    def keep(self, workload: str, figures: dict[str, float], seconds: float) -> None:
        """A start and its memory that are known of this round already stay."""
        key = self.session.key(workload)
        if key in self.bench.results.cells:
            return
        self.bench.results.cells[key] = Cell(
            key=key,
            figures=figures,
            seconds=seconds,
            form=self.peer.formats[self.session.model, self.session.precision],
            version=self.peer.version(),
            bandwidth=self.bandwidth,
            load_average=os.getloadavg()[0],
            at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self.bench.results.save(self.bench.path)


def _bandwidth() -> float:
    matrix = this_machine.make_matrix()
    try:
        return this_machine.read_bandwidth(matrix)
    finally:
        del matrix
        gc.collect()


def _first(errors: BaseExceptionGroup[Exception]) -> str:
    inner: BaseException = errors
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return f"{type(inner).__name__}: {inner}"
