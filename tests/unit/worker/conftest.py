"""Lets the tests here import `tiny_models` from this directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
