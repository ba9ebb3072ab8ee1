"""What a server says of itself, shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.cli import main
from qwen_ray.core.stats import EngineStats, RankStats


def _status() -> dict[str, Any]:
    engine = EngineStats(num_running=2, num_waiting=1, num_blocks=100, num_used_blocks=25, block_size=16, steps_total=7)
    ranks = [
        RankStats(rank=rank, stage=rank, tp_rank=0, pid=4000 + rank, node="n", device="cpu", memory_bytes=5 * 10**8)
        for rank in (0, 1)
    ]
    replica = {
        "replica": "r1",
        "state": "ready",
        "error": None,
        "engine": {**asdict(engine), "kv_usage": engine.kv_usage},
        "ranks": [{**asdict(rank), "expert_tokens": 0} for rank in ranks],
    }
    loading = {"replica": "r2", "state": "loading", "error": None, "engine": None, "ranks": []}
    return {
        "version": "1",
        "model": {"id": "demo", "root": "demo", "max_model_len": 8192},
        "ingresses": [{"id": "i", "address": "a"}],
        "replicas": [replica, loading],
    }


def _moe_status() -> dict[str, Any]:
    status = _status()
    status["replicas"][0] |= {"expert_imbalance": 1.25, "num_rebalances": 3}
    for ep_rank, rank in enumerate(status["replicas"][0]["ranks"]):
        rank |= {"ep_rank": ep_rank, "expert_tokens": 12345}
    return status


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["status", *arguments])
    return int(ended.value.code or 0)


def test_a_table_of_ranks(http_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = http_server(lambda *_: (200, "application/json", [json.dumps(_status()).encode()]))
    assert _run("--url", url) == 0
    shown = capsys.readouterr().out
    for part in ("demo", "r1", "ready", "2 running", "1 waiting", "25% of 1600 tokens", "4000", "4001", "500 MB", "r2"):
        assert part in shown


def test_json(http_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = http_server(lambda *_: (200, "application/json", [json.dumps(_status()).encode()]))
    assert _run("--url", url + "/", "--json") == 0
    assert json.loads(capsys.readouterr().out) == _status()


def test_nothing_runs(http_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = http_server(lambda *_: (404, "text/plain", [b"no"]))
    assert _run("--url", url) == 1
    assert "No qwen-ray server answers" in capsys.readouterr().err


def test_experts(http_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = http_server(lambda *_: (200, "application/json", [json.dumps(_moe_status()).encode()]))
    assert _run("--url", url) == 0
    shown = capsys.readouterr().out
    for part in ("1.25 times the mean", "moved 3 times", "ep rank", "12345"):
        assert part in shown
    assert "tp rank" not in shown  # there is one


def test_expert_load_to_a_file(http_server: Any, tmp_path: Path) -> None:
    load = {"model": "m", "num_experts": 2, "expert_tokens": [[3, 4]]}
    answers = {"/expert_load": load}
    url = http_server(lambda _, path, __: (200, "application/json", [json.dumps(answers[path]).encode()]))
    assert _run("--url", url, "--expert-load", str(tmp_path / "load.json")) == 0
    assert json.loads((tmp_path / "load.json").read_text()) == load


def test_a_dense_model_has_no_expert_load(http_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = {"model": "m", "num_experts": 0, "expert_tokens": []}
    url = http_server(lambda *_: (200, "application/json", [json.dumps(load).encode()]))
    assert _run("--url", url, "--expert-load", str(tmp_path / "load.json")) == 1
    assert "m has no experts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
