"""`qwen-ray serve` and the terminal: Ctrl-C at any moment, twice, or SIGTERM; nothing may be left afterwards."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qwen_ray.commands.ports import free_ports
from qwen_ray.commands.process_tree import descendants
from qwen_ray.core.errors import CheckpointError

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model of random weights with a token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@contextmanager
def serving(model: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    flags = [
        "--load-format",
        "dummy",
        "--kv-cache-memory",
        "1MiB",
        "--max-num-seqs",
        "4",
        "--served-model-name",
        "tiny",
    ]
    command = [sys.executable, "-m", "qwen_ray.cli", "serve", str(model), "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


def assert_ends_without_a_trace(process: subprocess.Popen[str], *signals: signal.Signals) -> None:
    started = descendants(process.pid)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0, output
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []


def test_it_answers_and_ctrl_c_twice_ends_it(tiny: Path) -> None:
    port = free_ports(1)[0]
    with serving(tiny, port) as process:
        wait_for(process, "curl")
        url = f"http://127.0.0.1:{port}"
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 5
        second = subprocess.run(
            [sys.executable, "-m", "qwen_ray.cli", "serve", str(tiny), "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert f"Port {port}" in second.stderr
        assert_ends_without_a_trace(process, signal.SIGINT, signal.SIGINT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("moment", ["starting Ray ", "starting Ray Serve", "starting the model"])
def test_ended_while_it_starts(tiny: Path, moment: str) -> None:
    with serving(tiny, free_ports(1)[0]) as process:
        wait_for(process, moment)
        time.sleep(1.0)
        assert_ends_without_a_trace(process, signal.SIGTERM)


def test_a_model_that_cannot_be_loaded_is_one_message(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header    ")
    command = [sys.executable, "-m", "qwen_ray.cli", "serve", str(tiny), "--port", str(free_ports(1)[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
