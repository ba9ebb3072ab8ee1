"""A MoE served with its experts spread over ranks: the dense model's tokens, and experts that move under load."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from served import PROMPTS, Answer, check_answers, serving

NUM_STREAMS = 16


@pytest.mark.parametrize("plan", [("--ep", "2"), ("--tp", "2", "--ep", "2")], ids=" ".join)
def test_experts_on_two_ranks_say_what_the_dense_model_says(
    plan: tuple[str, ...], upcycled_demo: Path, answers_of_demo: list[Answer]
) -> None:
    with serving(str(upcycled_demo), *plan, "--dtype", "float32", "--served-model-name", "moe") as url:
        (replica,) = httpx.get(f"{url}/status").json()["replicas"]
        assert [rank["ep_rank"] for rank in replica["ranks"]] == [0, 1]
        assert replica["dp_attention"] == (1 if "--tp" in plan else 2)
        check_answers(url, "moe", answers_of_demo)
        (replica,) = httpx.get(f"{url}/status").json()["replicas"]
        assert all(rank["expert_tokens"] for rank in replica["ranks"])


@pytest.fixture(scope="module")
def skewed(upcycled_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a router that likes experts 0 and 1 of four, which lie on the same one of two ranks."""
    folder = tmp_path_factory.mktemp("skewed") / "moe"
    shutil.copytree(upcycled_demo, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    routers = {name: file for name, file in index["weight_map"].items() if name.endswith("mlp.gate.weight")}
    biased: dict[str, torch.Tensor] = {}
    for name, file in routers.items():
        gate = load_file(upcycled_demo / file)[name]
        # Tokens differ in sign along any direction: what points the same way for two experts moves them together.
        gate[1] = gate[0] + 0.01 * gate[1]
        gate[2:] *= 0.05
        biased[name] = gate
        index["weight_map"][name] = "routers.safetensors"
    save_file(biased, folder / "routers.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def imbalance(url: str) -> tuple[float, float]:
    """(the metric, times that experts moved)"""
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    (moved,) = (s.value for s in families["qwen_ray_expert_rebalances"].samples if s.name.endswith("_total"))
    return families["qwen_ray_expert_imbalance"].samples[0].value, moved


def test_experts_move_under_sixteen_streams_and_no_token_changes(skewed: Path, answers_of_demo: list[Answer]) -> None:
    arguments = (
        "--ep",
        "2",
        "--dtype",
        "float32",
        "--served-model-name",
        "moe",
        "--enable-eplb",
        "--eplb-interval",
        "2",
    )
    with serving(str(skewed), *arguments) as url, OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        seen: list[float] = []
        is_done = False

        def stream(i: int) -> None:
            answer = answers_of_demo[i % len(PROMPTS)]
            while not is_done:
                chunks = client.completions.create(
                    model="moe", prompt=answer.prompt_ids, max_tokens=len(answer.output_ids), temperature=0, stream=True
                )
                assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.text

        with ThreadPoolExecutor(max_workers=NUM_STREAMS) as pool:
            streams = [pool.submit(stream, i) for i in range(NUM_STREAMS)]
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                value, moved = imbalance(url)
                if value != 1.0 and (not seen or value != seen[-1]):
                    seen.append(value)
                if moved and len(seen) > 1 and seen[-1] < 1.2:
                    break
                time.sleep(0.5)
            is_done = True
            for done in streams:
                done.result()
        assert seen[0] > 1.4, seen
        assert seen[-1] < 1.2, seen
        (replica,) = httpx.get(f"{url}/status").json()["replicas"]
        assert sum(rank["num_moved_experts"] for rank in replica["ranks"]) > 0
