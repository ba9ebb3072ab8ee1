"""Clients as their users run them, at their current versions, against one real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MODEL
from environments import environment, python
from programs_run import run

PROGRAMS = Path(__file__).parent / "programs"

# Left out are an image for a model of text, which is refused, and a request without a model, which means the one that
# is served, as with vLLM: llm-comply wants an answer to the first and none to the second.
COMPLIANCE = (
    *("chat-basic-response", "chat-system-prompt", "chat-multi-turn", "chat-tool-calling"),
    *("chat-streaming-response", "chat-streaming-usage"),
)


@pytest.mark.parametrize(
    ("client", "program"),
    [
        ("openai", "openai_python"),
        ("langchain-openai", "langchain_openai_client"),
        ("litellm", "litellm_client"),
        ("instructor", "instructor_client"),
        ("qwen-agent", "qwen_agent_client"),
    ],
)
def test_python(url: str, client: str, program: str) -> None:
    run(python(client), str(PROGRAMS / f"{program}.py"), url, MODEL)


@pytest.mark.parametrize(("client", "program"), [("openai-node", "openai_node"), ("ai-sdk", "ai_sdk")])
def test_node(url: str, client: str, program: str) -> None:
    run("node", str(PROGRAMS / f"{program}.mjs"), url, MODEL, str(environment(client)))


def test_llm_comply(url: str) -> None:
    program = str(environment("llm-comply") / "bin" / "llm-comply")
    said = run(
        program,
        "-u",
        f"{url}/v1",
        "-k",
        "x",
        "-m",
        MODEL,
        "--format",
        "openai-chat",
        "--timeout",
        "300",
        "-f",
        ",".join(COMPLIANCE),
    )
    assert f"{len(COMPLIANCE)}/{len(COMPLIANCE)} passed" in said
