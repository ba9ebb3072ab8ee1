"""Lets tests, and the processes they start, import `rank_processes` from here. A name server may lose answers."""

import os
import sys
from pathlib import Path

from qwen_ray.serving.environment import ENVIRONMENT

os.environ.setdefault("RES_OPTIONS", ENVIRONMENT["RES_OPTIONS"])

sys.path.insert(0, str(Path(__file__).parent))
