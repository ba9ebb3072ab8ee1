"""The server process behind `qwen-ray serve`: Ray, Serve and the application, until it is told to stop.

    python -m qwen_ray.serving.launch        as `child.py` says

Its events are `ray`, `serve`, `ready` and `error`.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import ray

from qwen_ray.cluster.inventory import hardware
from qwen_ray.config import Settings
from qwen_ray.core.errors import QwenRayError
from qwen_ray.core.hardware import Hardware
from qwen_ray.serving.child import stop_with_sigterm, supervised, tell

# No tensor of ours goes through Ray's object store.
OBJECT_STORE_BYTES = 128 * 2**20
STOP_SECONDS = 5.0


def main() -> None:
    supervised("server", run, stop)


def run(settings: Settings) -> None:
    """Bring everything up, say so, and wait for the end. Raises QwenRayError, or what Ray raises."""
    with ThreadPoolExecutor(max_workers=1) as beside:
        deploying = beside.submit(_deploying)
        start_ray(settings)
        tell("ray", address=ray.get_runtime_context().gcs_address)
        stop_with_sigterm()  # Ray has put its own in place of ours
        deploying.result().deploy(settings, lambda: tell("serve"))
    tell("ready")
    while True:
        time.sleep(3600)


def _deploying() -> ModuleType:
    """Serve and the application take two seconds to import: that is done while Ray's processes start."""
    from qwen_ray.serving import deploy

    return deploy


def start_ray(settings: Settings) -> None:
    """Join the cluster that is named, or start one, reachable from this machine only if `environment.ALONE` holds."""
    log_to_driver = settings.observability.log_level == "debug"
    if settings.ray_address:
        ray.init(address=settings.ray_address, log_to_driver=log_to_driver, logging_level=logging.WARNING)
        return
    ray.init(
        address="local",
        include_dashboard=settings.observability.ray_dashboard,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=log_to_driver,
        logging_level=logging.WARNING,
    )


def stop(settings: Settings) -> None:
    """End what was started here: the whole of a local Ray, or the application on a cluster that stays."""
    if not ray.is_initialized():
        return
    if settings.ray_address:
        # The controller goes on with it on its own; draining may take longer than anybody wants to wait here.
        deleting = threading.Thread(target=_deploying().withdraw, daemon=True)
        deleting.start()
        deleting.join(STOP_SECONDS)
    ray.shutdown()


def cluster_hardware(address: str) -> Hardware:
    """What a running Ray cluster is made of. Raises QwenRayError when there is none at `address`."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise QwenRayError(f"No Ray cluster answers at {address}: {error}") from error
    try:
        return hardware()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
