"""Lets the tests here import `tiny_models`, of the worker's unit tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "worker"))
if os.environ.get("TRITON_INTERPRET") != "1":
    # Their tensors are on the CPU, where kernels are interpreted alone. `tests/gpu` has the like for a GPU.
    collect_ignore = ["test_graphs.py", "test_layers.py"]
