"""What Ray and Ray Serve must find in their environment. Imports neither: both read it when they are imported.

Whoever starts a cluster puts these into its own environment first, on top of what is set; Ray hands them on to every
process. A KubeRay cluster carries them in its pods.
"""

from __future__ import annotations

KEEP_ALIVE_SECONDS = 20  # that an idle connection of a client is kept

ENVIRONMENT: dict[str, str] = {
    # Nothing leaves the machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    # torch asks for the name of every address that ranks meet at: an answer that is lost costs 1 s, not 5.
    "RES_OPTIONS": "timeout:1 attempts:3",
    # Of every process' log files; one with a line for every request would fill the disk some day.
    "RAY_ROTATION_MAX_BYTES": str(100 * 2**20),
    "RAY_ROTATION_BACKUP_COUNT": "3",
    # HAProxy in front: a plain request took 2.8 ms against 10.9 through Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # An ingress and a replica each run on one event loop; a second thread would only add a hop to every message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # HAProxy takes a change of the ingresses in by starting anew; the old process goes on with its streams for so long.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # Whoever fails its health checks does not drain any more; it would hold its GPUs for as long as draining may take.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # A dead proxy is missed after three looks; by default that is half a minute without a way in.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Serve ends a proxy that is not ready after three looks of so many seconds. A busy machine takes longer than 5.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # A request whose ingress went away before it said anything goes to another one; replicas forget the first.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # An old HAProxy serves one more request on each connection that it knows, with the ingresses that it knows: those
    # stay reachable for longer than a connection may idle (KEEP_ALIVE_SECONDS).
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "30",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "30",
}

# Of a Ray that is this machine alone.
ALONE: dict[str, str] = {
    # Ray's way to say that there is no cluster: ports are bound to loopback. Any address that it is told instead,
    # 127.0.0.1 too, it takes to mean the outer one of the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Whoever reaches a port nevertheless (Serve's replicas bind one each to all interfaces) needs Ray's token.
    "RAY_AUTH_MODE": "token",
    # Ray's own metrics, which nobody reads here: collecting them, its raylet grows by an eighth in twenty minutes.
    "RAY_enable_metrics_collection": "0",
    # Seconds between two looks of Serve's controller at everything: 3 ms each, from who computes on these cores.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
