"""`qwen-ray batch`: a file of requests to a file of answers; started again, it goes on where it ended.

Imports neither torch nor Ray; what answers runs in `serving/batch.py`, in a process of its own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from qwen_ray.commands import process_tree
from qwen_ray.commands.child import Stopped, check, ignore_signals, log_file, signals_raise, talk
from qwen_ray.commands.console import err, out, progress_bars
from qwen_ray.commands.pull import pull
from qwen_ray.config import API_KEY_VARIABLE, Settings
from qwen_ray.core.errors import QwenRayError, SettingsError
from qwen_ray.machine import this_machine
from qwen_ray.planner.search import plan
from qwen_ray.serving.batch_file import read_requests
from qwen_ray.serving.environment import ALONE, ENVIRONMENT
from qwen_ray.sizing import plan_request
from qwen_ray.source.config_file import load_config

STOP_SECONDS = 7.0
STARTING = "starting Ray and the model"


def run_batch(settings: Settings, source: Path, target: Path, concurrency: int) -> None:
    """Until every request has its answer. Raises QwenRayError, and KeyboardInterrupt when it is stopped before."""
    if len(settings.models) != 1:
        raise SettingsError(f"models: a batch has one model, got {len(settings.models)}.", field="models")
    if find_spec("pandas") is None or find_spec("pyarrow") is None:
        raise QwenRayError("Batches run on Ray Data, which is not installed: pip install 'qwen-ray[batch]'.")
    # What is wrong with the file is said before anything is fetched or started.
    total = len(read_requests(source))
    config = load_config(pull(settings.models[0], settings))
    if not settings.ray_address:
        plan(plan_request(settings, settings.models[0], config, this_machine(), dp=concurrency)).require()
    command = [sys.executable, "-m", "qwen_ray.serving.batch", str(source), str(target), str(concurrency)]
    environment = {**ENVIRONMENT, **({} if settings.ray_address else ALONE)}
    with signals_raise(), log_file(settings, f"batch-{target.stem}") as log:
        child = process_tree.start(command, environment, log, without=(API_KEY_VARIABLE,))
        try:
            events = talk(child, settings)
            with progress_bars() as show:
                while (event := events.get())["event"] != "done":
                    check(child, event)
                    if event["event"] == "ray":
                        show(STARTING, 0, 1)
                    if event["event"] == "progress":
                        show(STARTING, 1, 1)
                        show("answering", event["done"], event["total"])
        except Stopped:
            err.print("stopped; the same command goes on with what has no answer yet")
            raise KeyboardInterrupt from None
        finally:
            ignore_signals()
            process_tree.stop(child, seconds=STOP_SECONDS)
    failed = f", {event['num_failed']} of them errors" if event["num_failed"] else ""
    out.print(f"{target}: {total} answers{failed}", markup=False, soft_wrap=True)
