"""Tables, words and JSON say what the report holds."""

from __future__ import annotations

import json
from typing import Any

from qwen_ray.core.hardware import Hardware
from qwen_ray.planner.candidate import PlanReport, PlanRequest
from qwen_ray.planner.explain import describe, header, rows, to_json
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan


def report(name: str, hardware: str, **wanted: Any) -> PlanReport:
    config = lookup(name)
    assert config is not None
    return plan(PlanRequest(config=config, hardware=Hardware.parse(hardware), model=name, **wanted))


def test_json_of_a_plan_that_fits() -> None:
    answer = json.loads(json.dumps(to_json(report("Qwen/Qwen2.5-72B-Instruct", "8xH100-80G"))))
    chosen = answer["chosen"]
    assert chosen == answer["candidates"][0]
    assert sum(chosen["weights_bytes_per_rank"]) / 145.4e9 - 1 < 0.02
    assert len(chosen["weights_bytes_per_rank"]) == chosen["tp"] * chosen["pp"]
    assert chosen["kv_bytes_per_token"] == 327680
    assert chosen["fits"] is True
    assert chosen["reason"] is None
    assert chosen["kv_tokens"] == chosen["num_blocks"] * chosen["block_size"]
    totals = zip(
        *(chosen[f"{part}_bytes_per_rank"] for part in ("weights", "tables", "kv", "activation", "reserve", "total")),
        strict=True,
    )
    assert all(sum(parts) == total <= chosen["usable_bytes"] for *parts, total in totals)
    assert [stage["ranks"] for stage in answer["placement"][0]["stages"]] == [list(range(8))]
    assert answer["hardware"] == "8xH100-80G"
    assert answer["inequality"] is None


def test_json_of_a_refusal() -> None:
    answer = json.loads(json.dumps(to_json(report("Qwen/Qwen2.5-72B-Instruct", "1xH100-80G"))))
    assert answer["chosen"] is None
    assert answer["placement"] is None
    assert "145.41 GB" in answer["inequality"]
    assert answer["candidates"][0]["reason"] == answer["inequality"]
    assert answer["candidates"][0]["tokens_per_s"] is None
    assert answer["advice"]


def test_the_table_has_a_cell_for_every_column() -> None:
    for name, hardware in (("qwen3-235b-a22b", "10x8xA100-40G"), ("qwen2.5-7b", "1xT4-16G"), ("demo", "1xcpu-24G")):
        found = report(name, hardware)
        table = rows(found)
        assert 1 <= len(table) <= len(found.candidates)
        assert all(len(row) == len(header(found)) for row in table)
        assert [row[-1].startswith("chosen") for row in table] == [found.chosen is not None] + [False] * (
            len(table) - 1
        )
    refused = report("qwen2.5-7b", "2xH100-80G", tp=4)
    assert len(rows(refused)[0]) == len(header(refused))


def test_words_name_ranks_layers_nodes_and_numbers() -> None:
    text = describe(report("demo", "1xcpu-24G", tp=3, pp=2))
    assert "tp=3 pp=2 dp=1: 1 replica of 6 ranks" in text
    assert "ranks 0 to 2, each (layers 0 to 14)" in text
    assert "replica 0: stages 0 to 1 on node 0 (cpu-24G)" in text
    assert "beside this, each rank's process takes about 0.52 GB" in text
    assert "stands by" not in text
    assert "stands by for each stage 0.31 GB" in describe(report("demo", "1xcpu-24G", standby_ranks=True))
    refused = describe(report("qwen2.5-72b", "1xH100-80G"))
    assert "Nothing fits." in refused
    assert "would hold it" in refused


def test_a_mixture_tells_of_its_experts() -> None:
    config = lookup("qwen3-30b-a3b")
    assert config is not None
    load = ((90.0,) + (1.0,) * 127,) * 47 + ((1.0,) * 128,)
    found = plan(
        PlanRequest(
            config=config,
            hardware=Hardware.parse("4xH100-80G"),
            tp=1,
            pp=1,
            ep=4,
            num_redundant_experts=4,
            expert_load=load,
        )
    )
    text = describe(found)
    assert "30.53 B parameters, 3.35 B active" in text
    assert "Chosen: tp=1 pp=1 ep=4 dp_attention=4 dp=1" in text
    assert (
        "128 experts and 4 copies in each of 48 layers, of which a token passes 8: 4 expert ranks of 33 slots" in text
    )
    # 8 choices reach 4 (1 - (3/4)^8) = 3.6 of 4 ranks, 3/4 of them another one: 2.7 x (2 x 4,096 + 64) bytes.
    assert "22.3 kB in two all-to-alls for each token and layer" in text
    # Dealt out in order, rank 0 has 90 + 31 of 217 tokens in 47 layers, four times 121 / 217 = 2.23, and a quarter in
    # one; as placed, expert 0 has a copy on each rank.
    assert "1.00 as placed (worst layer 1.00), 2.22 dealt out in order (worst layer 2.23)" in text
    answer = json.loads(json.dumps(to_json(found)))
    chosen = answer["chosen"]
    assert (chosen["ep"], chosen["dp_attention"], chosen["num_redundant_experts"]) == (4, 4, 4)
    assert chosen["expert_imbalance"]["even"] > 2 > chosen["expert_imbalance"]["placed"]
    held = sum(chosen["weights_bytes_per_rank"]) - sum(chosen["copies_bytes"].values())
    assert held == answer["checkpoint_bytes"] == 2 * answer["num_parameters"]
    assert set(chosen["copies_bytes"]) == {"attention", "experts", "embedding and head", "norms and routers"}
