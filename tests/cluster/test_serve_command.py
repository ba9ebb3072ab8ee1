"""`qwen-ray serve` and the terminal: Ctrl-C at any moment, twice, or SIGTERM; nothing may be left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
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
def serving(
    model: Path, port: int, *more: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
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
    command = [sys.executable, "-m", "qwen_ray.cli", "serve", str(model), "--port", str(port), *flags, *more]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
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


def certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert)
    subprocess.run([*made, *names], check=True, capture_output=True)
    return cert, key


def listeners(pids: set[int]) -> dict[int, tuple[int, bool]]:
    """Ports that these processes listen on: the process, and whether it is loopback alone that reaches it."""
    sockets: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets[str(descriptor.readlink())] = pid
    found: dict[int, tuple[int, bool]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, _, state, *_, inode = line.split()[1:10]
            address, port = local.split(":")
            if state == "0A" and f"socket:[{inode}]" in sockets:
                is_local = address.endswith("0100007F") or address == "0" * 24 + "01000000"
                found[int(port, 16)] = sockets[f"socket:[{inode}]"], is_local
    return found


def holds(pid: int, secret: bytes) -> bool:
    """In its environment or on its command line."""
    try:
        return any(secret in Path(f"/proc/{pid}/{file}").read_bytes() for file in ("environ", "cmdline"))
    except OSError:
        return False


def unpickles_for_strangers(address: str, touched: Path) -> bool:
    """What Serve's replicas take from one another, sent without Ray's token."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest", request_serializer=bytes)
        payload = pickle.dumps(Touch(str(touched)), protocol=4)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\x0a" + bytes([len(payload)]) + payload, timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, refused.value
    return touched.exists()


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_tls_a_key_and_who_else_can_reach_it(tiny: Path, tmp_path: Path) -> None:
    secret = "a-key-that-nobody-may-see"
    cert, key = certificate(tmp_path)
    audit = tmp_path / "audit.jsonl"
    port = free_ports(1)[0]
    more = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--audit-log", str(audit))
    with serving(tiny, port, *more, environment={"QWEN_RAY_API_KEY": secret}) as process:
        wait_for(process, "curl")
        trusting = ssl.create_default_context(cafile=cert)
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting, timeout=60) as client:
            assert client.get("/health/ready").status_code == 200
            assert client.get("/status").status_code == 401
            headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": "mine"}
            answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}, headers=headers)
            assert answer.status_code == 200
            assert answer.headers.get_list("x-request-id") == ["mine"]
            assert client.get("/version", headers=headers).headers["x-request-id"] == "mine"
            assert secret not in client.get("/status", headers=headers).text
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=10)
        records = [json.loads(line) for line in audit.read_text().splitlines()]
        assert ("mine", 200, 3) in [(one["request_id"], one["status"], one["prompt_tokens"]) for one in records]
        started = descendants(process.pid)
        assert [pid for pid in started if holds(pid, secret.encode())] == []
        assert secret not in audit.read_text()
        listening = listeners(started)
        assert listening[port][1]
        outer = {number: pid for number, (pid, is_local) in listening.items() if not is_local}
        for number, pid in outer.items():
            assert b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes(), (number, pid)
            assert not unpickles_for_strangers(f"127.0.0.1:{number}", tmp_path / "touched")
        assert len(outer) == 2  # an ingress and a replica of Serve's
        assert_ends_without_a_trace(process, signal.SIGINT)
