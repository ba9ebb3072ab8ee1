"""What we ship for Prometheus and Grafana, on a real Prometheus that scrapes a running server under load."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from served import PROMPTS, serving
from tiny_model import write_tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from observability.panels.__main__ import files
from qwen_ray.metrics.catalog import BY_OWNER

sys.path.insert(0, str(Path(__file__).parent))
from live_prometheus import INTERVAL, Prometheus, prometheus
from prometheus_tools import RULES, tool

DASHBOARDS = {path.stem: json.loads(text) for path, text in files().items()}
RULE_ROWS = [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
LOAD_SECONDS = 50  # for a counter to be seen growing, and a picture to show something
NUM_CLIENTS = 4
# Where pictures go: `make dashboards` keeps them.
PICTURES = os.environ.get("QWEN_RAY_PICTURES")
SECTION = "qwen_ray_|vllm:"


def write_tiny_moe(path: Path) -> Path:
    """A random Qwen3-MoE with 8 experts; the tokenizer's tokens are single bytes."""
    write_tiny_model(path)
    (path / "model.safetensors").unlink()
    config = Qwen3MoeConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=257,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Live:
    url: str
    prometheus: Prometheus  # one target
    discovering: Prometheus  # each process a target


@contextmanager
def load(url: str) -> Iterator[None]:
    """Streams, chats and mistakes, until the end."""
    is_over = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            for i in itertools.count(number):
                if is_over.is_set():
                    return
                prompt = PROMPTS[i % 4] * 2
                body = {"prompt": prompt, "max_tokens": 24 + 8 * (i % 4), "ignore_eos": True, "seed": i}
                http.post("/v1/completions", json=body)
                http.post("/v1/completions", json={"prompt": prompt, "max_tokens": -1})
                http.get("/v1/models/another")

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(timeout=120)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    model = write_tiny_moe(folder / "tiny-moe")
    plan = ("--tp", "2", "--ep", "2", "--dtype", "float32", "--kv-cache-memory", "1MiB", "--max-model-len", "512")
    options = ("--served-model-name", "demo", "--price-per-hour", "3.6", "--max-num-seqs", "4")
    with ExitStack() as stack:
        url = stack.enter_context(serving(str(model), *plan, *options))
        first = stack.enter_context(prometheus(folder / "one", "prometheus.yaml", url))
        second = stack.enter_context(prometheus(folder / "two", "prometheus-discovery.yaml", url))
        stack.enter_context(load(url))
        first.until(f"count_over_time(qwen_ray:running[1h]) > {LOAD_SECONDS / INTERVAL}", 240)
        second.until("up == 1", 60)
        yield Live(url, first, second)


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


def test_the_files_are_what_the_source_says() -> None:
    assert {path: path.read_text(encoding="utf-8") for path in files()} == files(), "run `make dashboards`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_reads_them(name: str) -> None:
    read = Dashboard.from_json(DASHBOARDS[name])
    assert read.title == DASHBOARDS[name]["title"]
    assert len(read.panels or []) == len(DASHBOARDS[name]["panels"])
    assert read.templating.list_val is not None
    assert [v.name for v in read.templating.list_val] == ["datasource", "model_name", "ingress", "replica"]
    titles = [panel["title"] for panel in panels(DASHBOARDS[name])]
    assert len(titles) == len(set(titles))
    for panel in panels(DASHBOARDS[name]):
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_every_panel_has_data(live: Live) -> None:
    empty = [
        (name, panel["title"], target["expr"])
        for name, dashboard in DASHBOARDS.items()
        for panel in panels(dashboard)
        for target in panel["targets"]
        if not live.prometheus.samples(target["expr"])
    ]
    assert empty == []


def test_every_variable_has_values(live: Live) -> None:
    for dashboard in DASHBOARDS.values():
        for variable in dashboard["templating"]["list"][1:]:
            match = re.fullmatch(r"label_values\((\S+?)(?:\{.*\})?, (\w+)\)", variable["definition"])
            assert match, variable
            assert live.prometheus.get(f"label/{match[2]}/values", **{"match[]": match[1]})


def test_every_recording_rule_has_data(live: Live) -> None:
    assert [row["record"] for row in RULE_ROWS if "record" in row and not live.prometheus.samples(row["expr"])] == []


def test_every_alert_reads_series_that_there_are(live: Live) -> None:
    """That they fire is tested with promtool: here there is no trouble."""
    for row in RULE_ROWS:
        if "alert" in row:
            live.prometheus.samples(row["expr"])
            names = set(re.findall(rf"(?:{SECTION}|qwen_ray:)[\w:]+|\bup\b", row["expr"]))
            assert names
            assert [name for name in names if not live.prometheus.samples(name)] == [], row["alert"]


def test_what_is_scraped_is_the_catalog(live: Live) -> None:
    found: set[str] = set()
    for name in live.prometheus.get("label/__name__/values", **{"match[]": '{job="qwen-ray"}'}):
        if re.match(SECTION, name):
            found.add(name)
        else:
            assert name == "up" or name.startswith(("scrape_", "ALERTS")), name
    expected: set[str] = set()
    for row in itertools.chain.from_iterable(BY_OWNER.values()):
        histogram = [f"{row.name}_{part}" for part in ("bucket", "sum", "count")]
        expected |= {*histogram} if row.kind == "histogram" else {row.name}
    assert found == expected


def test_discovered_processes_give_what_one_scrape_gives(live: Live) -> None:
    """Each ingress and replica once, and every process up."""
    targets = {labels["instance"]: value for labels, value in live.discovering.samples("max_over_time(up[1h])")}
    processes = {
        f"{kind}/{labels[kind]}"
        for kind, metric in (("ingress", "qwen_ray_open_sequences"), ("replica", "vllm:num_requests_running"))
        for labels, _ in live.prometheus.samples(metric)
    }
    assert targets == dict.fromkeys(processes, 1.0)
    for metric in ("qwen_ray_open_sequences", "vllm:num_requests_running", "qwen_ray_rank_steps_total"):
        seen = f"count_over_time({metric}[1h])"
        assert len(live.discovering.samples(seen)) == len(live.prometheus.samples(seen)) > 0


@pytest.mark.parametrize("name", DASHBOARDS)
def test_it_can_be_drawn(name: str, live: Live, tmp_path: Path) -> None:
    drawn = DASHBOARDS[name]
    for panel in panels(drawn):
        panel["series"] = [
            line
            for target in panel["targets"]
            for line in live.prometheus.lines(target["expr"], target["legendFormat"], LOAD_SECONDS)
        ]
    page = (Path(__file__).parent / "drawing.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("/*DATA*/null", json.dumps(drawn).replace("</", "<\\/")))
    height = 36 + 30 * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in drawn["panels"])
    picture = Path(PICTURES or tmp_path).absolute() / f"{name}.png"
    command = [tool("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [
        f"--screenshot={picture}",
        "--force-device-scale-factor=0.7",
        f"--window-size=1500,{height}",
        (tmp_path / "page.html").as_uri(),
    ]
    dom = subprocess.run([*command, "--dump-dom", shot[-1]], capture_output=True, text=True, timeout=300).stdout
    assert "<title>drawn</title>" in dom
    assert "no data" not in dom.split("<script>")[0] + dom.split("</script>")[-1]
    subprocess.run([*command, *shot], capture_output=True, check=True, timeout=300)
    assert picture.read_bytes().startswith(b"\x89PNG")
