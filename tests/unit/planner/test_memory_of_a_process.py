"""What a rank's process grows by, against the planner's figure, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

RANK = """
import json, os, time
from dataclasses import replace
from pathlib import Path
from qwen_ray.core.hardware import Hardware
from qwen_ray.core.plan import Rendezvous
from qwen_ray.planner.candidate import PlanRequest
from qwen_ray.planner.family import lookup
from qwen_ray.planner.search import plan
from qwen_ray.worker.worker import Worker

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def start(num_layers, kv_memory_bytes):
    config = replace(lookup("demo"), num_hidden_layers=num_layers)
    asked = PlanRequest(config=config, hardware=Hardware.parse("1xcpu-24G"), kv_memory_bytes=kv_memory_bytes,
                        max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512)
    chosen = plan(asked).require()
    spec = chosen.replica_spec(name="test", path="", load_format="dummy")
    worker = Worker(spec, 0)
    worker.load()
    worker.join(Rendezvous(address="", name="test"))
    worker.warm_up()
    return worker, chosen

first, _ = start(1, 10**7)  # what torch and its libraries take on first use is not the model's
first.close()
before = resident()
worker, chosen = start(10, 2 * 10**8)
stats = worker.stats()
memory = chosen.ranks[0]
expected, grown = memory.held(chosen.engine.num_blocks), resident() - before
end = time.monotonic() + 60
while grown < 0.97 * expected and time.monotonic() < end:  # the KV cache gets its memory by and by
    time.sleep(0.1)
    grown = resident() - before
print(json.dumps({
    "predicted": expected, "grown": grown,
    "weights": [memory.weights, stats.weights_bytes],
    "kv": [memory.kv_per_block * chosen.engine.num_blocks, stats.kv_bytes],
}))
worker.close()
"""


def test_a_rank_holds_what_was_predicted() -> None:
    answer = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(answer.stdout)
    assert found["weights"][0] == found["weights"][1]
    assert found["kv"][0] == found["kv"][1]
    assert abs(found["grown"] / found["predicted"] - 1) < 0.03, found
