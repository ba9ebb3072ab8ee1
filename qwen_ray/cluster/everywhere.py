"""A function of ours, run on the nodes of a Ray cluster that one names. Knows Ray's tasks; not what is run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qwen_ray.cluster.inventory import hardware
from qwen_ray.core.errors import QwenRayError
from qwen_ray.core.hardware import Hardware

P = ParamSpec("P")
R = TypeVar("R")

CONNECT_SECONDS = 60.0


class Everywhere:
    """Nodes by address, the head first."""

    def __init__(self, address: str) -> None:
        """Raises QwenRayError, saying why, where no cluster of this Ray answers in time."""
        errors: list[BaseException] = []
        done = threading.Event()

        def connect() -> None:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except BaseException as error:
                errors.append(error)
            done.set()

        threading.Thread(target=connect, daemon=True).start()
        if not done.wait(CONNECT_SECONDS):
            raise QwenRayError(f"No Ray cluster answers at {address} within {CONNECT_SECONDS:.0f} s.")
        if errors:
            first_lines = " ".join(str(errors[0]).split())[:400]
            raise QwenRayError(f"This machine cannot join the Ray cluster at {address}: {first_lines}")
        nodes = sorted(
            (n for n in ray.nodes() if n["Alive"]), key=lambda n: "node:__internal_head__" not in n["Resources"]
        )
        # Several nodes of one machine share an address (tests, mostly): the id tells them apart.
        self._ids: dict[str, str] = {}
        self.addresses: dict[str, str] = {}
        self.num_gpus: dict[str, int] = {}
        for node in nodes:
            address, node_id = str(node["NodeManagerAddress"]), str(node["NodeID"])
            name = address if address not in self._ids else f"{address} {node_id[:6]}"
            self._ids[name], self.addresses[name] = node_id, address
            self.num_gpus[name] = int(node["Resources"].get("GPU", 0))

    @property
    def names(self) -> list[str]:
        return list(self._ids)

    def run(self, node: str, seconds: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Raises QwenRayError when it fails, or does not answer in time."""
        where: Any = NodeAffinitySchedulingStrategy(self._ids[node], soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(function)
        running = task.remote(*args, **kwargs)
        try:
            return ray.get(running, timeout=seconds)
        except GetTimeoutError:
            ray.cancel(running, force=True)
            raise QwenRayError(f"{node} did not answer within {seconds:.0f} s.") from None
        except RayError as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise QwenRayError(f"{node}: {last[:300]}") from error

    def hardware(self) -> Hardware:
        return hardware()

    def close(self) -> None:
        ray.shutdown()
