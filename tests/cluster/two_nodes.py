"""A process that owns a Ray cluster of one or two nodes on this machine, with the application on it. Not a test.

    python two_nodes.py        commands (JSON lines `[NAME, ARGUMENT]`) on stdin, an answer to each on stdout

Of its own, as Ray reads its settings when it is imported, and as a test process may have a Ray already.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ray
from faulty_replica import FaultyReplica
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import ProxyLocation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qwen_ray.cluster.directory import Directory
from qwen_ray.commands.process_tree import descendants
from qwen_ray.config import Settings
from qwen_ray.serving import app
from qwen_ray.serving.environment import KEEP_ALIVE_SECONDS

WANTED = "QWEN_RAY_TEST_REPLICAS"  # the file that says how many replicas there are to be
NODE = {"num_cpus": 4, "memory": 6 * 2**30, "object_store_memory": 80 * 2**20}


def wanted(_: Any) -> tuple[int, dict[str, Any]]:
    """In place of our autoscaling: as many as a test asks for."""
    return int(Path(os.environ[WANTED]).read_text()), {}


class TwoNodes:
    """Every public method is a command."""

    def __init__(self) -> None:
        self._cluster: Any = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        self._second: Any = None
        self._filler: Any = None
        ray.init(address=self._cluster.address, log_to_driver=False)
        ours = app.autoscaling_config
        policy = {"policy_function": "two_nodes:wanted"}
        at_once = {"policy": policy, "metrics_interval_s": 0.2, "upscale_delay_s": 0.0, "downscale_delay_s": 0.0}
        app.autoscaling_config = lambda model: {**ours(model), **at_once}

    def deploy(self, settings: dict[str, Any]) -> None:
        """A new version of everything, whatever the settings; returns when it runs."""
        asked = Settings.from_dict(settings)
        http = {"host": asked.http.host, "port": asked.http.port, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS}
        serve.start(http_options=serve.HTTPOptions(**http, location=ProxyLocation.HeadOnly))
        serve.run(app.build(asked), name=app.APP, route_prefix="/")

    def deploy_with_poison(self, settings: dict[str, Any]) -> None:
        """The same with ranks that die of one prompt, `faulty_worker.POISON`."""
        app.Replica = FaultyReplica
        self.deploy(settings)

    def scale(self, count: int) -> None:
        """Returns when so many replicas run, and no others, not even such as are about to end."""
        Path(os.environ[WANTED]).write_text(str(count))
        deadline = time.monotonic() + 120
        while serve.status().applications[app.APP].deployments["Replica"].replica_states != {"RUNNING": count}:
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.1)

    def add_node(self, _: Any) -> None:
        """A second one, the only one with room from here on."""

        @ray.remote(num_cpus=0)
        class Filler:
            pass

        free = ray.available_resources()["CPU"]
        here = NodeAffinitySchedulingStrategy(self._cluster.head_node.node_id, soft=False)
        self._filler = Filler.options(num_cpus=free - 0.05, scheduling_strategy=here).remote()
        ray.get(self._filler.__ray_ready__.remote())
        self._second = self._cluster.add_node(**NODE)
        self._cluster.wait_for_nodes()

    def kill_node(self, _: Any) -> None:
        """The second node with all that runs on it, at once."""
        raylet = self._second.all_processes["raylet"][0].process.pid
        for pid in {raylet, *descendants(raylet)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(self._second, allow_graceful=False)
        ray.kill(self._filler)

    def replicas(self, _: Any) -> list[str]:
        """The node of each: head or second."""
        head = self._cluster.head_node.node_id
        entries = asyncio.run(Directory(app.APP).list("replica"))
        return ["head" if entry.node_id == head else "second" for entry in entries]

    def controller(self, _: Any) -> int:
        handle = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        pid: Any = ray.get(handle.get_pid.remote())
        return pid

    def gcs(self, _: Any) -> int:
        return self._cluster.head_node.all_processes["gcs_server"][0].process.pid

    def restart_gcs(self, seconds: float) -> None:
        """Kill it, and start another one `seconds` later at the same port, as Kubernetes would."""
        head = self._cluster.head_node
        head.kill_gcs_server()
        time.sleep(seconds)
        head.start_gcs_server()

    def end(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    cluster = TwoNodes()
    try:
        for line in sys.stdin:
            name, argument = json.loads(line)
            try:
                answer = {"answer": getattr(cluster, name)(argument)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        cluster.end()


if __name__ == "__main__":
    main()
