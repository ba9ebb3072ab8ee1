"""What Ray and Ray Serve must find in their environment. Imports neither: both read it when they are imported.

Whoever starts a cluster puts these into its own environment first, unless the user has set them; Ray hands them on to
every process. A KubeRay cluster carries them in its pods.
"""

from __future__ import annotations

ENVIRONMENT: dict[str, str] = {
    # Nothing leaves the machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    # HAProxy in front: a plain request took 2.8 ms against 10.9 through Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # An ingress and a replica each run on one event loop; a second thread would only add a hop to every message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Ctrl-C ends within 10 s. Behind a load balancer that deregisters slowly, set it to what that takes.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
}
