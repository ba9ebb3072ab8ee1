"""The process behind `qwen-ray batch`: requests through Ray Data to a pool of engines, answers to a file.

    python -m qwen_ray.serving.batch INPUT OUTPUT CONCURRENCY        as `child.py` says

Its events are `ray`, `progress` (`done`, `total`), `done` (`num_failed`) and `error`.

Ray Data deals small blocks of requests to actors, several at once to each, so that an engine always has a full batch;
blocks come back as they are done, in any order. Only this process writes: an answer is in the file once, however often
an actor had to begin with it. An actor that dies ends the execution, since Ray would start it again beside the place
that its ranks still hold; the next execution begins with what has no answer yet, as a batch does that is started again.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayActorError

from qwen_ray.config import HttpSettings, Settings
from qwen_ray.core.errors import QwenRayError
from qwen_ray.serving.app import DEPLOYMENT_CPUS, replica_spec, served_model
from qwen_ray.serving.batch_engine import BatchEngine
from qwen_ray.serving.batch_file import Answers, BatchLine, read_requests
from qwen_ray.serving.child import stop_with_sigterm, supervised, tell
from qwen_ray.serving.launch import start_ray

logger = logging.getLogger(__name__)

MAX_FRUITLESS = 3  # executions that end with an actor's death and without an answer
MAX_CALLS = 64  # to one actor at once; each is a thread of its
MAX_LINES = 32  # of one call: all of them are done before one is written
FEWEST_CALLS = 64  # that a batch is divided into
MAX_BLOCK_BYTES = 2**20  # Ray Data plans its memory with that; its own 128 MiB would let few calls run at once
UNBOUNDED = 2**16  # sequences: how many wait in an engine is bounded by the calls


class Interrupted(QwenRayError):
    """Actors die again and again."""


def main() -> None:
    source, target, concurrency = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    supervised("batch", lambda settings: run(settings, source, target, concurrency), lambda settings: ray.shutdown())


def run(settings: Settings, source: Path, target: Path, concurrency: int) -> None:
    """Answer all that has no answer yet. Raises QwenRayError, or what Ray raises."""
    requests = read_requests(source)
    with Answers(target) as answers:
        answers.check(requests, target)
        tell("progress", done=len(answers.custom_ids), total=len(requests))
        if len(answers.custom_ids) < len(requests):
            start_ray(settings)
            stop_with_sigterm()
            tell("ray")
            _answer_all(for_batch(settings, concurrency), requests, answers, concurrency)
        tell("done", num_failed=answers.num_failed)


def for_batch(settings: Settings, concurrency: int) -> Settings:
    """As many replicas as actors; without what only a server has, such as keys."""
    model = settings.models[0]
    replicas = model.replicas.model_copy(update={"min": concurrency, "max": concurrency})
    http = HttpSettings(max_body_bytes=settings.http.max_body_bytes, max_open_requests=MAX_CALLS * MAX_LINES)
    return settings.model_copy(
        update={
            "models": (model.model_copy(update={"replicas": replicas}), *settings.models[1:]),
            "http": http,
            "engine": settings.engine.model_copy(update={"max_num_waiting": UNBOUNDED}),
            "observability": settings.observability.model_copy(update={"audit_log": None}),
        }
    )


def _answer_all(settings: Settings, requests: list[BatchLine], answers: Answers, concurrency: int) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = MAX_BLOCK_BYTES
    num_fruitless = 0
    while left := [request for request in requests if request.custom_id not in answers.custom_ids]:
        try:
            _execute(settings, left, answers, total=len(requests), concurrency=concurrency)
        except RayActorError as error:
            has_progress = len(left) > len(requests) - len(answers.custom_ids)
            num_fruitless = 0 if has_progress else num_fruitless + 1
            if num_fruitless == MAX_FRUITLESS:
                raise Interrupted(f"Engines die before they have answered anything: {error}") from error
            logger.warning("an engine died; the rest is begun anew: %s", error)
        except Exception as error:
            raise _ours(error) or error from error


def _execute(settings: Settings, left: list[BatchLine], answers: Answers, *, total: int, concurrency: int) -> None:
    spec = replica_spec(settings)
    model = served_model(settings.models[0], spec)
    num_lines = min(MAX_LINES, max(1, len(left) // (FEWEST_CALLS * concurrency)))
    # Twice what an engine runs at once: a call ends with its slowest line.
    num_calls = min(MAX_CALLS, math.ceil(2 * spec.engine.max_num_seqs * spec.plan.dp_attention / num_lines))
    items = [{"number": request.number, "line": request.text} for request in left]
    custom_ids = {request.number: request.custom_id for request in left}
    dataset = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / num_lines)).map_batches(
        BatchEngine,
        fn_constructor_args=(settings, model, spec),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=concurrency,
            max_tasks_in_flight_per_actor=2 * num_calls,
            max_concurrent_calls_per_actor=num_calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=DEPLOYMENT_CPUS,
        ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        answers.add({custom_ids[int(n)]: str(line) for n, line in zip(block["number"], block["line"], strict=True)})
        tell("progress", done=len(answers.custom_ids), total=total)


def _ours(error: BaseException | None) -> QwenRayError | None:
    """The error of our tree behind what Ray wraps it in."""
    while error is not None and not isinstance(error, QwenRayError):
        inner: Any = getattr(error, "cause", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__
    return error


if __name__ == "__main__":
    main()
