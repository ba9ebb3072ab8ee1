"""The command line from the outside: exit codes, messages, and what is not imported."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from qwen_ray.cli import main

COMMANDS = ("serve", "plan", "generate", "chat", "bench", "pull", "status", "doctor", "key", "version")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model's directory with nothing but a config."""
    config = {
        "model_type": "qwen2",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown
    assert command == "version" or f"qwen-ray {command}" in shown.split("Options")[0].replace("Usage: qwen-ray", "")


def test_plan_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "Qwen/Qwen2.5-72B-Instruct", "--hardware", "8xH100-80G", "--json") == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert sum(chosen["weights_bytes_per_rank"]) == pytest.approx(145.4e9, rel=0.02)


def test_a_refused_plan_shows_the_inequality(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "Qwen/Qwen2.5-72B-Instruct", "--hardware", "1xH100-80G") == 5
    error = capsys.readouterr().err
    assert "145.41 GB" in error
    assert ">" in error


def test_plan_of_a_directory_with_context_and_concurrency(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--hardware", "1xcpu-24G", "--context", "256", "--concurrency", "3", "--tp", "2", "--dtype", "float32")
    assert run("plan", str(tiny), *flags, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["concurrency"], report["dtype"]) == (3, "float32")
    assert (report["chosen"]["tp"], report["chosen"]["max_model_len"]) == (2, 256)


def test_plan_places_experts_by_their_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = {"model": "m", "num_experts": 128, "expert_tokens": [[9] * 32 + [1] * 96] * 48}
    (tmp_path / "load.json").write_text(json.dumps(load))
    flags = ("--hardware", "4xH100-80G", "--ep", "4", "--dp-attention", "4", "--num-redundant-experts", "4")
    given = ("--expert-load", str(tmp_path / "load.json"))
    assert run("plan", "Qwen/Qwen3-30B-A3B", *flags, *given, "--json") == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert (chosen["tp"], chosen["ep"], chosen["dp_attention"], chosen["num_redundant_experts"]) == (1, 4, 4, 4)
    # Dealt out in order, rank 0 has 288 of 384 tokens.
    assert chosen["expert_imbalance"]["even"] == 3
    assert chosen["expert_imbalance"]["placed"] < 1.05


def test_plan_for_this_machine(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("qwen_ray.cli.running_ray", lambda: None)
    assert run("plan", str(tiny)) == 0
    assert "Chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("plan", "demo", "--hardware", "1xToaster"), 2, "Toaster"),
        (("plan", "Qwen/Qwen3-8B", "--hardware", "1xH100-80G", "--context", "long"), 2, "--context"),
        (("plan", "Qwen/Qwen3-8B", "--hardware", "8xH100-80G", "--ep", "2"), 5, "ep is for a model with experts"),
        (("plan", "Qwen/Qwen3-8B", "--hardware", "8xH100-80G", "--enable-eplb"), 2, "models.0.experts.enable_eplb"),
        (("plan", "Qwen/Qwen3-30B-A3B", "--hardware", "8xH100-80G", "--expert-load", "/no/such"), 2, "/no/such"),
        (("pull", "/no/such/model"), 3, "/no/such/model"),
        (("serve", "--port", "0"), 2, "http.port"),
        (("serve", "-f", "/no/such/file.yaml"), 2, "/no/such/file.yaml"),
        (("generate", "x", "--temperature", "9"), 1, "temperature"),
        (("status", "--url", "http://127.0.0.1:9"), 1, "qwen-ray serve"),
        (("bench", "--url", "http://127.0.0.1:9"), 3, "http://127.0.0.1:9"),
        (("plan", "--no-such-flag"), 2, "no-such-flag"),
        (("serve", "--api-key", ""), 2, "API key"),
        (("serve", "--api-keys-file", "/no/such/keys"), 2, "/no/such/keys"),
        (("serve", "--ssl-certfile", "/no/such.pem", "--ssl-keyfile", "/no/such.key"), 2, "/no/such.pem"),
        (("serve", "--ssl-certfile", "/no/such.pem"), 2, "ssl_keyfile"),
        (("serve", "--address", "x:1", "--ssl-certfile", "a", "--ssl-keyfile", "b"), 2, "gateway"),
        (("key", "--name", "not a name"), 2, "id"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_serve_refuses_a_busy_port_before_anything_starts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert run("serve", str(tiny), "--port", str(port)) == 1
    error = capsys.readouterr().err
    assert f"Port {port}" in error
    assert "--port" in error


def test_serve_refuses_what_cannot_fit_before_anything_starts(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", str(tiny), "--port", "18437", "--kv-cache-memory", "900T") == 5
    assert "900000" in capsys.readouterr().err.replace(",", "").replace(".", "")


def test_serve_refuses_fp8_which_can_only_be_planned_with(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", str(tiny), "--hardware", "1xH100-80G", "--dtype", "fp8") == 0
    assert "not served" in capsys.readouterr().out
    assert run("serve", str(tiny), "--port", "18437", "--dtype", "fp8") == 2
    assert "models.0.dtype" in capsys.readouterr().err


def test_help_and_plan_import_neither_torch_nor_ray(tiny: Path) -> None:
    script = f"""
import sys
from qwen_ray.cli import main
for arguments in (["--help"], ["plan", {str(tiny)!r}, "--hardware", "1xH100-80G"], ["serve", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, end.code
import qwen_ray
import qwen_ray.commands.serve
found = {{"torch", "ray", "transformers", "numpy"}} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_a_key_and_its_hash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("key", "--name", "team-a", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["id"] == "team-a"
    assert hashlib.sha256(made["key"].encode()).hexdigest() == made["sha256"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{made['key']}\n"))
    assert run("key", "--stdin", "--name", "team-a") == 0
    shown = capsys.readouterr().out
    assert made["key"] not in shown
    assert yaml.safe_load(shown) == [{"id": "team-a", "sha256": made["sha256"]}]


@pytest.fixture
def guarded() -> Iterator[str]:
    """A server that wants the key `right`; the address."""

    class Guard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_right = self.headers["Authorization"] == "Bearer right"
            body = json.dumps({"data": [{"id": "m"}], "model": "m", "expert_tokens": [[1]]} if is_right else {})
            self.send_response(200 if is_right else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "code"), [(("status", "--json"), 1), (("chat",), 3), (("generate", "x"), 3), (("bench",), 3)]
)
def test_a_server_that_wants_a_key(
    guarded: str,
    arguments: tuple[str, ...],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key in ((), ("--api-key", "wrong")):
        assert run(*arguments, "--url", guarded, *key) == code
        assert "QWEN_RAY_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("QWEN_RAY_API_KEY", "right")
    load = str(tmp_path / "load.json")
    assert run("status", "--url", guarded, "--expert-load", load) == 0
    monkeypatch.delenv("QWEN_RAY_API_KEY")
    assert run("status", "--url", guarded, "--expert-load", load, "--api-key", "right") == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
