"""`qwen-ray serve` as a process of its own, and what the demo model must say. Not a test."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import transformers
from openai import OpenAI
from openai.types import Completion

from qwen_ray.commands.ports import free_ports
from qwen_ray.commands.process_tree import descendants

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in one sentence.",
    "List three uses for a paperclip.",
    "What is 12 times 12?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' to Spanish.",
    "Give me a recipe for pancakes.",
    "What is photosynthesis?",
    "Name the planets of the solar system.",
    "Write a Python function that reverses a string.",
    "What is the boiling point of water?",
    "Tell me a short story about a fox.",
    "How do vaccines work?",
    "What are the primary colors?",
    "Summarize the water cycle.",
    "Why do cats purr?",
    "What does HTTP stand for?",
    "Suggest a name for a bakery.",
    "What is the largest ocean on Earth?",
]
NUM_TOKENS = 64
START_SECONDS = 240


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    output_ids: list[int]
    text: str


def demo_answers(gguf: Path) -> list[Answer]:
    """transformers' greedy answers in float32, one prompt at a time."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    answers: list[Answer] = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.inference_mode():
            out = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)
        output = out[0, len(ids) :].tolist()
        answers.append(Answer(ids, output, tokenizer.decode(output, skip_special_tokens=True)))
    return answers


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """`qwen-ray serve …` until it is ready; afterwards Ctrl-C, 10 s, and nothing may be left."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "qwen_ray.cli", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"not ready in {START_SECONDS} s"
            time.sleep(0.3)
        yield url
        started = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 0, output
        assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def check_answers(url: str, model: str, expected: list[Answer]) -> None:
    """All prompts, eight at a time, greedy: text and number of tokens are those expected."""

    with OpenAI(base_url=f"{url}/v1", api_key="none") as client, ThreadPoolExecutor(max_workers=8) as pool:

        def complete(answer: Answer) -> Completion:
            return client.completions.create(
                model=model, prompt=answer.prompt_ids, max_tokens=NUM_TOKENS, temperature=0
            )

        for answer, completion in zip(expected, pool.map(complete, expected), strict=True):
            assert completion.choices[0].text == answer.text
            assert completion.usage is not None
            assert completion.usage.completion_tokens == len(answer.output_ids)
