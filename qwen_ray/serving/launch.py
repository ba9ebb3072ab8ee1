"""The server process behind `qwen-ray serve`: Ray, Serve and the application, until it is told to stop.

    python -m qwen_ray.serving.launch        as `child.py` says

Its events are `ray`, `serve`, `ready` and `error`.
"""

from __future__ import annotations

import logging
import threading
import time

import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from qwen_ray.cluster.inventory import hardware
from qwen_ray.config import Settings
from qwen_ray.core import errors
from qwen_ray.core.errors import QwenRayError
from qwen_ray.core.hardware import Hardware
from qwen_ray.serving.app import APP, build
from qwen_ray.serving.child import stop_with_sigterm, supervised, tell
from qwen_ray.serving.environment import KEEP_ALIVE_SECONDS

# No tensor of ours goes through Ray's object store.
OBJECT_STORE_BYTES = 128 * 2**20
STOP_SECONDS = 5.0


class DeployFailed(QwenRayError):
    """Serve gave up on the application; `exit_code` is that of the error behind it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    supervised("server", run, stop)


def run(settings: Settings) -> None:
    """Bring everything up, say so, and wait for the end. Raises QwenRayError, or what Ray raises."""
    start_ray(settings)
    tell("ray", address=ray.get_runtime_context().gcs_address)
    stop_with_sigterm()
    application = build(settings)
    http = serve.HTTPOptions(host=settings.http.host, port=settings.http.port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS)
    serve.start(http_options=http)
    tell("serve")
    try:
        serve.run(application, name=APP, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise _cause(serve.status().applications[APP]) or error from error
    tell("ready")
    while True:
        time.sleep(3600)


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


def _cause(application: ApplicationStatusOverview) -> DeployFailed | None:
    """What ended a deployment: the last error in the traceback that Serve keeps of it, ours if there is one."""
    for deployment in application.deployments.values():
        _, is_ours, ours = deployment.message.rpartition("\nqwen_ray.core.errors.")
        if is_ours:
            name, _, message = ours.partition(": ")
            return DeployFailed(message.strip(), getattr(errors, name).exit_code)
        if "Error: " in deployment.message:
            return DeployFailed(deployment.message.strip().splitlines()[-1], QwenRayError.exit_code)
    return None


def stop(settings: Settings) -> None:
    """End what was started here: the whole of a local Ray, or the application on a cluster that stays."""
    if not ray.is_initialized():
        return
    if settings.ray_address:
        # The controller goes on with it on its own; draining may take longer than anybody wants to wait here.
        deleting = threading.Thread(target=serve.delete, args=(APP,), daemon=True)
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
