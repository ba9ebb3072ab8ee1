"""Where the log lines of a deployment's process go, and from which level on: to stderr, which Ray keeps in files."""

from __future__ import annotations

import logging
import sys


def configure_logs(level: str, process: str) -> None:
    """For loggers of ours; Ray's and Serve's own stay as they are. `process` stands in every line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s"))
    ours = logging.getLogger("qwen_ray")
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False
