"""`suffix` of completions over real HTTP: the ranks see a prompt with a gap, and end where the model would go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qwen_ray.core.plan import EngineConfig
from qwen_ray.text.tokenizer import Tokenizer
from tests.unit.serving.conftest import EOS, TEMPLATE, Server, write_tokenizer

TEXT = "/v1/completions"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")


@pytest.fixture
async def coder(tmp_path: Path, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    write_tokenizer(tmp_path, TEMPLATE)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in FIM])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    monkeypatch.setattr("tests.unit.serving.conftest.VOCAB_SIZE", tokenizer.vocab_size)
    server = Server(tokenizer, engine_config, "middle<|file_sep|>other")
    yield await server.start(num_replicas=1)
    await server.stop()


async def test_the_prompt_has_the_suffix_before_the_gap(coder: Any) -> None:
    encode = coder.tokenizer.encode
    expected = encode("<|fim_prefix|>a = <|fim_suffix|>\nb = 2\n<|fim_middle|>")
    for prompt in ("a = ", encode("a = ")):
        response = await coder.client.post(TEXT, json={"prompt": prompt, "suffix": "\nb = 2\n", "max_tokens": 50})
        (choice,) = response.json()["choices"]
        assert list(coder.replicas[0].requests[-1].prompt_token_ids) == expected
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("middle", "stop", None)
    assert response.json()["usage"]["prompt_tokens"] == len(expected)


async def test_ends_can_be_ignored(coder: Any) -> None:
    body = {"prompt": "a", "suffix": "b", "ignore_eos": True, "max_tokens": 12}
    (choice,) = (await coder.client.post(TEXT, json=body)).json()["choices"]
    assert choice["text"] == "middle<|file_sep|>other"
    assert EOS not in coder.replicas[0].requests[-1].stop_token_ids


async def test_without_a_suffix_the_prompt_stands_alone(coder: Any) -> None:
    for body in ({}, {"suffix": ""}, {"suffix": None}):
        response = await coder.client.post(TEXT, json={"prompt": "ab", "max_tokens": 1, **body})
        assert response.status_code == 200
        assert list(coder.replicas[0].requests[-1].prompt_token_ids) == coder.tokenizer.encode("ab")


async def test_echo_and_suffix_exclude_each_other(coder: Any) -> None:
    error = (await coder.client.post(TEXT, json={"prompt": "a", "suffix": "b", "echo": True})).json()["error"]
    assert (error["param"], error["type"]) == ("echo", "invalid_request_error")


async def test_a_model_without_the_tokens_says_so(server: Any) -> None:
    response = await server.client.post(TEXT, json={"prompt": "a", "suffix": "b"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "suffix")
    assert "<|fim_prefix|>" in response.json()["error"]["message"]
