"""`qwen-ray doctor --address` on a cluster of two nodes, of which one has another Ray and a clock that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from qwen_ray.commands.ports import free_ports

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "memory": 2 * 2**30, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node, env_vars={"PYTHONPATH": sys.argv[1]})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
CLOCK = "import time\n_right = time.time\ntime.time = lambda: _right() + 30\n"


def test_a_node_that_differs(tmp_path: Path) -> None:
    other = tmp_path / "ray-2.50.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.50.0\n")
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join((str(tmp_path), str(Path.cwd())))
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = next(line for line in cluster.stdout if ":" in line).split()[-1]
            (port,) = free_ports(1)
            flags = ["--json", "--address", address, "--port", str(port)]
            command = [sys.executable, "-m", "qwen_ray.cli", "doctor", *flags]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        finally:
            cluster.stdin.close()
            cluster.wait(60)
    assert answer.returncode == 1, answer.stderr
    failed = [one for one in json.loads(answer.stdout)["findings"] if one["verdict"] == "fail"]
    assert {one["check"] for one in failed} == {"versions", "clock"}
    assert len({one["node"] for one in failed}) == 1
    messages = " ".join(one["message"] for one in failed)
    assert "ray 2.50.0 in place of" in messages
    assert "s ahead" in messages
