"""The main job, as a user does it: `qwen-ray serve demo` under several plans, real weights, real HTTP, Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest
from openai import OpenAI
from served import NUM_TOKENS, PROMPTS, Answer, check_answers, serving


@pytest.mark.parametrize("plan", [("--tp", "2"), ("--pp", "2"), ("--tp", "3", "--pp", "2")], ids=" ".join)
def test_every_plan_gives_the_tokens_of_transformers(plan: tuple[str, ...], answers_of_demo: list[Answer]) -> None:
    degrees = dict(zip(plan[::2], map(int, plan[1::2]), strict=True))
    num_ranks = degrees.get("--tp", 1) * degrees.get("--pp", 1)
    with serving("demo", *plan) as url:
        status = httpx.get(f"{url}/status").json()
        ranks = [rank for replica in status["replicas"] for rank in replica["ranks"]]
        assert len({rank["pid"] for rank in ranks}) == num_ranks
        check_answers(url, "demo", answers_of_demo)


def test_paris_streams_and_status_is_a_table() -> None:
    with serving("demo") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PROMPTS[0]}],
            temperature=0,
            max_tokens=NUM_TOKENS,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert "Paris" in text

        shown = subprocess.run(
            [sys.executable, "-m", "qwen_ray.cli", "status", "--url", url, "--json"], capture_output=True, check=True
        )
        assert json.loads(shown.stdout)["replicas"][0]["ranks"][0]["num_steps"] > 0
