"""The application on a Ray that runs: Serve, its proxies, and the deployments, until all of them are up.

Knows Serve's way of saying what went wrong. What starts Ray, and ends everything, is `launch.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ApplicationStatusOverview

from qwen_ray.config import Settings
from qwen_ray.core import errors
from qwen_ray.core.errors import QwenRayError
from qwen_ray.serving.app import APP, build
from qwen_ray.serving.environment import KEEP_ALIVE_SECONDS

POLL_SECONDS = 0.05


class DeployFailed(QwenRayError):
    """Serve gave up on the application; `exit_code` is that of the error behind it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]


def deploy(settings: Settings, on_serve: Callable[[], None]) -> None:
    """Returns when requests are answered. `on_serve` is called when Serve's controller is up. Raises DeployFailed."""
    application = build(settings)
    http = serve.HTTPOptions(host=settings.http.host, port=settings.http.port, keep_alive_timeout_s=KEEP_ALIVE_SECONDS)
    with ThreadPoolExecutor(max_workers=1) as beside:
        starting = beside.submit(serve.start, http_options=http)
        _wait_for_controller(starting)
        on_serve()
        try:
            serve.run(application, name=APP, route_prefix="/", blocking=False)
        except RuntimeError as error:
            raise _cause(serve.status().applications[APP]) or error from error
        starting.result()


def withdraw() -> None:
    """Takes the application off a cluster that stays; returns when its requests have been handed over or have ended."""
    serve.delete(APP)


def _wait_for_controller(starting: Future[None]) -> None:
    """The model need not wait for Serve's proxies, which take as long to start as the controller."""
    while not starting.done():
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            return
        except ValueError:
            time.sleep(POLL_SECONDS)


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
