"""A Ray of this machine with its dashboard, which takes a Serve config as KubeRay brings it. Not a test.

    python deployed_by_config.py        prints the dashboard's address; ends Ray when stdin is closed

Of its own, as Ray reads its environment when it is imported.
"""

from __future__ import annotations

import logging
import sys

import ray

from qwen_ray.commands.ports import free_ports

if __name__ == "__main__":
    started = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_port=free_ports(1)[0],
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=80 * 2**20,
    )
    sys.stdout.write(f"http://{started.address_info['webui_url']}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()
