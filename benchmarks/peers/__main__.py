"""qwen-ray beside its peers on this CPU: one checkpoint, one client, one server at a time, rounds that alternate.

    make bench-peers [ARGS="--servers qwen-ray,llama.cpp --precisions bf16 --workloads W1,W2 --rounds 3"]

Installs and converts what is missing, measures what is not kept yet, and prints one table. Every finished workload is
kept in `benchmarks/results/peers.json`; after Ctrl-C the same command goes on. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import this_machine
from benchmarks.peers import checkpoint, place, session
from benchmarks.peers.peer import PRECISIONS
from benchmarks.peers.registry import PEERS
from benchmarks.peers.results import Results
from benchmarks.peers.schedule import Wanted, estimated_seconds, pending
from benchmarks.peers.table import render
from benchmarks.peers.workloads import SHORT_WORKLOADS, WORKLOADS

RESULTS = place.ROOT / "benchmarks/results/peers.json"
SHORT_RESULTS = place.BENCH / "short.json"


def main() -> None:
    arguments = _arguments()
    wanted = Wanted(
        servers=arguments.servers,
        models=arguments.models,
        precisions=arguments.precisions,
        workloads=arguments.workloads,
        rounds=arguments.rounds,
    )
    path = arguments.output or (SHORT_RESULTS if arguments.short else RESULTS)
    results = Results.load(path)
    if arguments.again:
        results.forget(arguments.again)
    if arguments.prepare:
        sys.exit(_prepare(wanted))
    if not arguments.table:
        sessions = list(pending(wanted, PEERS, results))
        _show_plan(sessions, results)
        if arguments.dry_run:
            return
        results.save(path)  # what is forgotten stays so
        bench = session.Bench(
            results=results,
            path=path,
            workloads=SHORT_WORKLOADS if arguments.short else WORKLOADS,
            servers=arguments.servers,
            is_short=arguments.short,
        )
        try:
            asyncio.run(_measure(bench, sessions))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sys.exit("stopped; the same command goes on from here")
    print(render(results, arguments.servers, arguments.models, _weight_bytes(arguments.models)))


async def _measure(bench: session.Bench, sessions: Sequence[session.Session]) -> None:
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)  # as Ctrl-C: no server stays
    bench.results.machine = this_machine.describe()
    broken: set[tuple[str, str, str]] = set()  # what failed once is left alone until the next run
    for number, one in enumerate(sessions, 1):
        what = (one.server, one.model, one.precision)
        if what in broken:
            continue
        print(f"[{number}/{len(sessions)}] {' '.join(what)} round {one.round}: {' '.join(one.workloads)}", flush=True)
        if failure := await session.run(bench, one, PEERS[one.server]):
            broken.add(what)
            print(f"    failed: {failure}", flush=True)


def _prepare(wanted: Wanted) -> int:
    """Everything that a run would install or convert; nothing is measured. The number of failures."""
    num_failed = 0
    for server in wanted.servers:
        for model, precision in PEERS[server].formats:
            if model in wanted.models and precision in wanted.precisions:
                with place.log_file(f"prepare-{server}-{model}-{precision}").open("ab") as log:
                    try:
                        PEERS[server].prepare(model, precision, log)
                        print(f"{server} {model} {precision}: ready", flush=True)
                    except (RuntimeError, OSError) as error:
                        num_failed += 1
                        print(f"{server} {model} {precision}: {error}", flush=True)
    return num_failed


def _show_plan(sessions: Sequence[session.Session], results: Results) -> None:
    seconds = {one: estimated_seconds(one, results) for one in sessions}
    for one in sessions:
        words = f"{one.model} {one.precision} round {one.round} {one.server}: {' '.join(one.workloads)}"
        print(f"{words}, about {seconds[one]:.0f} s")
    print(f"{len(sessions)} sessions, about {sum(seconds.values()) / 60:.0f} minutes", flush=True)


def _weight_bytes(models: Iterable[str]) -> dict[str, int]:
    """What a decode step of one stream reads: all of the dense model's file. A mixture's step reads some experts."""
    file = place.checkpoint("dense") / "model.safetensors"
    return {"dense": file.stat().st_size} if "dense" in models and file.exists() else {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-peers ARGS=…", description="qwen-ray beside its peers.")

    def names(option: str, known: Sequence[str], default: Sequence[str], told: str) -> None:
        def parse(text: str) -> tuple[str, ...]:
            given = tuple(text.split(","))
            if unknown := [name for name in given if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return given

        parser.add_argument(option, type=parse, default=tuple(default), help=f"{told}: {', '.join(known)}")

    names("--servers", tuple(PEERS), tuple(PEERS), "who is measured")
    names("--models", tuple(checkpoint.SHAPES), tuple(checkpoint.SHAPES), "what they serve")
    names("--precisions", PRECISIONS, PRECISIONS, "in which precision")
    names("--workloads", tuple(WORKLOADS), tuple(WORKLOADS), "which loads")
    names("--again", tuple(PEERS), (), "forget what is kept of these servers first")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--dry-run", action="store_true", help="only print what is left to do, and how long it takes")
    parser.add_argument("--prepare", action="store_true", help="only install and convert")
    parser.add_argument("--table", action="store_true", help="only print the table of what is kept")
    parser.add_argument("--short", action="store_true", help="tiny workloads, kept elsewhere: does every server run?")
    parser.add_argument("--output", type=Path, help="another JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
