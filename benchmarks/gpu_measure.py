"""One model on one device, through the engine and the worker as they serve: its rows, one after the other.

Knows rounds of the engine and when enough was seen of them. A decode is timed by whole steps, from the end of one to
the end of the next; what the device does in a step is looked at in a few more, which do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from gpu_device import Device, DeviceProfile, DeviceTime, Limits
from gpu_models import MODELS, Fitted, Sizes, fit
from gpu_rows import Row
from gpu_work import StepWork, decode_work, experts_touched, prefill_operations
from in_process import Bench, is_decode

from qwen_ray.core.stats import StepStats
from qwen_ray.planner.memory import in_words

NUM_SKIPPED = 3  # steps with all sequences, before one is timed
LEAST_TIMED = 3
TIMED_SECONDS = 10.0  # then no more steps are timed
PATIENCE_SECONDS = 60.0  # for prompts to be computed, before a decode is given up
MOST_PREFILLS, PREFILL_SECONDS = 4, 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    seconds: float  # from the end of the one before
    rank_seconds: float
    num_kv_tokens: int


@dataclass(slots=True)
class DecodeWatch:
    """An `on_step`: times steps in which all sequences decode, profiles some more, and ends the round."""

    bench: Bench
    sizes: Sizes
    num_sequences: int
    profile: DeviceProfile | None
    steps: list[TimedStep] = field(default_factory=list[TimedStep])
    device_time: DeviceTime | None = None
    _begun: float = field(default_factory=time.perf_counter)
    _last: float = 0.0
    _num_full: int = 0
    _num_profiled: int = -1  # not begun

    def __call__(self, stats: StepStats) -> None:
        now = time.perf_counter()
        if is_decode(stats) and stats.num_sequences == self.num_sequences:
            self._num_full += 1
            if self._num_profiled >= 0:
                self._profiled()
            elif self._num_full > NUM_SKIPPED:
                self._timed(stats, now - self._last)
        elif now - self._begun > PATIENCE_SECONDS:
            self.bench.end()
        self._last = time.perf_counter()

    def _timed(self, stats: StepStats, seconds: float) -> None:
        outputs = sum(map(len, self.bench.tokens.values())) - self.num_sequences  # before this step
        context = self.num_sequences * self.sizes.context + outputs
        self.steps.append(TimedStep(seconds=seconds, rank_seconds=stats.rank_seconds, num_kv_tokens=context))
        is_long = sum(step.seconds for step in self.steps) > TIMED_SECONDS and len(self.steps) >= LEAST_TIMED
        if len(self.steps) >= self.sizes.num_timed or is_long:
            if self.profile is None:
                self.bench.end()
            else:
                self.profile.start()
                self._num_profiled = 0

    def _profiled(self) -> None:
        self._num_profiled += 1
        if self.profile is not None and self._num_profiled == self.sizes.num_profiled:
            self.device_time = self.profile.stop()
            self.bench.end()


class ModelBench:
    """A loaded model and its rows. Raises what the worker raises."""

    def __init__(self, fitted: Fitted, sizes: Sizes, device: Device, limits: Limits) -> None:
        self._fitted = fitted
        self._sizes = sizes
        self._device = device
        self._limits = limits
        self._config = fitted.spec.config
        self._dtype = MODELS[fitted.spec.name].weight_dtype
        self._tokens: dict[int, list[int]] = {}  # by batch: those of its first sequence
        self._loading_peak = 0
        begun = time.perf_counter()
        device.begin_peak()
        self._bench = Bench(fitted.spec, self._loaded)
        self._start_seconds = time.perf_counter() - begun

    def _loaded(self) -> None:
        self._loading_peak = self._device.peak_bytes()
        self._device.begin_peak()

    def rows(self) -> Iterator[Row]:
        first, *more = self._fitted.batches
        yield self.decode(first)
        yield self.prefill()
        for batch in more:
            try:
                yield self.decode(batch)
            except torch.OutOfMemoryError as error:
                yield self._row(self._decode_name(batch), note=f"failed: {str(error)[:100]}")
                break
            if batch == more[0]:
                yield self.same_tokens(first, batch)
        else:
            yield self.again(first)
        for batch in self._sizes.batches[len(self._fitted.batches) :]:
            yield self._row(self._decode_name(batch), note="does not fit")
        yield self.memory()

    def close(self) -> None:
        self._bench.close()

    def decode(self, batch: int) -> Row:
        sizes, what = self._sizes, self._decode_name(batch)
        watch = DecodeWatch(self._bench, sizes, batch, self._device.profile())
        self._bench.run(batch, sizes.num_outputs, watch, sizes.context)
        self._tokens[batch] = self._bench.tokens[0]
        if len(watch.steps) < LEAST_TIMED:
            reason = self._bench.errors[0] if self._bench.errors else f"no decodes in {PATIENCE_SECONDS:.0f} s"
            return self._row(what, note=f"failed: {reason}")
        step = statistics.median(step.seconds for step in watch.steps)
        rank = statistics.median(step.rank_seconds for step in watch.steps)
        kv_tokens = statistics.median(step.num_kv_tokens for step in watch.steps)
        work = decode_work(self._config, self._dtype, batch, kv_tokens)
        busy = watch.device_time.busy_seconds / sizes.num_profiled if watch.device_time else None
        return self._row(
            what,
            work=work,
            tokens=batch,
            step_seconds=step,
            busy_seconds=busy,
            host_seconds=None if busy is None else rank - busy,
            between_seconds=step - rank,
            note=_kernels(watch.device_time, sizes.num_profiled),
            more={
                "num_timed": len(watch.steps),
                "step_seconds": [step.seconds for step in watch.steps],
                "rank_seconds": rank,
                "num_kv_tokens": kv_tokens,
                "experts_touched": experts_touched(self._config, batch),
                "kernel_seconds": _kernel_seconds(watch.device_time, sizes.num_profiled),
            },
        )

    def again(self, batch: int) -> Row:
        """The first decode once more, behind all others: whether a profiler that has run, or heat, changes it."""
        before = self._tokens[batch]
        row = self.decode(batch)
        pairs = zip(before, self._tokens[batch], strict=False)
        verdict = "the same tokens" if all(a == b for a, b in pairs) else "other tokens"
        return replace(row, what="the first again", note=f"{verdict}; {row.note}".removesuffix("; "))

    def prefill(self) -> Row:
        sizes = self._sizes
        seconds: list[float] = []
        while len(seconds) < MOST_PREFILLS and (sum(seconds) < PREFILL_SECONDS or len(seconds) < 2):
            seconds.append(self._prefill_seconds())
        profile, device_time = self._device.profile(), None
        if profile is not None and sum(seconds) < 2 * PREFILL_SECONDS:
            profile.start()
            self._prefill_seconds()
            device_time = profile.stop()
        whole = statistics.median(seconds[1:])  # the first warms up
        operations = prefill_operations(self._config, sizes.num_prompts, sizes.prompt_length)
        return self._row(
            f"prefill {sizes.num_prompts} x {sizes.prompt_length}",
            work=StepWork(num_bytes=0, operations=operations),
            tokens=sizes.num_prompts * sizes.prompt_length,
            step_seconds=whole,
            busy_seconds=device_time.busy_seconds if device_time else None,
            host_seconds=whole - device_time.busy_seconds if device_time else None,
            note=self._bench.errors[0] if self._bench.errors else _kernels(device_time, 1),
            more={"seconds": seconds, "kernel_seconds": _kernel_seconds(device_time, 1)},
        )

    def _prefill_seconds(self) -> float:
        return self._bench.run(self._sizes.num_prompts, 1, lambda stats: None, self._sizes.prompt_length)

    def same_tokens(self, first: int, second: int) -> Row:
        """Whether a sequence is told the same alone and in company."""
        pairs = list(zip(self._tokens[first], self._tokens[second], strict=False))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        verdict = "the same" if equal == len(pairs) else f"differ from token {equal} on"
        return self._row(
            f"tokens at {first}, {second}",
            note=f"{verdict}, of {len(pairs)}",
            more={"num_equal": equal, "num_compared": len(pairs)},
        )

    def memory(self) -> Row:
        """Beside what the planner says; torch does not see what the driver and the libraries take."""
        planned, used = self._fitted.planned_bytes, self._device.used_bytes()
        seen, peak = planned - self._fitted.memory.reserve, self._device.peak_bytes()
        stats = self._bench.rank.worker.stats()
        return self._row(
            "memory",
            note=f"peak {in_words(peak)}, planned {in_words(seen)}; with libraries {in_words(used)}, planned "
            f"{in_words(planned)}; loading {in_words(self._loading_peak)}; started in {self._start_seconds:.0f} s",
            more={
                "planned_bytes": planned,
                "planned": asdict(self._fitted.memory),
                "peak_bytes": peak,
                "used_bytes": used,
                "loading_peak_bytes": self._loading_peak,
                "weights_bytes": stats.weights_bytes,
                "kv_bytes": stats.kv_bytes,
                "start_seconds": self._start_seconds,
            },
        )

    def _decode_name(self, batch: int) -> str:
        return f"decode {batch} x {self._sizes.context}"

    def _row(
        self,
        what: str,
        *,
        work: StepWork | None = None,
        tokens: int = 0,
        step_seconds: float | None = None,
        **figures: object,
    ) -> Row:
        row = {"model": self._fitted.spec.name, "what": what, "step_seconds": step_seconds, **figures}
        if work is not None and step_seconds is not None:
            row["tokens_per_second"] = tokens / step_seconds
            row["rate_fraction"] = work.rate_fraction(step_seconds, self._limits.product_rate)
            if work.num_bytes:
                row["bandwidth_fraction"] = work.bandwidth_fraction(step_seconds, self._limits.read_bandwidth)
        return Row(**row)  # type: ignore[arg-type]


def measure_model(name: str, sizes: Sizes, device: Device, limits: Limits) -> Iterator[Row]:
    fitted = fit(name, sizes, device.device.type, device.total_bytes())
    if fitted is None:
        yield Row(model=name, what="", note=f"does not fit into {device.total_bytes() / 1e9:.1f} GB")
        return
    bench = ModelBench(fitted, sizes, device, limits)
    try:
        yield from bench.rows()
    finally:
        bench.close()


def _kernels(found: DeviceTime | None, num_steps: int) -> str:
    return "" if found is None else f"{found.num_kernels / num_steps:.0f} kernels"


def _kernel_seconds(found: DeviceTime | None, num_steps: int) -> dict[str, float]:
    """Of the longest ones, in a step."""
    return {} if found is None else {name: seconds / num_steps for name, seconds in found.kernels.items()}
