"""`qwen-ray generate` and `qwen-ray chat`: a model in this process, or a server's at --url, to a terminal.

What a model thinks is shown on terminals only, dim; a pipe gets the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx

from qwen_ray import LLM
from qwen_ray.commands.console import err, out, progress_bars
from qwen_ray.commands.load import bearer, served_model
from qwen_ray.config import Settings
from qwen_ray.core.errors import QwenRayError, RequestError
from qwen_ray.core.request import SamplingParams

Message = dict[str, str]
Shown = tuple[str, str]  # what is thought, what is said
# A prompt or a conversation -> the answer as it comes.
Answer = Callable[[str | list[Message]], Iterator[Shown]]
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run_generate(
    settings: Settings, prompt: str, sampling: SamplingParams, *, url: str | None, api_key: str | None
) -> None:
    with _answerer(settings, sampling, url, api_key) as answer:
        _show(answer(prompt))


def run_chat(
    settings: Settings, system: str | None, sampling: SamplingParams, *, url: str | None, api_key: str | None
) -> None:
    """Until an empty line, end of input or Ctrl-C at the prompt; Ctrl-C during an answer only ends that answer."""
    messages = [{"role": "system", "content": system}] if system else []
    with _answerer(settings, sampling, url, api_key) as answer:
        while text := _ask():
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _show(answer(messages))})
            except RequestError as error:
                err.print(f"error: {error}", markup=False)
                messages.pop()


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _show(pieces: Iterator[Shown]) -> str:
    """Returns what is said."""
    shown: list[str] = []
    has_thought = False
    try:
        for thought, said in pieces:
            if thought and out.is_terminal:
                out.file.write(f"{DIM}{thought}{PLAIN}")
                has_thought = True
            if said:
                out.file.write(f"\n\n{said}" if has_thought else said)
                has_thought = False
                shown.append(said)
            out.file.flush()
    except KeyboardInterrupt:
        if isinstance(pieces, Iterator) and hasattr(pieces, "close"):
            pieces.close()  # pyright: ignore[reportAttributeAccessIssue]
    out.file.write("\n")
    return "".join(shown)


@contextmanager
def _answerer(settings: Settings, sampling: SamplingParams, url: str | None, api_key: str | None) -> Iterator[Answer]:
    if url is not None:
        url = url.rstrip("/").removesuffix("/v1")
        model = served_model(url, api_key)
        yield lambda prompt: _remote(url, model, prompt, sampling, api_key)
        return
    with progress_bars() as show:
        llm = LLM(settings=settings, on_progress=show)
    with llm:
        yield lambda prompt: ((piece.reasoning, piece.text) for piece in llm.stream_pieces(prompt, sampling))


def _remote(
    url: str, model: str, prompt: str | list[Message], sampling: SamplingParams, api_key: str | None
) -> Iterator[Shown]:
    """The same from a server. Raises QwenRayError."""
    names = ("max_tokens", "temperature", "top_p", "seed")
    body: dict[str, Any] = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    path, key = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
    body |= {"model": model, key: prompt, "stream": True}
    try:
        with (
            closing(httpx.Client(timeout=600.0, headers=bearer(api_key))) as client,
            client.stream("POST", f"{url}/v1/{path}", json=body) as got,
        ):
            if got.status_code != 200:
                raise QwenRayError(f"HTTP {got.status_code}: {got.read().decode(errors='replace')[:500]}")
            for line in got.iter_lines():
                if line.startswith("data: {"):
                    yield from _texts(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise QwenRayError(f"{url}: {error}") from error


def _texts(event: dict[str, Any]) -> Iterator[Shown]:
    if event.get("error"):
        raise QwenRayError(str(event["error"].get("message", event["error"])))
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        # Other servers name it in one of two ways.
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        yield thought, choice.get("text") or delta.get("content") or ""
